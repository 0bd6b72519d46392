"""What the families of heads share: what each can do, what it reports, and how a method of one instance is wrapped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ppal_backend.errors import DetectorError

Restore = Callable[[], None]

EXTRA_FIELDS = ("ppal_boxes", "ppal_levels", "ppal_probs")
EMBEDDING_FIELD = "ppal_embeddings"  # only of heads that describe a detection themselves
COUNT_FIELD = "ppal_counts"  # only where they are asked for, of heads that suppress boxes
NO_LEVEL = -1
_ROWS_AT_ONCE = 256
_USUAL_THRESHOLD = 0.5


@dataclass(frozen=True)
class Positives:
    """Positive predictions of one training step.

    Args:
        class_indices: ``[n]`` int64, the assigned ground-truth class of each, 0..C-1.
        probabilities: ``[n]`` float in [0, 1], the predicted probability of that class.
        ious: ``[n]`` float in [0, 1], overlap of the decoded predicted box with its ground-truth box.
    """

    class_indices: torch.Tensor
    probabilities: torch.Tensor
    ious: torch.Tensor

    def __post_init__(self) -> None:
        if not self.class_indices.shape == self.probabilities.shape == self.ious.shape or self.ious.ndim != 1:
            raise ValueError(
                f"expected three tensors of one shape (n,), got {tuple(self.class_indices.shape)}, "
                f"{tuple(self.probabilities.shape)} and {tuple(self.ious.shape)}"
            )


Sink = Callable[[Positives], None]


class HeadFamily(Protocol):
    """Detectors whose heads compute alike: reads their training difficulty and traces their predictions in one pass."""

    name: str

    def covers_training(self, head: torch.nn.Module) -> bool:
        """Whether the training of this head is read right."""

    def read_training(self, head: torch.nn.Module, sink: Sink) -> Restore:
        """Report the positives of every loss computation to ``sink``; the returned function detaches again."""

    def covers_inference(self, detector: Any) -> bool:
        """Whether the predictions of this detector are traced right."""

    def trace_inference(self, detector: Any, count: bool = False) -> Restore:
        """Make predictions carry more fields until the returned function restores the detector.

        They are ``ppal_boxes`` (pixels of the network input), ``ppal_levels`` (pyramid level) and ``ppal_probs``
        (class probabilities); ``ppal_embeddings`` where the detector itself describes a detection by a vector; and,
        of heads that suppress boxes and with ``count``, ``ppal_counts``: how many boxes each detection stands for.
        """

    def is_softmax(self, detector: Any) -> bool:
        """Whether probabilities are a softmax over C + 1 classes, background last."""


def override(instance: Any, **values: Any) -> Restore:
    """Replace methods or attributes of one instance; the returned function puts back what was there."""
    missing = object()
    before = {name: instance.__dict__.get(name, missing) for name in values}
    instance.__dict__.update(values)

    def restore() -> None:
        for name, value in before.items():
            if value is missing:
                instance.__dict__.pop(name, None)
            else:
                instance.__dict__[name] = value

    return restore


def provider(head: object, name: str) -> str:
    """Name of the class that gives ``head`` its method, so that a subclass with its own version is told apart."""
    for cls in type(head).__mro__:
        if name in cls.__dict__:
            return cls.__name__
    return ""


def aligned_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Overlap of boxes in pairs.

    Args:
        boxes: ``[n, 4]`` as x1, y1, x2, y2.
        others: ``[n, 4]`` in the same frame.

    Returns:
        ``[n]`` in [0, 1]; 0 where both boxes have no area.
    """
    low = torch.maximum(boxes[:, :2], others[:, :2])
    high = torch.minimum(boxes[:, 2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) + (others[:, 2:] - others[:, :2]).clamp(min=0).prod(1)
    union = areas - shared
    return torch.where(union > 0, shared / union.clamp(min=torch.finfo(union.dtype).tiny), 0.0).clamp(0, 1)


@dataclass(frozen=True)
class Cells:
    """Where the positives of one pyramid level sit: image, row, column and anchor of each, ``[n]`` each."""

    image: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    anchor: torch.Tensor
    flat: torch.Tensor
    labels: torch.Tensor

    def gather(self, feature_map: torch.Tensor, width: int) -> torch.Tensor:
        """Take ``width`` channels of each positive's anchor from ``[N, anchors * width, H, W]``: ``[n, width]``."""
        images, _, rows, columns = feature_map.shape
        split = feature_map.detach().view(images, -1, width, rows, columns)
        return split[self.image, self.anchor, :, self.row, self.column]


def positive_cells(labels: torch.Tensor, feature_map: torch.Tensor, num_classes: int) -> Cells:
    """Find the positives of a level.

    Args:
        labels: ``[N, H * W * A]`` class of every anchor, ``num_classes`` for background, anchors fastest.
        feature_map: Any map of the level, ``[N, channels, H, W]``.
        num_classes: C.
    """
    images, _, rows, columns = feature_map.shape
    labels = labels.reshape(images, -1)
    anchors = labels.shape[1] // (rows * columns)
    image, flat = ((labels >= 0) & (labels < num_classes)).nonzero(as_tuple=True)
    cell = flat // anchors
    return Cells(image, cell // columns, cell % columns, flat % anchors, flat, labels[image, flat])


def class_probability(logits: torch.Tensor, labels: torch.Tensor, sigmoid: bool) -> torch.Tensor:
    """Probability of each row's own class, ``[n]``, from ``[n, C]`` sigmoid or ``[n, C + 1]`` softmax logits."""
    chosen = labels[:, None]
    if sigmoid:
        return logits.gather(1, chosen).squeeze(1).sigmoid()
    return logits.softmax(1).gather(1, chosen).squeeze(1)


def concatenate(parts: list[Positives], device: torch.device) -> Positives:
    """Join the positives of all levels."""
    if not parts:
        nothing = torch.zeros(0, device=device)
        return Positives(nothing.long(), nothing, nothing)
    return Positives(
        torch.cat([part.class_indices for part in parts]),
        torch.cat([part.probabilities for part in parts]),
        torch.cat([part.ious for part in parts]),
    )


Kept = list[tuple[tuple[Any, ...], Any]]
"""Arguments and result of every call of a target method, in order."""


def keep_targets_until_after_loss(head: Any, targets_name: str, report: Callable[..., None]) -> Restore:
    """Wrap a head's target method to keep each call's arguments and result, and its loss to hand them over.

    Args:
        head: Head with ``loss_by_feat``.
        targets_name: Method that computes targets.
        report: Called without gradients after every loss, with what was kept during it and the loss's own arguments.
    """
    compute_targets, loss_by_feat = getattr(head, targets_name), head.loss_by_feat
    kept: Kept = []

    def keeping(*args: Any, **kwargs: Any) -> Any:
        targets = compute_targets(*args, **kwargs)
        kept.append((args, targets))
        return targets

    def reporting(*args: Any, **kwargs: Any) -> Any:
        kept.clear()
        losses = loss_by_feat(*args, **kwargs)
        with torch.no_grad():
            report(kept, *args)
        kept.clear()
        return losses

    return override(head, **{targets_name: keeping, "loss_by_feat": reporting})


def require_same_selection(head: Any, scores: torch.Tensor, repeated: torch.Tensor) -> None:
    """Compare the scores of a head's predictions with those of the selection that was repeated to trace it.

    Raises:
        DetectorError: They differ, and with them what each row of the trace belongs to.
    """
    if not torch.equal(scores, repeated):
        raise DetectorError(
            f"the selection of {type(head).__name__} differs from mmdet's usual one; it cannot be traced in one pass"
        )


def count_supporters(
    kept: torch.Tensor, kept_labels: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, threshold: float
) -> torch.Tensor:
    """How many boxes before suppression belong to each box that survived it, itself included.

    Args:
        kept: ``[k, 4]`` boxes after suppression.
        kept_labels: ``[k]`` their classes.
        boxes: ``[n, 4]`` boxes before suppression, in the same frame; all of ``kept`` are among them.
        labels: ``[n]`` their classes.
        threshold: Overlap above which suppression takes two boxes of one class for the same object.

    Returns:
        ``[k]`` int64, at least 1: boxes of the same class that overlap by more than ``threshold``.
    """
    left, top, right, bottom = boxes.float().T.contiguous()
    share = threshold / (1 + threshold)  # s / (a + b - s) > t is s > t / (1 + t) * (a + b)
    least = share * (right - left) * (bottom - top)
    counts = []
    for some, own in zip(kept.float().split(_ROWS_AT_ONCE), kept_labels.split(_ROWS_AT_ONCE), strict=True):
        x1, y1, x2, y2 = some.T.unsqueeze(2)  # [k, 1] each: planes of [k, n] are faster than pairs in a last axis
        shared = (torch.minimum(x2, right).sub_(torch.maximum(x1, left))).clamp_(min=0)
        shared *= (torch.minimum(y2, bottom).sub_(torch.maximum(y1, top))).clamp_(min=0)
        together = shared > least + share * (x2 - x1) * (y2 - y1)
        together &= own[:, None] == labels
        counts.append(together.sum(1))
    return torch.cat(counts).clamp_(min=1)


def traced_suppression(
    results: Any, values: tuple[torch.Tensor, ...], cfg: Any, suppress: Callable[[], Any], count: bool
) -> Any:
    """Suppress by a head's own rule, then give what is left its part of a trace.

    Only a row number travels through the suppression, so that it costs next to nothing.

    Args:
        results: The head's predictions before suppression.
        values: Boxes of the network input, levels and probabilities of each.
        cfg: The head's test configuration; without ``nms`` nothing is counted.
        suppress: The head's own post-processing of ``results``.
        count: Whether to count the boxes that each one stands for.
    """
    boxes, labels = values[0], results.labels
    results.ppal_rows = torch.arange(len(boxes), device=boxes.device)
    kept = suppress()
    rows = kept.pop("ppal_rows")
    for name, value in zip(EXTRA_FIELDS, values, strict=True):
        kept.set_field(value[rows], name)
    if count and cfg.get("nms") is not None:
        threshold = cfg.nms.get("iou_threshold", _USUAL_THRESHOLD)
        kept.set_field(count_supporters(boxes[rows], kept.labels, boxes, labels, threshold), COUNT_FIELD)
    return kept
