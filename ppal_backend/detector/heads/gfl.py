"""GFL: boxes come from a distribution over distances, in units of the level's stride."""

from __future__ import annotations

from typing import Any

import torch

from ppal_backend.detector.heads.base import Cells
from ppal_backend.detector.heads.dense import DenseFamily


class GFLFamily(DenseFamily):
    """``GFLHead``."""

    name, head_class = "GFL", "GFLHead"

    def boxes(
        self, head: Any, level: int, cells: Cells, bbox_pred: torch.Tensor, args: tuple[Any, ...], targets: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of the predicted distributions, and targets, in strides of the level."""
        del args
        stride = head.prior_generator.strides[level][0]
        anchors, truths = (targets[part][level][cells.image, cells.flat] for part in (0, 3))
        distances = head.integral(cells.gather(bbox_pred, 4 * (head.reg_max + 1)))
        return head.bbox_coder.decode(head.anchor_center(anchors) / stride, distances), truths / stride
