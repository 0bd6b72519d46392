"""FCOS: predictions and targets are distances to the four sides, so overlap needs no position."""

from __future__ import annotations

from typing import Any

import torch

from ppal_backend.detector.heads.base import Cells
from ppal_backend.detector.heads.dense import DenseFamily


class FCOSFamily(DenseFamily):
    """``FCOSHead``. Prediction and target of a point share their unit (pixels or strides)."""

    name, head_class = "FCOS", "FCOSHead"
    labels_at = 0
    own_methods = ("get_targets", "_get_targets_single", "loss_by_feat")

    def boxes(
        self, head: Any, level: int, cells: Cells, bbox_pred: torch.Tensor, args: tuple[Any, ...], targets: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes around (0, 0): overlap does not depend on where both are."""
        del head, args
        wanted = targets[1][level].reshape(len(bbox_pred), -1, 4)[cells.image, cells.flat]
        return _around_origin(cells.gather(bbox_pred, 4)), _around_origin(wanted)


def _around_origin(distances: torch.Tensor) -> torch.Tensor:
    """Left, top, right, bottom distances as a box around (0, 0)."""
    return torch.cat([-distances[:, :2], distances[:, 2:]], dim=1)
