"""Contextual diversity: images compared by how their predictions of each class are mixed up with other classes.

Source: Agarwal, Arora, Anand and Arora, "Contextual Diversity for Active Learning", ECCV 2020, Eq. 2 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ppal_backend.acquisition.arrays import as_tensor
from ppal_backend.acquisition.ccms.objects import kl_features
from ppal_backend.acquisition.distances import anchors_behind
from ppal_backend.acquisition.selection import Compare, Comparison
from ppal_backend.acquisition.uncertainty import BoxFilter, softmax_uncertainty
from ppal_backend.structures import Detections, QueryContext


def class_mixtures(detections: Detections, boxes: BoxFilter) -> dict[int, torch.Tensor]:
    """Entropy-weighted mean prediction of the boxes of each predicted class.

    Args:
        detections: One image. Rows of ``class_probs`` are normalised to sum 1 (they need it for sigmoid heads).
        boxes: Which boxes count.

    Returns:
        Class index to ``[k]`` float64 distribution; empty without boxes.

    Raises:
        ValueError: There are boxes but no ``class_probs``.
    """
    rows = boxes.valid_rows(detections)
    if not len(rows):
        return {}
    if detections.class_probs is None:
        raise ValueError(
            f"expected class_probs with shape ({len(detections)}, k) for contextual diversity, got None for image "
            f"{detections.image_id}; ask the inference for probabilities"
        )
    probs = as_tensor(detections.class_probs)[rows].double().cpu().clamp(min=1e-6)
    probs = probs / probs.sum(1, keepdim=True)
    weights = softmax_uncertainty(probs).clamp(min=1e-12)
    classes = as_tensor(detections.class_indices)[rows].cpu()
    mixed = {}
    for cls in torch.unique(classes).tolist():
        part = classes == cls
        mixed[cls] = (weights[part, None] * probs[part]).sum(0) / weights[part].sum()
    return mixed


class ContextDistances:
    """Sum over the classes that both images predict of the mean KL divergence of their mixtures, both ways.

    As the paper defines it, images that share no class have distance 0.

    Args:
        mixtures: Class mixtures of N images.
    """

    def __init__(self, mixtures: Sequence[dict[int, torch.Tensor]]) -> None:
        self.device = torch.device("cpu")
        self._count = len(mixtures)
        self._classes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for cls in sorted({c for m in mixtures for c in m}):
            members = [k for k, m in enumerate(mixtures) if cls in m]
            left, right = kl_features(torch.stack([mixtures[k][cls] for k in members]))
            self._classes.append((torch.as_tensor(members), left, right))

    def __len__(self) -> int:
        return self._count

    def rows(self, indices: Any) -> torch.Tensor:
        """Distances ``[k, N]`` of some images to all."""
        return self.block(indices, torch.arange(self._count))

    def block(self, rows: Any, columns: Any) -> torch.Tensor:
        """Distances ``[k, l]`` of some images to some others."""
        index, others = (as_tensor(v).long().reshape(-1) for v in (rows, columns))
        result = torch.zeros(len(index), len(others))
        for members, left, right in self._classes:
            mine, at_row = self._local(members, index)
            theirs, at_column = self._local(members, others)
            if len(mine) and len(theirs):
                divergence = (left[mine] @ right[theirs].T).mul_(-0.5).clamp_(min=0.0)
                result[at_row[:, None], at_column[None, :]] += divergence
        return result.masked_fill_(index[:, None] == others[None, :], 0.0)

    def _local(self, members: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of ``members`` among the images asked for, and where those stand in ``index``."""
        place = torch.full((self._count,), -1, dtype=torch.long)
        place[members] = torch.arange(len(members))
        found = place[index]
        at = torch.nonzero(found >= 0)[:, 0]
        return found[at], at


def compare_context(boxes: BoxFilter) -> Compare:
    """Compare candidates, and labelled images that have probabilities, by contextual diversity."""

    def compare(context: QueryContext, candidates: Sequence[int]) -> Comparison:
        mine = [class_mixtures(context.pool[p], boxes) for p in candidates]
        labelled = {d.image_id: class_mixtures(d, boxes) for d in context.labelled if d.class_probs is not None}
        anchors = anchors_behind(ContextDistances([*mine, *labelled.values()]), len(mine), list(labelled))
        return Comparison(ContextDistances(mine), anchors, None)

    return compare
