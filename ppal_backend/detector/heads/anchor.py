"""Anchor heads (RetinaNet and SSD), whether or not their loss works on decoded boxes."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.structures.bbox import get_box_tensor

from ppal_backend.detector.heads.base import Cells, provider
from ppal_backend.detector.heads.dense import DenseFamily


class AnchorFamily(DenseFamily):
    """Heads whose targets are ``AnchorHead``'s and whose loss is its own or SSD's."""

    name = "anchor (RetinaNet, SSD)"
    labels_at = 0

    def covers_training(self, head: torch.nn.Module) -> bool:
        """Heads whose targets come from ``AnchorHead`` and whose loss is its own or SSD's."""
        targets = (provider(head, "get_targets"), provider(head, "_get_targets_single"))
        loss = (provider(head, "loss_by_feat"), provider(head, "loss_by_feat_single"))
        return targets == ("AnchorHead", "AnchorHead") and loss in {
            ("AnchorHead", "AnchorHead"),
            ("SSDHead", "SSDHead"),
        }

    def boxes(
        self, head: Any, level: int, cells: Cells, bbox_pred: torch.Tensor, args: tuple[Any, ...], targets: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Anchors move by the predicted deltas; targets are deltas too, unless the loss works on decoded boxes."""
        deltas = cells.gather(bbox_pred, head.bbox_coder.encode_size)
        anchors = torch.stack([get_box_tensor(levels[level]) for levels in args[0]])[cells.image, cells.flat]
        truths = targets[2][level][cells.image, cells.flat]
        if not head.reg_decoded_bbox:
            truths = get_box_tensor(head.bbox_coder.decode(anchors, truths))
        return get_box_tensor(head.bbox_coder.decode(anchors, deltas)), truths
