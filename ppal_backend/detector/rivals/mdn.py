"""Mixture density outputs on SSD: how unsure the model is, and how unclear the image is, of class and box.

Source: Choi et al., "Active Learning for Deep Object Detection via Probabilistic Modeling", ICCV 2021,
arXiv:2103.16130 (Sec. 3.1 and 3.2), and the authors' code (NVlabs/AL-MDN). Every box coordinate and the classes of
every anchor are mixtures of K = 4 normal distributions: means, spreads (through a sigmoid) and weights (through a
softmax over the K). Boxes learn by the negative log likelihood of their targets, halved; classes by the cross entropy
of one draw of each component's logits, weighted by the mixture, on the positives and three times as many of the hardest
negatives. In prediction a box is the mean of its mixture and a class probability that of the components' softmax. The
aleatoric uncertainty is the mean of the spreads, the epistemic one the variance of the components' means around theirs
(of the components' probabilities, for classes). :mod:`~ppal_backend.acquisition.baselines.mdn` makes a utility of them.

Liberties: the likelihood of a box is that of the authors' code, which takes the sigmoid for a standard deviation and
bounds the density by adding 0.3 to it where the density divides by it; but it is computed in logarithms, where the
paper adds 1e-9 to the density, since a target far from all means would give no gradient. Anchors, targets, suppression
and schedule are the detector's. Only SSD's own head is changed (no stacked or depthwise convolutions); RetinaNet, on
which the paper does not run it, is not. Class difficulty is not followed, as the head's outputs in training are not
those that its family reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import SSDHead
from mmdet.models.utils import filter_scores_and_topk
from mmdet.registry import MODELS
from mmengine.hooks import Hook

from ppal_backend.acquisition.baselines.mdn import KINDS, image_summary
from ppal_backend.detector.heads.base import Restore, override, require_same_selection
from ppal_backend.detector.rivals import Read
from ppal_backend.errors import DetectorError

COMPONENTS = 4
_BOUND = 0.3
_LEAST = 1e-6
_NARROWEST = 1e-3  # of a spread; a sigmoid may round to 0, and the distance is divided by it
_FIELD = "ppal_mixture"

Mixture = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Means, spreads in (0, 1) and weights (together 1), the components along the second axis."""


def box_loss(mixture: Mixture, targets: torch.Tensor) -> torch.Tensor:
    """Half the negative log likelihood of box targets, coordinates added up.

    Args:
        mixture: ``[n, K, 4]`` each.
        targets: ``[n, 4]`` encoded boxes.

    Returns:
        ``[n]``.
    """
    means, spreads, weights = mixture
    distance = (targets[:, None] - means) / spreads
    density = -distance.square() / 2 - ((spreads + _BOUND) * math.sqrt(2 * math.pi)).log()
    return -torch.logsumexp(weights.clamp(min=_LEAST).log() + density, 1).sum(1) / 2


def class_loss(mixture: Mixture, labels: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Cross entropy of one draw of each component's logits, weighted by the mixture.

    Args:
        mixture: ``[n, K, C + 1]`` means and spreads, ``[n, K, 1]`` weights.
        labels: ``[n]`` int64, C for background.
        draws: ``[n, K, C + 1]`` standard normal numbers.

    Returns:
        ``[n]`` >= 0.
    """
    means, spreads, weights = mixture
    logs = (means + spreads.sqrt() * draws).log_softmax(2)
    own = logs.gather(2, labels[:, None, None].expand(-1, logs.shape[1], 1))
    return -(weights * own).sum((1, 2))


def moments(mixture: Mixture) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, aleatoric and epistemic uncertainty of a mixture, the components along the second axis, which goes."""
    means, spreads, weights = mixture
    mean = (weights * means).sum(1)
    return mean, (weights * spreads).sum(1), (weights * (means - mean[:, None]).square()).sum(1)


@MODELS.register_module()
class MixtureSSDHead(SSDHead):
    """SSD's head with mixtures for its outputs.

    In training its outputs are the raw maps of the mixtures; in evaluation the logarithms of class probabilities and
    the mean boxes, as mmdetection's prediction takes them, with the uncertainties kept in ``uncertainties``.
    """

    def _init_layers(self) -> None:
        per_anchor = zip(self.in_channels, self.num_base_priors, strict=True)
        channels = [(width, anchors) for width, anchors in per_anchor]
        self._widths = (2 * self.cls_out_channels + 1, 3 * 4)
        self.cls_convs, self.reg_convs = (
            torch.nn.ModuleList(
                torch.nn.Conv2d(width, anchors * COMPONENTS * numbers, 3, padding=1) for width, anchors in channels
            )
            for numbers in self._widths
        )
        self.uncertainties: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Raw maps in training, what mmdetection predicts from otherwise."""
        classes = [conv(level) for conv, level in zip(self.cls_convs, x, strict=True)]
        boxes = [conv(level) for conv, level in zip(self.reg_convs, x, strict=True)]
        if self.training:
            return classes, boxes
        self.uncertainties.clear()
        found = [self._predicted(*level) for level in zip(classes, boxes, strict=True)]
        return [scores for scores, _ in found], [means for _, means in found]

    def _predicted(self, classes: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps of one level for mmdetection; keeps its uncertainties, ``[N, H * W * A, …]``."""
        images, _, rows, columns = classes.shape
        of_classes, of_boxes = self.class_mixture(classes), self.box_mixture(boxes)
        means, spreads, weights = of_classes
        scores, *unsure_classes = moments((means.softmax(2), spreads, weights))
        middles, *unsure_boxes = moments(of_boxes)
        self.uncertainties.append(
            (
                torch.stack([kind.max(1).values for kind in unsure_boxes], 1).reshape(images, -1, 2),
                torch.stack(unsure_classes, 1).reshape(images, -1, 2, self.cls_out_channels),
            )
        )

        def as_map(values: torch.Tensor) -> torch.Tensor:
            return values.reshape(images, rows, columns, -1).permute(0, 3, 1, 2)

        return as_map(scores.clamp(min=torch.finfo(scores.dtype).tiny).log()), as_map(middles)

    def class_mixture(self, raw: torch.Tensor) -> Mixture:
        """Mixtures of a level's anchors from its raw map, image by image, row by row: ``[N * H * W * A, K, …]``."""
        flat = _by_anchor(raw, self._widths[0])
        means, spreads, weights = flat.split([self.cls_out_channels, self.cls_out_channels, 1], 2)
        return means, spreads.sigmoid(), weights.softmax(1)

    def box_mixture(self, raw: torch.Tensor) -> Mixture:
        """Likewise of its boxes, ``[N * H * W * A, K, 4]`` each."""
        means, spreads, weights = _by_anchor(raw, self._widths[1]).split(4, 2)
        return means, spreads.sigmoid().clamp(min=_NARROWEST), weights.softmax(1)

    def loss_by_feat(
        self,
        cls_scores: Sequence[torch.Tensor],
        bbox_preds: Sequence[torch.Tensor],
        batch_gt_instances: Any,
        batch_img_metas: Sequence[Any],
        batch_gt_instances_ignore: Any = None,
    ) -> dict[str, torch.Tensor]:
        """Losses from the raw maps, over the number of positives of the batch, as SSD's own."""
        sizes = [level.shape[-2:] for level in cls_scores]
        anchors, valid = self.get_anchors(sizes, batch_img_metas, device=cls_scores[0].device)
        labels, label_weights, targets, _, positives = self.get_targets(
            anchors, valid, batch_gt_instances, batch_img_metas, batch_gt_instances_ignore, unmap_outputs=True
        )
        of_classes, of_boxes = [], []
        for image in range(len(batch_img_metas)):
            one = slice(image, image + 1)
            own, wanted, weight = (
                torch.cat([level[image] for level in part]) for part in (labels, targets, label_weights)
            )
            classes = _joined([self.class_mixture(level[one]) for level in cls_scores])
            boxes = _joined([self.box_mixture(level[one]) for level in bbox_preds])
            losses = class_loss(classes, own, torch.randn_like(classes[0])) * weight
            matched = (own >= 0) & (own < self.num_classes)
            negative = losses[own == self.num_classes]
            hardest = min(self.train_cfg["neg_pos_ratio"] * int(matched.sum()), len(negative))
            of_classes.append(losses[matched].sum() + negative.topk(hardest).values.sum())
            of_boxes.append(box_loss((boxes[0][matched], boxes[1][matched], boxes[2][matched]), wanted[matched]).sum())
        return {"loss_cls": sum(of_classes) / positives, "loss_bbox": sum(of_boxes) / positives}


def _by_anchor(raw: torch.Tensor, numbers: int) -> torch.Tensor:
    """``[N, A * K * numbers, H, W]`` as ``[N * H * W * A, K, numbers]`` in single precision."""
    return raw.permute(0, 2, 3, 1).reshape(-1, COMPONENTS, numbers).float()


def _joined(levels: Sequence[Mixture]) -> Mixture:
    means, spreads, weights = (torch.cat(parts) for parts in zip(*levels, strict=True))
    return means, spreads, weights


class MDN:
    """Mixtures in place of the outputs of SSD's head."""

    name = "mdn"
    reads_difficulty = False
    learns_from_unlabelled = False

    def change(self, model: dict[str, Any]) -> None:
        """Put the head in place.

        Raises:
            DetectorError: The detector has no head of SSD's own kind.
        """
        head = model.get("bbox_head") or {}
        if head.get("type") != "SSDHead" or head.get("stacked_convs") or head.get("use_depthwise"):
            raise DetectorError(
                f"expected a detector with an SSDHead without stacked convolutions for mdn, got {model['type']} with "
                f"{head.get('type')}; choose ssd_tiny or ssd300_vgg16"
            )
        head["type"] = "MixtureSSDHead"

    def attach(self, detector: Any) -> None:
        """Nothing beside the head."""

    def hooks(self, batch_size: int) -> list[Hook]:
        """None: the head has its own loss."""
        del batch_size
        return []

    def watch(self, detector: Any) -> tuple[Restore, Read]:
        """Give each detection its uncertainties, and sum them up for each image."""
        head = detector.bbox_head
        predict, post_process = head._predict_by_feat_single, head._bbox_post_process
        images, pending = 0, list[tuple[torch.Tensor, torch.Tensor]]()

        def predicting(cls_score_list: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal images
            cfg = kwargs.get("cfg")
            pending.append(_selected(head, cls_score_list, images, head.test_cfg if cfg is None else cfg))
            images += 1
            return predict(cls_score_list, *args, **kwargs)

        def post_processing(results: Any, *args: Any, **kwargs: Any) -> Any:
            scores, uncertainties = pending.pop()
            require_same_selection(head, results.scores, scores)
            results.set_field(uncertainties, _FIELD)
            return post_process(results, *args, **kwargs)

        def read(samples: Sequence[Any]) -> torch.Tensor:
            found = [sample.pred_instances for sample in samples]
            return torch.stack([image_summary(item[_FIELD], item.scores) for item in found])

        return override(head, _predict_by_feat_single=predicting, _bbox_post_process=post_processing), read


def _selected(head: Any, maps: Any, image: int, cfg: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ``[n, 4]`` uncertainties of an image's boxes before suppression, by mmdetection's own selection."""
    scores_of, uncertainties_of = [], []
    for cls_score, (of_boxes, of_classes) in zip(maps, head.uncertainties, strict=True):
        logits = cls_score.permute(1, 2, 0).reshape(-1, head.cls_out_channels)
        scores, labels, kept, _ = filter_scores_and_topk(
            logits.softmax(-1)[:, :-1], cfg.get("score_thr", 0), cfg.get("nms_pre", -1)
        )
        scores_of.append(scores)
        uncertainties_of.append(torch.cat([of_boxes[image][kept], of_classes[image][kept, :, labels]], 1))
    uncertainties = torch.cat(uncertainties_of)
    return torch.cat(scores_of), uncertainties.reshape(-1, len(KINDS))
