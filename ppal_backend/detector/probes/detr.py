"""DETR and its relatives: the matching of the last decoder layer decides; denoising queries do not count."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy

from ppal_backend.detector.probes.base import (
    Kept,
    Positives,
    Restore,
    Sink,
    aligned_iou,
    class_probability,
    keep_targets_until_after_loss,
    provider,
)

_LOSSES = ("DETRHead", "DeformableDETRHead", "DINOHead")


class DETRProbe:
    """Reads ``DETRHead``, ``DeformableDETRHead`` and ``DINOHead``.

    The head asks for the targets of its matching queries once a decoder layer, in order, then perhaps once for
    the proposals of its encoder. The call that belongs to the last decoder layer counts.
    """

    family = "DETR (DETR, Deformable DETR, DINO)"

    def covers(self, head: torch.nn.Module) -> bool:
        """Heads with DETR's own matching and a loss whose calls come in the known order."""
        matching = {provider(head, name) for name in ("get_targets", "_get_targets_single", "loss_by_feat_single")}
        return matching == {"DETRHead"} and provider(head, "loss_by_feat") in _LOSSES

    def attach(self, head: Any, sink: Sink) -> Restore:
        """Keep the targets of every decoder layer, and report those of the last one after the loss."""

        def report(kept: Kept, cls_scores: Any, *_rest: Any) -> None:
            sink(_positives(head, *kept[len(cls_scores) - 1]))

        return keep_targets_until_after_loss(head, "get_targets", report)


def _positives(head: Any, args: tuple[Any, ...], targets: Any) -> Positives:
    logits, boxes = torch.cat(args[0]).detach(), torch.cat(args[1]).detach()
    labels, box_targets = torch.cat(targets[0]), torch.cat(targets[2])
    matched = (labels >= 0) & (labels < head.num_classes)
    labels = labels[matched]
    probabilities = class_probability(logits[matched], labels, head.loss_cls.use_sigmoid)
    # both are shares of the image's sides: overlap does not depend on the scale of the axes
    ious = aligned_iou(bbox_cxcywh_to_xyxy(boxes[matched]), bbox_cxcywh_to_xyxy(box_targets[matched]))
    return Positives(labels, probabilities, ious)
