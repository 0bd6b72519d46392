"""GFL: boxes come from a distribution over distances, in units of the level's stride."""

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


class GFLProbe:
    """Reads ``GFLHead``."""

    family = "GFL"

    def covers(self, head: torch.nn.Module) -> bool:
        """Heads with GFL's own targets and loss; distillation heads that differ are refused."""
        return {
            provider(head, name)
            for name in ("get_targets", "_get_targets_single", "loss_by_feat", "loss_by_feat_single")
        } == {"GFLHead"}

    def attach(self, head: Any, sink: Sink) -> Restore:
        """Keep the targets that the loss computes, and report after the loss."""

        def positives(cls_scores: Any, bbox_preds: Any, args: tuple[Any, ...], targets: Any) -> Positives:
            return _positives(head, cls_scores, bbox_preds, targets)

        return report_after_loss(head, "get_targets", sink, positives)


def _positives(head: Any, cls_scores: Any, bbox_preds: Any, targets: Any) -> Positives:
    anchors_list, labels_list, _, box_targets_list = targets[:4]
    parts = []
    for level, labels in enumerate(labels_list):
        cells = positive_cells(labels, cls_scores[level], head.num_classes)
        if not len(cells.flat):
            continue
        stride = head.prior_generator.strides[level][0]
        centres = head.anchor_center(anchors_list[level][cells.image, cells.flat]) / stride
        distances = head.integral(cells.gather(bbox_preds[level], 4 * (head.reg_max + 1)))
        boxes = head.bbox_coder.decode(centres, distances)
        box_targets = box_targets_list[level][cells.image, cells.flat] / stride
        logits = cells.gather(cls_scores[level], head.cls_out_channels)
        probabilities = class_probability(logits, cells.labels, sigmoid=True)
        parts.append(Positives(cells.labels, probabilities, aligned_iou(boxes, box_targets)))
    return concatenate(parts, cls_scores[0].device)
