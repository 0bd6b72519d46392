"""RTMDet: the head decodes its boxes before it assigns them, so overlap is read off directly."""

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


class RTMDetProbe:
    """Reads ``RTMDetHead`` and its variant with separate batch norms."""

    family = "RTMDet"

    def covers(self, head: torch.nn.Module) -> bool:
        """Heads with RTMDet's own targets and loss; the instance-segmentation head differs."""
        return {
            provider(head, name)
            for name in ("get_targets", "_get_targets_single", "loss_by_feat", "loss_by_feat_single")
        } == {"RTMDetHead"}

    def attach(self, head: Any, sink: Sink) -> Restore:
        """Keep decoded boxes and targets of the loss, and report after it."""

        def positives(cls_scores: Any, bbox_preds: Any, args: tuple[Any, ...], targets: Any) -> Positives:
            return _positives(head, cls_scores, args[1], targets)

        return report_after_loss(head, "get_targets", sink, positives)


def _positives(head: Any, cls_scores: Any, decoded: torch.Tensor, targets: Any) -> Positives:
    _, labels_list, _, box_targets_list = targets[:4]
    parts, start = [], 0
    for level, labels in enumerate(labels_list):
        cells = positive_cells(labels, cls_scores[level], head.num_classes)
        if len(cells.flat):
            boxes = decoded.detach()[cells.image, start + cells.flat]
            box_targets = box_targets_list[level][cells.image, cells.flat]
            logits = cells.gather(cls_scores[level], head.cls_out_channels)
            probabilities = class_probability(logits, cells.labels, sigmoid=True)
            parts.append(Positives(cells.labels, probabilities, aligned_iou(boxes, box_targets)))
        start += labels.shape[1]
    return concatenate(parts, cls_scores[0].device)
