"""Multiple instance active learning: two classifiers that are made to disagree on what nobody labelled yet.

Source: Yuan et al., "Multiple Instance Active Learning for Object Detection", CVPR 2021, arXiv:2104.02324, and the
authors' code (yuantn/MI-AOD). RetinaNet's head gets a second classifier and a multiple-instance branch beside the first
classifier and the boxes. A training goes through three phases, each again after the other:

- *label*: all learn from labelled images: the losses of both classifiers averaged, that of the boxes, and that of the
  image's classes by the multiple-instance branch (:func:`bag_scores`).
- *minimise*: the classifiers stand still; the rest learns from labelled images as before, and on unlabelled ones to
  make the classifiers agree where the branch sees an object (:func:`disagreement`), and to find the classes they see.
- *maximise*: only the classifiers learn, to disagree on the same places and to be right on labelled images.

An image's utility is how far the two classifiers' probabilities are apart, squared, averaged over the classes and over
the 10,000 anchors where they are farthest apart. Boxes are predicted with the first classifier.

Liberties: the authors' epochs (3 of label, then twice 1, 1 and 3) are shares of however many steps a detector trains; a
step of the last two phases holds as many unlabelled images as labelled ones, drawn anew from the whole pool, where
theirs alternates; losses on unlabelled images are averaged over images, where theirs, with 2 a step, adds them up; an
image in which the classifiers see nothing adds no loss of the branch, where theirs drops the batch's. Anchors in
padding say nothing of an image. The optimiser is the detector's. In a training without unlabelled images all phases are
*label*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import RetinaHead
from mmdet.models.dense_heads.anchor_head import AnchorHead
from mmdet.models.utils import unpack_gt_instances
from mmdet.registry import MODELS
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ppal_backend.detector.data import MixedData
from ppal_backend.detector.heads.base import Restore, override
from ppal_backend.detector.rivals import Read
from ppal_backend.errors import DetectorError

PHASES = (("label", 3), ("minimise", 1), ("maximise", 1), ("label", 3), ("minimise", 1), ("maximise", 1), ("label", 3))
"""Phases of a training and their shares of it."""
WEIGHT = 0.5
TOP_ANCHORS = 10_000
SEEN = 0.5
_CLASSIFIERS = ("cls_convs.", "retina_cls.", "cls_convs_2.", "retina_cls_2.")
_EPSILON = 1e-5


def phase_of(step: int, steps: int) -> str:
    """The phase of a training's step, counted from 0."""
    total, passed = sum(share for _, share in PHASES), 0
    for name, share in PHASES:
        passed += share
        if step * total < passed * steps:
            return name
    return PHASES[-1][0]


def instance_weights(bags: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """How much each anchor of a level stands for each class of its image (Sec. 3.3, as the authors' code has it).

    The softmax of the branch over classes, times the softmax over anchors of the largest class probability that the
    averaged classifiers give; no gradient reaches the classifiers.

    Args:
        bags: ``[N, anchors, C]`` logits of the multiple-instance branch.
        first: Logits of one classifier, likewise.
        second: Of the other.

    Returns:
        ``[N, anchors, C]``; the anchors of an image add up to at most 1 for each class.
    """
    objects = ((first + second) / 2).detach().sigmoid().max(2, keepdim=True).values
    return bags.softmax(2) * objects.softmax(1)


def bag_scores(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[N, C]`` scores of the classes of images in (0, 1): the anchors of the level where they add up to most."""
    return torch.stack([level.sum(1) for level in weights]).max(0).values.clamp(_EPSILON, 1 - _EPSILON)


def disagreement(weights: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """How far the classifiers are apart on each image, weighted by anchors and classes and averaged over classes.

    Args:
        weights: ``[N, anchors, C]`` of :func:`instance_weights`; no gradient goes there.
        first: ``[N, anchors, C]`` logits.
        second: Likewise.

    Returns:
        ``[N]`` in [0, 1].
    """
    return ((first.sigmoid() - second.sigmoid()).abs() * weights.detach()).mean(2).sum(1)


def agreement(weights: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The same of how near they are to each other."""
    return ((1 - (first.sigmoid() - second.sigmoid()).abs()) * weights.detach()).mean(2).sum(1)


def image_discrepancy(first: torch.Tensor, second: torch.Tensor, top: int = TOP_ANCHORS) -> torch.Tensor:
    """Utility of an image from ``[anchors, C]`` logits of both classifiers, a scalar in [0, 1]."""
    apart = (first.sigmoid() - second.sigmoid()).square().mean(1)
    return apart.topk(min(top, len(apart))).values.mean()


def seen_classes(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[N, C]`` of 0 and 1: classes that some anchor of any level has with a mean probability of one half or more."""
    means = [(a.sigmoid() + b.sigmoid()) / 2 for a, b in zip(first, second, strict=True)]
    best = torch.stack([level.max(1).values for level in means]).max(0).values
    return (best.detach() >= SEEN).float()


@MODELS.register_module()
class MIALRetinaHead(RetinaHead):
    """RetinaNet's head with a second classifier and a multiple-instance branch.

    ``phase`` says what its losses are; with ``mixed`` every second image of a batch is unlabelled.
    """

    def _init_layers(self) -> None:
        super()._init_layers()
        self.phase, self.mixed = "label", False
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.cls_convs_2, self.mil_convs = self._tower(), self._tower()
        channels = self.feat_channels if self.stacked_convs else self.in_channels
        outputs = self.num_base_priors * self.cls_out_channels
        self.retina_cls_2, self.retina_mil = (torch.nn.Conv2d(channels, outputs, 3, padding=1) for _ in range(2))

    def _tower(self) -> torch.nn.ModuleList:
        widths = [self.in_channels, *[self.feat_channels] * self.stacked_convs]
        return torch.nn.ModuleList(
            ConvModule(before, after, 3, padding=1, conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg)
            for before, after in pairwise(widths)
        )

    def forward(self, x: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Maps of the first classifier and of the boxes; in evaluation both classifiers' are kept in ``pairs``."""
        levels = [self._branches(level) for level in x]
        if not self.training:
            self.pairs = [(first, second) for first, second, _, _ in levels]
        return [level[0] for level in levels], [level[3] for level in levels]

    def _branches(self, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """First and second classifier, multiple-instance branch and boxes of one level."""
        first, boxes = self.forward_single(level)
        second = bags = level
        for conv in self.cls_convs_2:
            second = conv(second)
        for conv in self.mil_convs:
            bags = conv(bags)
        return first, self.retina_cls_2(second), self.retina_mil(bags), boxes

    def loss(self, x: Sequence[torch.Tensor], batch_data_samples: Sequence[Any]) -> dict[str, Any]:
        """Losses of the phase."""
        levels = [self._branches(level) for level in x]
        step = 2 if self.mixed else 1
        truths, ignored, metas = unpack_gt_instances(list(batch_data_samples)[::step])
        first, second, bags, boxes = ([level[part][::step] for level in levels] for part in range(4))
        # the reader of class difficulties has taken the place of the first call's method alone
        one = self.loss_by_feat(first, boxes, truths, metas, ignored)
        other = AnchorHead.loss_by_feat(self, second, boxes, truths, metas, ignored)
        losses: dict[str, Any] = {
            name: [(a + b) / 2 for a, b in zip(one[name], other[name], strict=True)] for name in one
        }
        flat = [[self._by_anchor(level) for level in maps] for maps in (first, second, bags)]
        if self.phase != "maximise":
            present = torch.stack([self._present(truth.labels) for truth in truths])
            losses["loss_image"] = _image_loss(flat, present)
        return {**losses, **(self._unlabelled(levels) if self.mixed else {})}

    def _unlabelled(self, levels: Sequence[Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Losses of every second image."""
        flat = [[self._by_anchor(level[part][1::2]) for level in levels] for part in range(3)]
        first, second, bags = flat
        measure = disagreement if self.phase == "minimise" else agreement
        parts = [measure(instance_weights(bag, a, b), a, b) for a, b, bag in zip(first, second, bags, strict=True)]
        losses = {"loss_discrepancy": WEIGHT * torch.stack(parts).sum(0).mean()}
        if self.phase == "minimise":
            losses["loss_seen"] = _image_loss(flat, seen_classes(first, second), only_seen=True)
        return losses

    def _by_anchor(self, maps: torch.Tensor) -> torch.Tensor:
        """``[N, A * C, H, W]`` as ``[N, anchors, C]``."""
        return maps.permute(0, 2, 3, 1).reshape(len(maps), -1, self.cls_out_channels)

    def _present(self, labels: torch.Tensor) -> torch.Tensor:
        """``[C]`` of 0 and 1: the classes of an image's boxes."""
        found = labels.new_zeros(self.cls_out_channels, dtype=torch.float32)
        found[labels] = 1.0
        return found


def _image_loss(flat: Sequence[Sequence[torch.Tensor]], wanted: torch.Tensor, only_seen: bool = False) -> torch.Tensor:
    """Binary cross entropy of the images' classes; with ``only_seen`` over images that have any."""
    first, second, bags = flat
    weights = [instance_weights(bag, a, b) for a, b, bag in zip(first, second, bags, strict=True)]
    found = torch.nn.functional.binary_cross_entropy(bag_scores(weights).float(), wanted, reduction="none").mean(1)
    counted = wanted.sum(1) > 0 if only_seen else torch.ones_like(found, dtype=torch.bool)
    return (found * counted).sum() / counted.sum().clamp(min=1)


class PhasesHook(Hook):
    """Leads a training through its phases. The phase follows from the step, so it needs no saving."""

    def __init__(self) -> None:
        self._trainable: dict[str, bool] = {}
        self._restore: Restore | None = None
        self._mixed = False

    def before_train(self, runner: Any) -> None:
        """Take over the detector's loss, to leave unlabelled images out of the phase that has none."""
        detector = _inner(runner.model)
        self._trainable = {name: value.requires_grad for name, value in detector.named_parameters()}
        self._mixed = isinstance(runner.train_loop.dataloader.dataset, MixedData)
        compute = detector.loss

        def computing(inputs: torch.Tensor, samples: Sequence[Any]) -> Any:
            step = 2 if self._mixed and not detector.bbox_head.mixed else 1
            return compute(inputs[::step], list(samples)[::step])

        self._restore = override(detector, loss=computing)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Set the phase, and what learns in it."""
        del batch_idx, data_batch
        phase = phase_of(runner.iter, runner.max_iters) if self._mixed else "label"
        detector = _inner(runner.model)
        head = detector.bbox_head
        head.phase, head.mixed = phase, phase != "label"
        for name, value in detector.named_parameters():
            value.requires_grad_(self._trainable[name] and learns(name, phase))

    def after_train(self, runner: Any) -> None:
        """Leave the detector as it was."""
        if self._restore is not None:
            self._restore()
            self._restore = None
        for name, value in _inner(runner.model).named_parameters():
            value.requires_grad_(self._trainable[name])


def learns(name: str, phase: str) -> bool:
    """Whether a parameter of the detector learns in a phase."""
    of_classifiers = name.removeprefix("bbox_head.").startswith(_CLASSIFIERS)
    return phase == "label" or of_classifiers == (phase == "maximise")


def _inner(model: Any) -> Any:
    return model.module if is_model_wrapper(model) else model


class MIAL:
    """Two classifiers and a multiple-instance branch on RetinaNet."""

    name = "mial"
    reads_difficulty = True
    learns_from_unlabelled = True

    def change(self, model: dict[str, Any]) -> None:
        """Put the head in place.

        Raises:
            DetectorError: The detector has no head of RetinaNet's own kind.
        """
        head = model.get("bbox_head") or {}
        if head.get("type") != "RetinaHead":
            raise DetectorError(
                f"expected a detector with a RetinaHead for mial, got {model['type']} with {head.get('type')}; choose "
                f"retinanet_tiny or another RetinaNet"
            )
        names = ("retina_cls", "retina_cls_2", "retina_mil")
        last = [{"type": "Normal", "name": name, "std": 0.01, "bias_prob": 0.01} for name in names]
        head.update(
            type="MIALRetinaHead", init_cfg={"type": "Normal", "layer": "Conv2d", "std": 0.01, "override": last}
        )

    def attach(self, detector: Any) -> None:
        """Nothing beside the head."""

    def hooks(self, batch_size: int) -> list[Hook]:
        """The phases."""
        del batch_size
        return [PhasesHook()]

    def watch(self, detector: Any) -> tuple[Restore, Read]:
        """Read what the head keeps of a batch."""
        head = detector.bbox_head

        def read(samples: Sequence[Any]) -> torch.Tensor:
            return torch.stack([_utility(head, index, sample) for index, sample in enumerate(samples)])[:, None]

        return lambda: None, read


def _utility(head: Any, index: int, sample: Any) -> torch.Tensor:
    """Discrepancy of one image of a batch over the anchors that lie on it."""
    (height, width), (padded_height, padded_width) = sample.img_shape[:2], sample.batch_input_shape
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for pair in head.pairs:
        for part, maps in zip(parts, pair, strict=True):
            rows = math.ceil(maps.shape[2] * height / padded_height)
            columns = math.ceil(maps.shape[3] * width / padded_width)
            part.append(head._by_anchor(maps[index : index + 1, :, :rows, :columns])[0].float())
    return image_discrepancy(torch.cat(parts[0]), torch.cat(parts[1]))
