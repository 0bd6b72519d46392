"""Anchor heads (RetinaNet and SSD), whether or not their loss works on decoded boxes."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.structures.bbox import get_box_tensor

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


class AnchorProbe:
    """Reads heads whose targets are ``AnchorHead``'s: RetinaNet and SSD."""

    family = "anchor (RetinaNet, SSD)"

    def covers(self, head: torch.nn.Module) -> bool:
        """Heads whose targets come from ``AnchorHead`` and whose loss is its own or SSD's."""
        targets = (provider(head, "get_targets"), provider(head, "_get_targets_single"))
        loss = (provider(head, "loss_by_feat"), provider(head, "loss_by_feat_single"))
        return targets == ("AnchorHead", "AnchorHead") and loss in {
            ("AnchorHead", "AnchorHead"),
            ("SSDHead", "SSDHead"),
        }

    def attach(self, head: Any, sink: Sink) -> Restore:
        """Keep the targets that the loss computes, and report after the loss."""

        def positives(cls_scores: Any, bbox_preds: Any, args: tuple[Any, ...], targets: Any) -> Positives:
            return _positives(head, cls_scores, bbox_preds, args[0], targets)

        return report_after_loss(head, "get_targets", sink, positives)


def _positives(head: Any, cls_scores: Any, bbox_preds: Any, anchor_list: Any, targets: Any) -> Positives:
    labels_list, _, box_targets_list = targets[:3]
    parts = []
    for level, labels in enumerate(labels_list):
        cells = positive_cells(labels, cls_scores[level], head.num_classes)
        if not len(cells.flat):
            continue
        logits = cells.gather(cls_scores[level], head.cls_out_channels)
        deltas = cells.gather(bbox_preds[level], head.bbox_coder.encode_size)
        anchors = torch.stack([get_box_tensor(levels[level]) for levels in anchor_list])[cells.image, cells.flat]
        box_targets = box_targets_list[level][cells.image, cells.flat]
        if not head.reg_decoded_bbox:
            box_targets = get_box_tensor(head.bbox_coder.decode(anchors, box_targets))
        boxes = get_box_tensor(head.bbox_coder.decode(anchors, deltas))
        probabilities = class_probability(logits, cells.labels, head.use_sigmoid_cls)
        parts.append(Positives(cells.labels, probabilities, aligned_iou(boxes, box_targets)))
    return concatenate(parts, cls_scores[0].device)
