"""Where selection gets distances from: a matrix, or an object that computes the rows and blocks asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from ppal_backend.acquisition.arrays import as_tensor, require_finite
from ppal_backend.acquisition.ccms import Similarity

_ANCHOR_BATCH = 256


@runtime_checkable
class Distances(Protocol):
    """Symmetric distances >= 0 of N items with zero diagonal."""

    device: torch.device

    def __len__(self) -> int:
        """N."""

    def rows(self, indices: Any) -> torch.Tensor:
        """Distances ``[k, N]`` of some items to all."""

    def block(self, rows: Any, columns: Any) -> torch.Tensor:
        """Distances ``[k, l]`` of some items to some others."""


class DenseDistances:
    """Distances held as a matrix.

    Args:
        matrix: ``[N, N]`` array or tensor, symmetric, >= 0, diagonal 0.

    Raises:
        ValueError: The matrix is not square, not finite, negative, or has a diagonal other than 0.
    """

    def __init__(self, matrix: Any) -> None:
        self.matrix = as_tensor(matrix)
        shape = tuple(self.matrix.shape)
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(f"expected distances with shape (n, n), got {shape}; give a square matrix")
        if not self.matrix.is_floating_point():
            self.matrix = self.matrix.double()
        require_finite(self.matrix, "distances")
        if shape[0] and float(self.matrix.min()) < 0:
            raise ValueError(f"expected distances >= 0, got {float(self.matrix.min())}; pass 2 - similarity")
        if shape[0] and float(self.matrix.diagonal().max()) > 1e-6:
            raise ValueError(
                f"expected distances with diagonal 0, got up to {float(self.matrix.diagonal().max())}; "
                f"pass distances, not similarities"
            )
        self.device = self.matrix.device

    @classmethod
    def trusted(cls, matrix: torch.Tensor) -> DenseDistances:
        """Wrap a floating-point matrix that is known to hold distances, without looking at it."""
        made = cls.__new__(cls)
        made.matrix, made.device = matrix, matrix.device
        return made

    def __len__(self) -> int:
        return len(self.matrix)

    def rows(self, indices: Any) -> torch.Tensor:
        """Distances ``[k, N]`` of some items to all; for a single item a view."""
        index = as_tensor(indices).long().reshape(-1)
        if len(index) == 1:
            return self.matrix[int(index[0])][None]
        return self.matrix[index.to(self.device)]

    def block(self, rows: Any, columns: Any) -> torch.Tensor:
        """Distances ``[k, l]`` of some items to some others."""
        index, others = (as_tensor(v).long().reshape(-1).to(self.device) for v in (rows, columns))
        return self.matrix[index[:, None], others[None, :]]


class SimilarityDistances:
    """Row by row the distances 2 - S of :class:`~ppal_backend.acquisition.ccms.Similarity`, diagonal 0."""

    def __init__(self, similarity: Similarity) -> None:
        self.similarity = similarity
        self.device = similarity.device

    def __len__(self) -> int:
        return len(self.similarity)

    def rows(self, indices: Any) -> torch.Tensor:
        """Distances ``[k, N]`` of some items to all."""
        return self.similarity.rows(indices).neg_().add_(2.0)

    def block(self, rows: Any, columns: Any) -> torch.Tensor:
        """Distances ``[k, l]`` of some items to some others."""
        return self.similarity.block(rows, columns).neg_().add_(2.0)

    def panel(self, columns: Any) -> Callable[[Any], torch.Tensor]:
        """``block`` with the columns prepared for many calls."""
        block = self.similarity.panel(columns)
        return lambda rows: block(rows).neg_().add_(2.0)


def panel_of(distances: Distances, columns: Any) -> Callable[[Any], torch.Tensor]:
    """Function of rows that gives their distances to ``columns``, prepared once where that pays."""
    if isinstance(distances, SimilarityDistances):
        return distances.panel(columns)
    return lambda rows: distances.block(rows, columns)


class _FeatureRows:
    """Base of distances that are a function of one product of feature rows."""

    def __init__(self, features: torch.Tensor) -> None:
        self._features = features
        self.device = features.device

    def __len__(self) -> int:
        return len(self._features)

    def rows(self, indices: Any) -> torch.Tensor:
        """Distances ``[k, N]`` of some items to all."""
        index = as_tensor(indices).long().reshape(-1).to(self.device)
        result = self._between(index, None)
        result[torch.arange(len(index)), index] = 0.0
        return result

    def block(self, rows: Any, columns: Any) -> torch.Tensor:
        """Distances ``[k, l]`` of some items to some others."""
        index, others = (as_tensor(v).long().reshape(-1).to(self.device) for v in (rows, columns))
        return self._between(index, others).masked_fill_(index[:, None] == others[None, :], 0.0)

    def _between(self, rows: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError


class CosineDistances(_FeatureRows):
    """1 - cosine of image features, in [0, 2].

    Args:
        features: ``[N, d]``; a zero vector has distance 1 to all others.
    """

    def __init__(self, features: Any) -> None:
        values = as_tensor(features).float()
        norms = torch.linalg.vector_norm(values, dim=1, keepdim=True)
        super().__init__(values / norms.clamp(min=torch.finfo(torch.float32).tiny))

    def _between(self, rows: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
        others = self._features if columns is None else self._features[columns]
        return (self._features[rows] @ others.T).neg_().add_(1.0).clamp_(0.0, 2.0)


class EuclideanDistances(_FeatureRows):
    """Euclidean distance of image features ``[N, d]``."""

    def __init__(self, features: Any) -> None:
        super().__init__(as_tensor(features).float())

    def _between(self, rows: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
        others = self._features if columns is None else self._features[columns]
        return torch.cdist(self._features[rows], others)


class JaccardDistances(_FeatureRows):
    """1 - |A and B| / |A or B| of predicted class sets; two images without classes have distance 1.

    Args:
        present: ``[N, C]`` bool, whether image n shows class c.
    """

    def __init__(self, present: Any) -> None:
        super().__init__(as_tensor(present).float())

    def _between(self, rows: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
        others = self._features if columns is None else self._features[columns]
        mine = self._features[rows]
        shared = mine @ others.T
        union = mine.sum(1)[:, None] + others.sum(1)[None, :] - shared
        return 1.0 - shared / union.clamp(min=1.0)


def as_distances(value: Any) -> Distances:
    """Return ``value`` if it computes distances itself, else wrap it as a matrix.

    Raises:
        ValueError: See :class:`DenseDistances`.
    """
    if isinstance(value, torch.Tensor) or not isinstance(value, Distances):
        return DenseDistances(value)
    return value


class SubsetDistances:
    """Distances among some items of another object, numbered anew.

    Args:
        distances: All items.
        members: ``[m]`` positions in ``distances``.
    """

    def __init__(self, distances: Distances, members: Sequence[int]) -> None:
        self._distances = distances
        self._members = torch.as_tensor(list(members), dtype=torch.long)
        self._panel = panel_of(distances, self._members)
        self.device = distances.device

    def __len__(self) -> int:
        return len(self._members)

    def rows(self, indices: Any) -> torch.Tensor:
        """Distances ``[k, m]`` of some items to all members."""
        return self._panel(self._members[as_tensor(indices).long().reshape(-1)])

    def block(self, rows: Any, columns: Any) -> torch.Tensor:
        """Distances ``[k, l]`` of some members to some others."""
        index, others = (self._members[as_tensor(v).long().reshape(-1)] for v in (rows, columns))
        return self._distances.block(index, others)


@dataclass(frozen=True, eq=False)
class Anchors:
    """Centres that stand outside the N items and stay: of each item the nearest one is all that matters.

    Args:
        distances: ``[N]`` distance of each item to its nearest anchor.
        ids: ``[N]`` int64 image id of that anchor.
    """

    distances: torch.Tensor
    ids: torch.Tensor

    def of(self, items: Sequence[int]) -> Anchors:
        """The same for some items, numbered anew."""
        index = torch.as_tensor(list(items), dtype=torch.long, device=self.distances.device)
        return Anchors(self.distances[index], self.ids[index])


def nearest_anchors(blocks: Iterable[torch.Tensor], ids: Sequence[int]) -> Anchors | None:
    """Fold distances of anchors to all items, some anchors at a time; ties go to the anchor that comes first.

    Args:
        blocks: ``[l, N]`` distances, together one row for each of ``ids``.
        ids: Image ids of the anchors.

    Returns:
        None without anchors.
    """
    found: Anchors | None = None
    start = 0
    for block in blocks:
        values, where = block.min(0)
        names = torch.as_tensor(ids[start : start + len(block)], dtype=torch.long, device=block.device)[where]
        start += len(block)
        if found is not None:
            nearer = values < found.distances
            values = torch.where(nearer, values, found.distances)
            names = torch.where(nearer, names, found.ids)
        found = Anchors(values, names)
    return found


def anchors_behind(distances: Distances, count: int, ids: Sequence[int]) -> Anchors | None:
    """Anchors of the first ``count`` items of ``distances``: all items behind them, whose image ids are given."""
    ends = range(count, len(distances), _ANCHOR_BATCH)
    starts = (range(start, min(start + _ANCHOR_BATCH, len(distances))) for start in ends)
    return nearest_anchors((distances.block(part, range(count)) for part in starts), ids)
