"""k-Center-Greedy, k-medoids and FasterPAM on distances; positions in, positions out."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from ppal_backend.acquisition.arrays import Array, as_tensor
from ppal_backend.acquisition.distances import Anchors, DenseDistances, Distances, as_distances, panel_of

logger = logging.getLogger(__name__)

_SPECULATED_ROWS = 64
_KEPT_ROWS = 256
_ROW_BATCH = 256
_MEMBER_BATCH = 512
_TOLERANCE = 1e-6


def _positions(values: Any, n: int, name: str) -> list[int]:
    positions = [int(v) for v in as_tensor(list(values) if not hasattr(values, "shape") else values).reshape(-1)]
    if positions and not 0 <= min(positions) <= max(positions) < n:
        raise ValueError(f"expected {name} in 0..{n - 1}, got {min(positions)}..{max(positions)}")
    if len(set(positions)) != len(positions):
        raise ValueError(f"expected distinct {name}, got {len(positions) - len(set(positions))} repeated")
    return positions


class RowSource:
    """Rows of distances, computed ahead for the items that are likely to be asked for next.

    A lazy row costs little more for 64 items than for one, and the farthest items now are mostly the next centres.
    Which rows are computed ahead never changes a result.
    """

    def __init__(self, distances: Distances) -> None:
        self._distances = distances
        self._matrix = distances.matrix if isinstance(distances, DenseDistances) else None
        self._kept: dict[int, torch.Tensor] = {}

    def row(self, index: int, nearest: torch.Tensor) -> torch.Tensor:
        if self._matrix is not None:
            return self._matrix[index]
        if index not in self._kept:
            self._fetch(index, nearest)
        return self._kept.pop(index)

    def _fetch(self, index: int, nearest: torch.Tensor) -> None:
        count = min(_SPECULATED_ROWS, len(nearest))
        likely = torch.topk(nearest, count).indices.tolist() if bool(torch.isfinite(nearest).all()) else []
        wanted = [index, *[k for k in likely if k != index and k not in self._kept][: _SPECULATED_ROWS - 1]]
        while len(self._kept) > _KEPT_ROWS - len(wanted):
            self._kept.pop(next(iter(self._kept)))
        for k, row in zip(wanted, self._distances.rows(wanted), strict=True):
            self._kept[k] = row.clone()


def k_center_greedy(
    distances: Array | Distances,
    k: int,
    first: int | None = None,
    fixed: Sequence[int] = (),
    *,
    anchors: Anchors | None = None,
) -> list[int]:
    """Choose centres one by one, each the item farthest from all centres so far.

    The largest distance of any item to its nearest centre is at most twice the best possible.

    Args:
        distances: ``[N, N]`` symmetric array or tensor with zero diagonal, or an object that computes rows.
        k: Centres to choose; at most the N - len(fixed) that are left are returned.
        first: Position of the first centre; default 0, or with ``fixed`` centres or ``anchors`` the item farthest
            from them.
        fixed: Positions of centres that exist already. They are not returned.
        anchors: Centres that exist already outside the N items.

    Returns:
        Distinct positions in the order chosen; ties go to the lowest position. Empty for k = 0.

    Raises:
        ValueError: The matrix is not square or not a distance matrix, k is negative, or a position is out of range,
            repeated, or both fixed and first.

    Source: Sec. 3.3; Sener and Savarese, "Active Learning for Convolutional Neural Networks", ICLR 2018. O(N * k).
    """
    source = as_distances(distances)
    n = len(source)
    if k < 0:
        raise ValueError(f"expected k >= 0, got {k}")
    taken = _positions(fixed, n, "fixed")
    wanted = min(k, n - len(taken))
    if first is not None:
        _positions([first], n, "first")
        if first in taken:
            raise ValueError(f"expected first outside fixed, got {first} in both")
    if wanted == 0:
        return []
    if first is None and not taken and anchors is None:
        first = 0
    return [pick.position for pick in islice(farthest_first(source, first, taken, anchors), wanted)]


@dataclass(frozen=True)
class Pick:
    """One step of :func:`farthest_first`.

    Args:
        position: The item.
        distance: Distance to the nearest earlier centre; inf for the first.
        nearest: Position of that centre, or None for the first and where an anchor is nearest.
        anchor: Image id of the anchor that is nearest, or None.
    """

    position: int
    distance: float
    nearest: int | None
    anchor: int | None = None


def farthest_first(
    distances: Distances, first: int | None = None, fixed: Sequence[int] = (), anchors: Anchors | None = None
) -> Generator[Pick, bool | None, None]:
    """Yield the item farthest from all centres so far, until none is left.

    Send False to refuse an item: it is then neither a centre nor offered again. Next and True accept it.

    Args:
        distances: Distances of N items.
        first: Item to offer first, or None for the one farthest from the centres that exist.
        fixed: Centres that exist already; never offered.
        anchors: Centres that exist already outside the items.
    """
    nearest, owner = _nearest_fixed(distances, list(fixed))
    if anchors is not None:
        owner.masked_fill_(anchors.distances < nearest, -1)
        nearest = torch.minimum(nearest, anchors.distances.to(nearest))
    nearest[list(fixed)] = -1.0
    rows = RowSource(distances)
    remaining = len(distances) - len(fixed)
    current = first if first is not None else _farthest(nearest)
    while remaining:
        near = int(owner[current])
        anchor = int(anchors.ids[current]) if near < 0 and anchors is not None else None
        accepted = yield Pick(current, float(nearest[current]), near if near >= 0 else None, anchor)
        remaining -= 1
        if accepted is None or accepted:
            row = rows.row(current, nearest)
            owner.masked_fill_(row < nearest, current)
            torch.minimum(nearest, row, out=nearest)
        nearest[current] = -1.0
        current = _farthest(nearest)


def _farthest(nearest: torch.Tensor) -> int:
    """Lowest position of the largest value (items that are out hold -1)."""
    return int(torch.argmax(nearest))


def _nearest_fixed(source: Distances, fixed: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance to and position of the nearest fixed centre of every item (inf and -1 without any)."""
    dtype = source.matrix.dtype if isinstance(source, DenseDistances) else torch.float32
    nearest = torch.full((len(source),), torch.inf, dtype=dtype, device=source.device)
    owner = torch.full((len(source),), -1, dtype=torch.long, device=source.device)
    for start in range(0, len(fixed), _ROW_BATCH):
        batch = torch.as_tensor(fixed[start : start + _ROW_BATCH], device=source.device)
        values, where = source.rows(batch).min(0)
        owner = torch.where(values < nearest, batch[where], owner)
        nearest = torch.minimum(nearest, values)
    return nearest, owner


@dataclass(frozen=True)
class Clusters:
    """Result of :func:`cluster_medoids`.

    Args:
        centers: k positions of the centres, in the order of the start centres.
        sizes: Items assigned to each centre, itself included (0 where a duplicate took all).
        cost: Summed distance of all items to their nearest centre, fixed ones included.
        costs: The cost after every assignment, first to last.
        iterations: Rounds of assigning and moving.
    """

    centers: list[int]
    sizes: list[int]
    cost: float
    costs: tuple[float, ...]
    iterations: int


def k_medoids(
    distances: Array | Distances,
    centers: Sequence[int],
    max_iterations: int = 100,
    fixed: Sequence[int] = (),
    *,
    anchors: Anchors | None = None,
) -> list[int]:
    """Refine centres: assign every item to the nearest one, move each to its cluster's medoid, until none moves.

    Args:
        distances: ``[N, N]`` symmetric array or tensor with zero diagonal, or an object that computes rows.
        centers: Distinct start positions.
        max_iterations: Rounds at most, >= 0.
        fixed: Centres that attract items but stay where they are and are not returned.
        anchors: The same outside the N items. An item as near to a moving centre as to one that stays is the former's.

    Returns:
        As many distinct positions as ``centers``, in their order. A cluster emptied by duplicates keeps its centre.

    Raises:
        ValueError: See :func:`k_center_greedy`.

    Source: Sec. 3.3 ("k-means++" with the member of largest summed similarity as the new centroid).
    """
    return cluster_medoids(distances, centers, max_iterations, fixed, anchors=anchors).centers


def cluster_medoids(
    distances: Array | Distances,
    centers: Sequence[int],
    max_iterations: int = 100,
    fixed: Sequence[int] = (),
    *,
    anchors: Anchors | None = None,
) -> Clusters:
    """:func:`k_medoids` with the sizes and costs of the clusters."""
    source = as_distances(distances)
    n = len(source)
    if max_iterations < 0:
        raise ValueError(f"expected max_iterations >= 0, got {max_iterations}")
    moving = _positions(centers, n, "centers")
    staying = _positions(fixed, n, "fixed")
    if set(moving) & set(staying):
        raise ValueError(
            f"expected centers and fixed to be disjoint, both hold {sorted(set(moving) & set(staying))[:5]}"
        )
    if not moving:
        return Clusters([], [], 0.0, (), 0)
    bound = _nearest_fixed(source, staying)[0] if staying else None
    if anchors is not None:
        bound = anchors.distances if bound is None else torch.minimum(bound, anchors.distances.to(bound))
    state = _Assignment(source, moving, bound)
    costs = [state.cost()]
    iterations = 0
    dirty = set(range(len(moving)))
    while iterations < max_iterations and dirty:
        iterations += 1
        moved = _move_centers(source, state, dirty, set(staying))
        if not moved:
            break
        dirty = state.reassign(moved) & set(range(len(moving)))
        costs.append(state.cost())
    sizes = torch.bincount(state.labels, minlength=len(moving)).tolist()[: len(moving)]
    return Clusters(state.centers, sizes, costs[-1], tuple(costs), iterations)


class _Assignment:
    """Nearest centre of every item; ties go to the centre that comes first.

    ``bound`` is the distance of each item to the nearest centre that stays, if there are any. Items nearer to those
    have the label k, the number of moving centres.
    """

    def __init__(self, source: Distances, centers: list[int], bound: torch.Tensor | None) -> None:
        self.source = source
        self.centers = list(centers)
        self._bound = bound
        self.labels, self.nearest = self._assign(None)

    def cost(self) -> float:
        return float(self.nearest.sum(dtype=torch.float64))

    def _assign(self, items: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Nearest of all centres for ``items`` (None: all)."""
        labels, nearest = self._best_of(range(len(self.centers)), items)
        if self._bound is None:
            return labels, nearest
        bound = (self._bound if items is None else self._bound[items]).to(nearest)
        return torch.where(bound < nearest, len(self.centers), labels), torch.minimum(bound, nearest)

    def _best_of(self, which: Sequence[int], items: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """First nearest of the centres ``which`` (ascending) for ``items`` (None: all)."""
        count = len(self.source) if items is None else len(items)
        device = self.source.device
        labels = torch.zeros(count, dtype=torch.long, device=device)
        nearest: torch.Tensor | None = None
        numbers = torch.as_tensor(list(which), dtype=torch.long)
        compute = self.source.rows if items is None else panel_of(self.source, items)
        for part in numbers.split(_ROW_BATCH):
            rows = [self.centers[k] for k in part.tolist()]
            values, where = compute(rows).min(0)  # the first row on ties
            found = part.to(device)[where]
            if nearest is None:
                nearest, labels = values, found
            else:
                better = values < nearest
                nearest = torch.where(better, values, nearest)
                labels = torch.where(better, found, labels)
        if nearest is None:
            nearest = torch.full((count,), torch.inf, device=device)
        return labels, nearest

    def reassign(self, moved: dict[int, int]) -> set[int]:
        """Take in new centres ``{cluster: position}``; return the clusters whose members changed."""
        before = self.labels.clone()
        for cluster, position in moved.items():
            self.centers[cluster] = position
        changed = sorted(moved)
        left_behind = torch.isin(self.labels, torch.as_tensor(changed, device=self.labels.device))
        if 2 * int(left_behind.sum()) > len(before) or len(changed) * 2 > len(self.centers):
            self.labels, self.nearest = self._assign(None)
        else:
            self._challenge(changed, left_behind)
        touched = before != self.labels
        return set(before[touched].tolist()) | set(self.labels[touched].tolist())

    def _challenge(self, changed: list[int], left_behind: torch.Tensor) -> None:
        """Compare items that kept their centre with the moved ones, and search anew for the others."""
        labels, nearest = self._best_of(changed, None)
        better = (nearest < self.nearest) | ((nearest == self.nearest) & (labels < self.labels))
        self.labels = torch.where(better, labels, self.labels)
        self.nearest = torch.where(better, nearest, self.nearest)
        items = torch.nonzero(left_behind)[:, 0]
        found, values = self._assign(items)
        self.labels[items], self.nearest[items] = found, values


def _move_centers(source: Distances, state: _Assignment, dirty: set[int], fixed: set[int]) -> dict[int, int]:
    """New centre of every changed cluster whose best member beats the present centre."""
    order = torch.argsort(state.labels, stable=True).cpu()
    counts = torch.bincount(state.labels.cpu(), minlength=len(state.centers))
    ends = counts.cumsum(0)
    members = {c: order[int(ends[c] - counts[c]) : int(ends[c])] for c in sorted(dirty) if int(counts[c]) > 1}
    taken = set(state.centers) | fixed
    moved: dict[int, int] = {}
    for clusters, items, sums in _member_sums(source, members):
        start = 0
        for c in clusters:
            stop = start + len(members[c])
            best = _best_member(items[start:stop].tolist(), sums[start:stop].tolist(), state.centers[c], taken)
            if best != state.centers[c]:
                moved[c] = best
            start = stop
    return moved


def _best_member(items: list[int], sums: list[float], center: int, taken: set[int]) -> int:
    """Member with the smallest summed distance; the present centre on (near) ties, other centres never."""
    total = dict(zip(items, sums, strict=True))
    free = {item: value for item, value in total.items() if item == center or item not in taken}
    if center not in free:
        return center
    limit = min(free.values()) * (1.0 + _TOLERANCE)
    return center if free[center] <= limit else min(item for item, value in free.items() if value <= limit)


def _member_sums(
    source: Distances, members: dict[int, torch.Tensor]
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Yield (clusters, their items, each item's summed distance to its own cluster) in batches of one block."""
    batch: list[int] = []
    held = 0
    for c, items in members.items():
        if batch and held + len(items) > _MEMBER_BATCH:
            yield _batch_sums(source, batch, members)
            batch, held = [], 0
        batch.append(c)
        held += len(items)
    if batch:
        yield _batch_sums(source, batch, members)


def _batch_sums(
    source: Distances, clusters: list[int], members: dict[int, torch.Tensor]
) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    items = torch.cat([members[c] for c in clusters])
    if len(clusters) == 1:
        parts = items.split(_MEMBER_BATCH)
        sums = torch.cat([source.block(part, items).sum(1, dtype=torch.float64) for part in parts])
        return clusters, items, sums.cpu()
    owner = torch.repeat_interleave(torch.arange(len(clusters)), torch.as_tensor([len(members[c]) for c in clusters]))
    same = (owner[:, None] == owner[None, :]).to(source.device)
    block = source.block(items, items)
    return clusters, items, torch.where(same, block, 0.0).sum(1, dtype=torch.float64).cpu()


METHODS = ("kmedoids", "fasterpam")


def refine_centers(
    distances: Array | Distances,
    centers: Sequence[int],
    method: str = "kmedoids",
    max_iterations: int = 100,
    anchors: Anchors | None = None,
) -> Clusters:
    """Refine centres.

    Args:
        distances: As for :func:`~ppal_backend.acquisition.clustering.k_medoids`.
        centers: Distinct start positions.
        method: ``kmedoids`` or ``fasterpam`` (needs a whole matrix and no anchors).
        max_iterations: Rounds at most.
        anchors: Centres outside the items that stay.

    Raises:
        ValueError: An unknown method, or FasterPAM with anchors or distances that are not a matrix.
        ImportError: FasterPAM without the ``kmedoids`` package.
    """
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {METHODS}, got {method!r}")
    if method == "kmedoids":
        return cluster_medoids(distances, centers, max_iterations, anchors=anchors)
    if anchors is not None:
        raise ValueError(
            "expected no labelled images beside the candidates for refine='fasterpam', got some; "
            "use refine='kmedoids' or the strategy 'ppal'"
        )
    return fasterpam(distances, centers, max_iterations)


def fasterpam(distances: Array | Distances, centers: Sequence[int], max_iterations: int = 100) -> Clusters:
    """Swap medoids with FasterPAM, starting from ``centers``.

    Reaches a lower summed distance than the alternation of :func:`cluster_medoids`, since any item may replace any
    medoid.

    Source: Schubert and Rousseeuw, "Fast and eager k-medoids clustering", Information Systems 2021.
    """
    source = as_distances(distances)
    if not isinstance(source, DenseDistances):
        raise ValueError(
            f"expected a distance matrix for refine='fasterpam', got {type(source).__name__}; use refine='kmedoids'"
        )
    package = _kmedoids_package()
    matrix = np.ascontiguousarray(source.matrix.detach().cpu().numpy())
    start = np.asarray(list(centers), dtype=np.uint64)
    if len(start) == 0 or len(start) == len(matrix):
        return cluster_medoids(source, centers, 0)
    found: Any = package.fasterpam(matrix, start, max_iter=max_iterations, n_cpu=1)
    return cluster_medoids(source, [int(m) for m in found.medoids], 0)


def _kmedoids_package() -> Any:
    try:
        import kmedoids
    except ImportError as error:
        raise ImportError(
            "expected the package 'kmedoids' for refine='fasterpam', got none installed; "
            "install it (pip install kmedoids) or use refine='kmedoids'"
        ) from error
    return kmedoids
