"""What every tracer offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ppal_backend.detector.probes.base import Restore

EXTRA_FIELDS = ("ppal_boxes", "ppal_levels", "ppal_probs")
EMBEDDING_FIELD = "ppal_embeddings"  # only of heads that describe a detection themselves
COUNT_FIELD = "ppal_counts"  # only where they are asked for, of heads that suppress boxes
NO_LEVEL = -1
_ROWS_AT_ONCE = 256
_USUAL_THRESHOLD = 0.5


class Tracer(Protocol):
    """Makes one family of detectors report levels and probabilities with its predictions."""

    family: str

    def covers(self, detector: Any) -> bool:
        """Whether this tracer reads this detector right."""

    def is_softmax(self, detector: Any) -> bool:
        """Whether probabilities are a softmax over C + 1 classes, background last."""

    def attach(self, detector: Any) -> Restore:
        """Start tracing; the returned function restores the detector."""


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
