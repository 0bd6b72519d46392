"""ATSS, and DDOD, which assigns classification and localisation apart: the classification assigner counts."""

from __future__ import annotations

from typing import Any

import torch

from ppal_backend.detector.heads.base import Cells
from ppal_backend.detector.heads.dense import DenseFamily


class ATSSFamily(DenseFamily):
    """``ATSSHead``; its box targets are boxes unless the head says otherwise."""

    name, head_class = "ATSS", "ATSSHead"

    def boxes(
        self, head: Any, level: int, cells: Cells, bbox_pred: torch.Tensor, args: tuple[Any, ...], targets: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Anchors move by the predicted deltas."""
        del args
        anchors, truths = (targets[part][level][cells.image, cells.flat] for part in (0, 3))
        if not self.targets_are_boxes(head):
            truths = head.bbox_coder.decode(anchors, truths)
        return head.bbox_coder.decode(anchors, cells.gather(bbox_pred, 4)), truths

    def targets_are_boxes(self, head: Any) -> bool:
        """As the head says."""
        return bool(head.reg_decoded_bbox)


class DDODFamily(ATSSFamily):
    """``DDODHead``; its box targets are encoded, whatever the head says."""

    name, head_class = "DDOD", "DDODHead"
    targets_method = "get_cls_targets"
    own_methods = ("get_cls_targets", "_get_targets_single", "loss_by_feat")

    def targets_are_boxes(self, head: Any) -> bool:
        """Never."""
        del head
        return False
