"""Learning loss: a small module beside the detector predicts each image's loss, and the largest are asked for.

Source: Yoo and Kweon, "Learning Loss for Active Learning", CVPR 2019, arXiv:1905.03677. The module (Fig. 2, Sec. 3.2)
averages each of the detector's feature maps, puts each average through a layer of 128 units and all together through
one more. It learns from pairs of images which of the two has the larger loss (Eq. 2), since the losses themselves
shrink while the detector learns (Eq. 1 shows what that would do). After a share of the training its gradient no longer
reaches the detector.

Liberties: the paper has SSD, whose six maps it takes; here it is any detector with a dense or a RoI head, and the maps
are those its head reads (the levels of the pyramid). Averages leave padding out, so that a prediction does not depend
on the other images of a batch. The loss of one image is what the detector's own losses are when they are computed on
that image alone, the losses of proposals included (on a sample of anchors of its own, where the detector samples
them). Pairs are neighbours in the batch, whose order is random already;
the last image of an odd batch is in none. The whole pool is ordered, where the paper draws 10,000 images of it first.
The optimiser and its learning rate are the detector's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ppal_backend.detector.heads.base import Restore, override
from ppal_backend.detector.infer.embeddings import mean_over_images
from ppal_backend.detector.rivals import Read
from ppal_backend.errors import DetectorError

WIDTH = 128
MARGIN = 1.0
WEIGHT = 1.0
FREE_AFTER = 0.6
"""Share of the training after which the module's gradient stays in the module: 120 of the paper's 200 epochs."""
_MODULE = "loss_predictor"

Call = tuple[Any, str, tuple[Any, ...]]
"""A head, the name of its method that computes a loss, and what that was called with."""


class LossPredictor(torch.nn.Module):
    """Predicts the loss of each image from the means of its feature maps.

    Args:
        channels: Channels of each map.
        width: Units of each map's layer.
    """

    def __init__(self, channels: Sequence[int], width: int = WIDTH) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(count, width) for count in channels)
        self.last = torch.nn.Linear(width * len(channels), 1)

    def forward(self, means: Sequence[torch.Tensor]) -> torch.Tensor:
        """From ``[N, d_l]`` means of each map to ``[N]`` predicted losses, of any sign: only their order counts."""
        hidden = [layer(mean).relu() for layer, mean in zip(self.layers, means, strict=True)]
        predicted: torch.Tensor = self.last(torch.cat(hidden, 1)).squeeze(1)
        return predicted.float()


def ranking_loss(predicted: torch.Tensor, losses: torch.Tensor, margin: float = MARGIN) -> torch.Tensor:
    """How far the predictions are from ordering each pair of images as their losses do (Eq. 2 and 3).

    ``max(0, margin - s * (p_i - p_j))`` averaged over the pairs (0, 1), (2, 3), …, where s is 1 if the loss of i is
    the larger and -1 otherwise.

    Args:
        predicted: ``[N]`` predicted losses.
        losses: ``[N]`` losses; no gradient goes there.
        margin: Distance from which a pair is in order.

    Returns:
        A scalar >= 0; 0 without a pair.
    """
    pairs = len(predicted) // 2
    first, second = predicted[: 2 * pairs].reshape(pairs, 2).unbind(1)
    higher, lower = losses[: 2 * pairs].detach().reshape(pairs, 2).unbind(1)
    sign = torch.where(higher > lower, 1.0, -1.0)
    return (margin - sign * (first - second)).clamp(min=0).sum() / max(pairs, 1)


@contextmanager
def recorded_losses(detector: Any) -> Iterator[list[Call]]:
    """What the heads of a detector compute their losses from, while it computes them."""
    calls: list[Call] = []
    restores = [_record(head, method, calls) for head, method in _losses_of(detector)]
    try:
        yield calls
    finally:
        for restore in restores:
            restore()


def _losses_of(detector: Any) -> list[tuple[Any, str]]:
    """Each head of a detector and the method that computes its loss."""
    if not hasattr(detector, "roi_head"):
        return [(detector.bbox_head, "loss_by_feat")]
    heads = detector.roi_head.bbox_head
    stages = list(heads) if isinstance(heads, torch.nn.ModuleList) else [heads]
    return [(detector.rpn_head, "loss_by_feat"), *((head, "loss_and_target") for head in stages)]


def _record(head: Any, method: str, calls: list[Call]) -> Restore:
    compute, signature = getattr(head, method), inspect.signature(getattr(type(head), method))

    def computing(*args: Any, **kwargs: Any) -> Any:
        calls.append((head, method, signature.bind(head, *args, **kwargs).args[1:]))
        return compute(*args, **kwargs)

    return override(head, **{method: computing})


@torch.no_grad()
def image_losses(calls: Sequence[Call], images: int) -> torch.Tensor:
    """The loss of each image of a batch, by the heads' own methods on its part of their outputs.

    Nothing but the losses is computed again: no statistics of the detector move, and what a head counts from step to
    step (DDOD does) stays. What was put in place of the heads'
    methods for one training, such as the reader of class difficulties, is not called.

    Args:
        calls: From :func:`recorded_losses`.
        images: N.

    Returns:
        ``[N]`` float32 >= 0.
    """
    totals = []
    for image in range(images):
        parts = []
        for head, method, args in calls:
            own = _box_arguments(args, image) if method == "loss_and_target" else [_of_image(a, image) for a in args]
            with _same_counts(head):
                answer = getattr(type(head), method)(head, *own)
            parts += _losses_in(answer["loss_bbox"] if method == "loss_and_target" else answer)
        totals.append(torch.stack(parts).sum())
    return torch.stack(totals)


@contextmanager
def _same_counts(head: Any) -> Iterator[None]:
    """Put back the lists of a head's attributes, which a loss may count in."""
    before = {name: list(value) for name, value in vars(head).items() if isinstance(value, list)}
    try:
        yield
    finally:
        for name, values in before.items():
            vars(head)[name][:] = values


def _of_image(value: Any, image: int) -> Any:
    """One image's part of an argument: of maps their slice, of one object an image that object."""
    if isinstance(value, torch.Tensor):
        return value[image : image + 1]
    if isinstance(value, list | tuple):
        return [part[image : image + 1] for part in value] if _holds_maps(value) else [value[image]]
    return value


def _holds_maps(value: Sequence[Any]) -> bool:
    return all(isinstance(part, torch.Tensor) for part in value)


def _box_arguments(args: tuple[Any, ...], image: int) -> list[Any]:
    """One image's part of what the loss of a box head takes: rows of its proposals, and its samples."""
    scores, boxes, rois, sampled, *rest = args
    rows = rois[:, 0] == image
    return [scores[rows], boxes[rows], rois[rows], [sampled[image]], *rest]


def _losses_in(answer: dict[str, Any]) -> list[torch.Tensor]:
    """What mmdetection adds up of a dictionary of losses, as scalars."""
    found = [value for name, value in answer.items() if "loss" in name]
    flat = [part for value in found for part in (value if isinstance(value, list | tuple) else [value])]
    return [part.float().mean() for part in flat]


class LearnLossHook(Hook):
    """Adds the ranking loss to the losses of every step.

    Args:
        share: Share of the training after which its gradient stays in the module, in [0, 1].
    """

    def __init__(self, share: float = FREE_AFTER) -> None:
        self._share, self._is_free = share, False
        self._restore: Restore | None = None

    def before_train(self, runner: Any) -> None:
        """Take over the detector's loss."""
        detector = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._restore = override(detector, loss=self._with_ranking(detector))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Note whether the detector still learns from the module; it follows from the step, so it needs no saving."""
        del batch_idx, data_batch
        self._is_free = runner.iter >= self._share * runner.max_iters

    def after_train(self, runner: Any) -> None:
        """Give it back."""
        del runner
        if self._restore is not None:
            self._restore()
            self._restore = None

    def _with_ranking(self, detector: Any) -> Any:
        compute = detector.loss

        def computing(inputs: torch.Tensor, samples: Sequence[Any]) -> dict[str, Any]:
            with recorded_losses(detector) as calls, kept_maps(detector) as kept:
                losses: dict[str, Any] = compute(inputs, samples)
            maps = [level.detach() for level in kept[-1]] if self._is_free else kept[-1]
            predicted = predict_losses(detector, maps, samples)
            return {**losses, "loss_ranking": WEIGHT * ranking_loss(predicted, image_losses(calls, len(samples)))}

        return computing


@contextmanager
def kept_maps(detector: Any) -> Iterator[list[Sequence[torch.Tensor]]]:
    """The maps that the detector's head reads, of every batch that goes through it meanwhile."""
    kept: list[Sequence[torch.Tensor]] = []
    restore = _keep_maps(detector, kept)
    try:
        yield kept
    finally:
        restore()


def _keep_maps(detector: Any, kept: list[Sequence[torch.Tensor]]) -> Restore:
    extract = detector.extract_feat

    def extracting(*args: Any, **kwargs: Any) -> Any:
        maps = extract(*args, **kwargs)
        kept.append(maps)
        return maps

    return override(detector, extract_feat=extracting)


def predict_losses(detector: Any, maps: Sequence[torch.Tensor], samples: Sequence[Any]) -> torch.Tensor:
    """``[N]`` predicted losses of a batch, from its maps and what the samples say of the images' sizes."""
    shapes = [tuple(sample.img_shape[:2]) for sample in samples]
    height, width = samples[0].batch_input_shape
    means = [mean_over_images(level, shapes, (height, width)) for level in maps]
    predicted: torch.Tensor = getattr(detector, _MODULE)(means)
    return predicted


class LearnLoss:
    """The loss prediction module on any detector of the zoo with a dense or a RoI head."""

    name = "learnloss"
    reads_difficulty = True
    learns_from_unlabelled = False

    def change(self, model: dict[str, Any]) -> None:
        """Nothing changes; detectors with queries or a teacher are refused.

        Raises:
            DetectorError: The detector is one of those.
        """
        if not {"bbox_head", "roi_head"} & model.keys() or "encoder" in model:
            raise DetectorError(
                f"expected a detector with a dense or a RoI head for learnloss, got {model['type']}; choose another"
            )

    def attach(self, detector: Any) -> None:
        """Add the module, as wide as the maps that the head reads."""
        head = detector.rpn_head if hasattr(detector, "roi_head") else detector.bbox_head
        channels = head.in_channels
        levels = head.prior_generator.num_levels
        with torch.random.fork_rng(devices=()):  # the detector starts from the random weights that it has without
            module = LossPredictor([channels] * levels if isinstance(channels, int) else channels)
        detector.add_module(_MODULE, module)

    def hooks(self, batch_size: int) -> list[Hook]:
        """The ranking loss.

        Raises:
            DetectorError: A step has no two images to compare.
        """
        if batch_size < 2:
            raise DetectorError(
                f"expected at least 2 images a step for learnloss, which compares them, got {batch_size}; raise the "
                f"batch_size of the detector's schedule in zoo.toml"
            )
        return [LearnLossHook()]

    def watch(self, detector: Any) -> tuple[Restore, Read]:
        """Keep the maps of a batch; the utility of an image is its predicted loss."""
        kept: list[Sequence[torch.Tensor]] = []

        def read(samples: Sequence[Any]) -> torch.Tensor:
            with torch.no_grad():
                return predict_losses(detector, kept[-1], samples)[:, None]

        return _keep_maps(detector, kept), read
