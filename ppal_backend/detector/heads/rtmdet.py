"""RTMDet: the head decodes its boxes before it assigns them, so overlap is read off directly."""

from __future__ import annotations

from typing import Any

import torch

from ppal_backend.detector.heads.base import Cells
from ppal_backend.detector.heads.dense import DenseFamily


class RTMDetFamily(DenseFamily):
    """``RTMDetHead`` and its variant with separate batch norms."""

    name, head_class = "RTMDet", "RTMDetHead"

    def boxes(
        self, head: Any, level: int, cells: Cells, bbox_pred: torch.Tensor, args: tuple[Any, ...], targets: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The decoded boxes of all levels, one after the other, are what targets are computed from."""
        del head, bbox_pred
        decoded, labels = args[1].detach(), targets[self.labels_at]
        start = sum(of_level.shape[1] for of_level in labels[:level])
        return decoded[cells.image, start + cells.flat], targets[3][level][cells.image, cells.flat]
