"""What every probe shares: the numbers it reports, and a way to wrap a method of one instance only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Restore = Callable[[], None]


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


class Probe(Protocol):
    """Reads the positive predictions of one family of heads while it trains."""

    family: str

    def covers(self, head: torch.nn.Module) -> bool:
        """Whether this probe reads this head right."""

    def attach(self, head: torch.nn.Module, sink: Sink) -> Restore:
        """Report to ``sink`` once a loss computation; the returned function detaches again."""


def override(instance: Any, name: str, value: Any) -> Restore:
    """Replace a method or attribute on one instance; the returned function puts back what was there."""
    missing = object()
    before = instance.__dict__.get(name, missing)
    instance.__dict__[name] = value

    def restore() -> None:
        if before is missing:
            instance.__dict__.pop(name, None)
        else:
            instance.__dict__[name] = before

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


def report_after_loss(
    head: Any,
    targets_name: str,
    sink: Sink,
    positives: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], tuple[Any, ...], Any], Positives],
) -> Restore:
    """Wrap a dense head's target method to keep what it returns, and its loss to report afterwards.

    Args:
        head: Dense head whose ``loss_by_feat`` starts with class scores and box predictions per level.
        targets_name: Method that computes targets.
        sink: Takes the positives of every loss computation.
        positives: Called with class scores, box predictions, the arguments of the target method and its result.
    """

    def report(kept: Kept, cls_scores: Any, bbox_preds: Any, *_rest: Any) -> None:
        for target_args, targets in kept:
            sink(positives(cls_scores, bbox_preds, target_args, targets))

    return keep_targets_until_after_loss(head, targets_name, report)


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

    undo = (override(head, targets_name, keeping), override(head, "loss_by_feat", reporting))

    def restore() -> None:
        for step in undo:
            step()

    return restore
