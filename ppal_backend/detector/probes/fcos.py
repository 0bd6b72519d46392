"""FCOS: predictions and targets are distances to the four sides, so overlap needs no position."""

from __future__ import annotations

from typing import Any

import torch

from ppal_backend.detector.probes.base import (
    Positives,
    Restore,
    Sink,
    aligned_iou,
    class_probability,
    concatenate,
    positive_cells,
    provider,
    report_after_loss,
)


class FCOSProbe:
    """Reads ``FCOSHead``. Prediction and target of a point share their unit (pixels or strides)."""

    family = "FCOS"

    def covers(self, head: torch.nn.Module) -> bool:
        """Heads with FCOS's own targets and loss."""
        return {provider(head, name) for name in ("get_targets", "_get_targets_single", "loss_by_feat")} == {"FCOSHead"}

    def attach(self, head: Any, sink: Sink) -> Restore:
        """Keep the targets that the loss computes, and report after the loss."""

        def positives(cls_scores: Any, bbox_preds: Any, args: tuple[Any, ...], targets: Any) -> Positives:
            return _positives(head, cls_scores, bbox_preds, targets)

        return report_after_loss(head, "get_targets", sink, positives)


def _positives(head: Any, cls_scores: Any, bbox_preds: Any, targets: Any) -> Positives:
    labels_list, distances_list = targets
    parts = []
    for level, labels in enumerate(labels_list):
        cells = positive_cells(labels, cls_scores[level], head.num_classes)
        if not len(cells.flat):
            continue
        wanted = distances_list[level].reshape(len(cls_scores[level]), -1, 4)[cells.image, cells.flat]
        logits = cells.gather(cls_scores[level], head.cls_out_channels)
        boxes = _around_origin(cells.gather(bbox_preds[level], 4))
        probabilities = class_probability(logits, cells.labels, head.use_sigmoid_cls)
        parts.append(Positives(cells.labels, probabilities, aligned_iou(boxes, _around_origin(wanted))))
    return concatenate(parts, cls_scores[0].device)


def _around_origin(distances: torch.Tensor) -> torch.Tensor:
    """Left, top, right, bottom distances as a box around (0, 0)."""
    return torch.cat([-distances[:, :2], distances[:, 2:]], dim=1)
