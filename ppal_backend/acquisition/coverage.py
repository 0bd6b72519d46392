"""Stage 2 by coverage: picks that stand for much uncertainty which no labelled image stands for yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ppal_backend.acquisition.arrays import as_tensor
from ppal_backend.acquisition.budget import Budget
from ppal_backend.acquisition.distances import Distances
from ppal_backend.acquisition.selection import Compare, Comparison, Neighbour, Selection
from ppal_backend.structures import Detections, QueryContext

Weigh = Callable[[QueryContext, Sequence[Detections]], np.ndarray]
"""Utilities ``[k]`` >= 0 of some images."""

_FEWEST, _MOST = 16, 256  # gains that are brought up to date together: a row costs less in a larger block
_CELLS = 1 << 24  # distances read at once


class CoverageSelector:
    """Greedy picks for the largest weighted coverage of the candidates.

    With weights u, distances d and what is labelled or picked so far, S, the next pick x is the one of largest::

        gain(x) = sum over candidates j of u_j * max(0, d(j, S) - d(j, x))

    divided by its cost where the budget counts boxes. Of this objective a greedy choice reaches at least 1 - 1/e of the
    best possible, and every beginning of the order does so for its own length. Where k-center takes what lies far
    from everything, however little it teaches, this takes what many doubtful images resemble.

    Args:
        compare: Builds the distances among candidates, and to labelled images.
        weigh: Gives the weights.
        min_distance: Images nearer than this to one chosen before (or labelled) are left out.

    Source: Bae et al., "Uncertainty Herding: One Active Learning Method for All Label Budgets", ICLR 2025,
    arXiv:2412.20644, with CCMS (Eq. 6 and 7) in place of a kernel on features. The bound: Nemhauser, Wolsey and Fisher,
    Mathematical Programming 14, 1978.
    """

    def __init__(self, compare: Compare, weigh: Weigh, min_distance: float = 0.0) -> None:
        if not min_distance >= 0:
            raise ValueError(f"expected min_distance >= 0, got {min_distance}")
        self._compare, self._weigh, self._min_distance = compare, weigh, min_distance

    def select(
        self, context: QueryContext, candidates: Sequence[int], budget: Budget, rng: np.random.Generator
    ) -> Selection:
        """Choose candidates in the order of their gains; without any gain left, by falling utility."""
        if not candidates:
            return Selection([])
        comparison = self._compare(context, candidates)
        weights = as_tensor(self._weigh(context, [context.pool[p] for p in candidates]))
        costs, ids = [budget.costs[p] for p in candidates], [context.pool_ids[p] for p in candidates]
        covering = _Covering(comparison, weights.to(comparison.distances.device), costs)
        spent, picks = 0, []
        while spent < budget.limit:
            covering.limit_cost(budget.limit - spent)
            pick = covering.best()
            if pick is None:
                break
            if covering.distance(pick) < self._min_distance:
                covering.leave_out(pick)
                continue
            picks.append(covering.take(pick, ids))
            spent += costs[pick]
        sizes = covering.sizes()
        return Selection(
            [candidates[p.position] for p in picks],
            {candidates[p.position]: sizes.get(p.position, 1) for p in picks},
            {candidates[p.position]: p.neighbour for p in picks if p.neighbour is not None},
        )


@dataclass(frozen=True)
class _Picked:
    position: int
    neighbour: Neighbour | None


class _Covering:
    """Distances of all candidates to what is chosen, and upper bounds of the gains, which can only fall.

    ``owner`` holds the position of the pick that is nearest to each candidate, -1 while that is an anchor or nothing.
    """

    def __init__(self, comparison: Comparison, weights: torch.Tensor, costs: Sequence[int]) -> None:
        self._distances: Distances = comparison.distances
        self._anchors, self._top = comparison.anchors, comparison.self_similarity
        self._weights, count = weights.double(), len(comparison.distances)
        self._costs = torch.as_tensor(costs, dtype=torch.float64, device=weights.device)
        if self._anchors is None:
            farthest = max(float(self._distances.rows([k]).max()) for k in range(count)) if self._top is None else 0.0
            self._far = torch.full((count,), self._top or farthest, dtype=torch.float64, device=weights.device)
        else:
            self._far = self._anchors.distances.double().clone()
        self._owner = torch.full((count,), -1, dtype=torch.long, device=weights.device)
        self._left = torch.ones(count, dtype=torch.bool, device=weights.device)
        self._bounds = torch.full((count,), torch.inf, dtype=torch.float64, device=weights.device)

    def limit_cost(self, cost: float) -> None:
        """Choose none that costs more."""
        self._left &= self._costs <= cost

    def leave_out(self, position: int) -> None:
        """Do not choose this one."""
        self._left[position] = False

    def best(self) -> int | None:
        """The candidate of largest gain that is left, the first of equal ones; None without any."""
        fresh = torch.zeros_like(self._left)
        most = min(_MOST, max(_FEWEST, _CELLS // len(fresh)))
        size = _FEWEST
        while bool(self._left.any()):
            bounds = self._bounds.masked_fill(~self._left, -torch.inf)
            first = int(bounds.argmax())
            if bool(fresh[first]):
                return first
            size = most if bool(bounds[first] == torch.inf) else min(size, most)
            stale = bounds.masked_fill(fresh, -torch.inf).topk(min(size, len(bounds)))
            look = stale.indices[torch.isfinite(stale.values) | (stale.values == torch.inf)].sort().values
            rows = self._distances.rows(look).double()
            self._bounds[look] = (self._far[None] - rows).clamp(min=0.0) @ self._weights / self._costs[look]
            fresh[look] = True
            size *= 2
        return None

    def distance(self, pick: int) -> float:
        """Distance to the nearest that is chosen or labelled; inf where there is none."""
        return float(self._far[pick]) if self._has_neighbour(pick) else float("inf")

    def take(self, pick: int, ids: Sequence[int]) -> _Picked:
        """Choose a candidate."""
        near = None
        if self._has_neighbour(pick):
            owner, distance = int(self._owner[pick]), float(self._far[pick])
            assert owner >= 0 or self._anchors is not None
            name = ids[owner] if owner >= 0 else int(self._anchors.ids[pick])  # type: ignore[union-attr]
            near = Neighbour(name, distance, None if self._top is None else self._top - distance)
        self._left[pick] = False
        row = self._distances.rows([pick])[0].double()
        nearer = row < self._far
        nearer[pick] = True
        self._far, self._owner = torch.where(nearer, row, self._far), self._owner.masked_fill(nearer, pick)
        return _Picked(pick, near)

    def _has_neighbour(self, pick: int) -> bool:
        return self._anchors is not None or int(self._owner[pick]) >= 0

    def sizes(self) -> dict[int, int]:
        """Candidates that each pick is the nearest of, itself included."""
        owned = self._owner[self._owner >= 0]
        picks, counts = owned.unique(return_counts=True)
        return dict(zip(picks.tolist(), counts.tolist(), strict=True))


__all__ = ["CoverageSelector", "Weigh"]
