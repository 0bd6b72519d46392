"""ATSS, and DDOD, which assigns classification and localisation apart: the classification assigner counts."""

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


class ATSSProbe:
    """Reads ``ATSSHead``; its box targets are boxes unless the head says otherwise."""

    family = "ATSS"

    def covers(self, head: torch.nn.Module) -> bool:
        """Heads with ATSS's own targets and loss; PAA, TOOD and others that differ are refused."""
        return {
            provider(head, name)
            for name in ("get_targets", "_get_targets_single", "loss_by_feat", "loss_by_feat_single")
        } == {"ATSSHead"}

    def attach(self, head: Any, sink: Sink) -> Restore:
        """Keep the targets that the loss computes, and report after the loss."""

        def positives(cls_scores: Any, bbox_preds: Any, args: tuple[Any, ...], targets: Any) -> Positives:
            return _positives(head, cls_scores, bbox_preds, targets, head.reg_decoded_bbox)

        return report_after_loss(head, "get_targets", sink, positives)


class DDODProbe:
    """Reads ``DDODHead``; its box targets are encoded."""

    family = "DDOD"

    def covers(self, head: torch.nn.Module) -> bool:
        """Heads with DDOD's own targets and loss."""
        return {provider(head, name) for name in ("get_cls_targets", "_get_targets_single", "loss_by_feat")} == {
            "DDODHead"
        }

    def attach(self, head: Any, sink: Sink) -> Restore:
        """Keep the targets of the classification assigner, and report after the loss."""

        def positives(cls_scores: Any, bbox_preds: Any, args: tuple[Any, ...], targets: Any) -> Positives:
            return _positives(head, cls_scores, bbox_preds, targets, decoded=False)

        return report_after_loss(head, "get_cls_targets", sink, positives)


def _positives(head: Any, cls_scores: Any, bbox_preds: Any, targets: Any, decoded: bool) -> Positives:
    anchors_list, labels_list, _, box_targets_list = targets[:4]
    parts = []
    for level, labels in enumerate(labels_list):
        cells = positive_cells(labels, cls_scores[level], head.num_classes)
        if not len(cells.flat):
            continue
        anchors = anchors_list[level][cells.image, cells.flat]
        box_targets = box_targets_list[level][cells.image, cells.flat]
        if not decoded:
            box_targets = head.bbox_coder.decode(anchors, box_targets)
        boxes = head.bbox_coder.decode(anchors, cells.gather(bbox_preds[level], 4))
        logits = cells.gather(cls_scores[level], head.cls_out_channels)
        probabilities = class_probability(logits, cells.labels, head.use_sigmoid_cls)
        parts.append(Positives(cells.labels, probabilities, aligned_iou(boxes, box_targets)))
    return concatenate(parts, cls_scores[0].device)
