"""Stage 2: choose a query set from the candidates and put it in labeling order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ppal_backend.acquisition.budget import Budget
from ppal_backend.acquisition.clustering import METHODS, Clusters, farthest_first, k_center_greedy, refine_centers
from ppal_backend.acquisition.distances import Anchors, DenseDistances, Distances, SubsetDistances
from ppal_backend.structures import QueryContext

logger = logging.getLogger(__name__)

FIRST = ("utility", "random", "farthest")


@dataclass(frozen=True)
class Neighbour:
    """Nearest image that was chosen (or labelled) before.

    Args:
        image_id: That image.
        distance: Distance to it, >= 0.
        similarity: Similarity to it on its measure's own scale, or None where the measure is a distance.
    """

    image_id: int
    distance: float
    similarity: float | None


@dataclass(frozen=True)
class Selection:
    """Answer of stage 2.

    Args:
        positions: Pool positions of the chosen images, in labeling order.
        cluster_sizes: Candidates that each chosen position stands for; empty without clustering.
        neighbours: Nearest earlier image of chosen positions; empty for selectors that compare no images.
    """

    positions: list[int]
    cluster_sizes: Mapping[int, int] = field(default_factory=dict)
    neighbours: Mapping[int, Neighbour] = field(default_factory=dict)


class Selector(Protocol):
    """Stage 2: picks from candidates."""

    def select(
        self, context: QueryContext, candidates: Sequence[int], budget: Budget, rng: np.random.Generator
    ) -> Selection:
        """Choose.

        Args:
            context: What may be looked at.
            candidates: Pool positions by falling utility.
            budget: What may be spent.
            rng: Source of randomness.
        """


class TopSelector:
    """The candidates of largest utility."""

    def select(
        self, context: QueryContext, candidates: Sequence[int], budget: Budget, rng: np.random.Generator
    ) -> Selection:
        """Take candidates in their order while the budget lasts."""
        return Selection(budget.take(candidates))


class RandomSelector:
    """Random candidates, in random order."""

    def select(
        self, context: QueryContext, candidates: Sequence[int], budget: Budget, rng: np.random.Generator
    ) -> Selection:
        """Take candidates in a drawn order while the budget lasts."""
        return Selection(budget.take([candidates[k] for k in rng.permutation(len(candidates))]))


@dataclass(frozen=True)
class Comparison:
    """How candidates compare with each other, and with labelled images.

    Args:
        distances: Distances of the K candidates.
        anchors: Of each candidate the nearest labelled image, where the strategy looks at those.
        self_similarity: Similarity s of an image with itself, so that similarity = s - distance; None when the
            measure is not a similarity.
    """

    distances: Distances
    anchors: Anchors | None = None
    self_similarity: float | None = None


Compare = Callable[[QueryContext, Sequence[int]], Comparison]


class DiverseSelector:
    """k-Center-Greedy, refined by k-medoids, ordered farthest-first.

    Args:
        compare: Builds the distances among candidates (and to labelled images, first centres that stay).
        refine: ``kmedoids`` (the paper), ``fasterpam`` or None to keep the greedy centres and their order.
        max_iterations: Of the refinement.
        first: First greedy centre: the candidate of largest ``utility``, a ``random`` one, or the ``farthest`` from
            the labelled images (utility without any).
        min_distance: Images nearer than this to one chosen before (or labelled) are skipped as near-duplicates and
            others taken instead; the query is shorter when none is left.

    Source: Sec. 3.3.
    """

    def __init__(
        self,
        compare: Compare,
        refine: str | None = "kmedoids",
        max_iterations: int = 100,
        first: str = "utility",
        min_distance: float = 0.0,
    ) -> None:
        if refine is not None and refine not in METHODS:
            raise ValueError(f"expected refine to be one of {METHODS} or None, got {refine!r}")
        if first not in FIRST:
            raise ValueError(f"expected first to be one of {FIRST}, got {first!r}")
        if not min_distance >= 0:
            raise ValueError(f"expected min_distance >= 0, got {min_distance}")
        self._compare, self._refine, self._max_iterations = compare, refine, max_iterations
        self._first, self._min_distance = first, min_distance

    def select(
        self, context: QueryContext, candidates: Sequence[int], budget: Budget, rng: np.random.Generator
    ) -> Selection:
        """Choose diverse and representative candidates."""
        if not candidates:
            return Selection([])
        comparison = self._compare(context, candidates)
        everything = budget.covers(candidates)
        if everything and self._refine is not None:
            size = len(candidates)
            clusters = Clusters(list(range(size)), [1] * size, 0.0, (), 0)
        else:
            clusters = self._cluster(comparison, candidates, budget, rng)
        return self._order(context, comparison, candidates, clusters, budget)

    def _cluster(
        self, comparison: Comparison, candidates: Sequence[int], budget: Budget, rng: np.random.Generator
    ) -> Clusters:
        distances, anchors = comparison.distances, comparison.anchors
        first: int | None = 0
        if self._first == "random":
            first = int(rng.integers(len(candidates)))
        elif self._first == "farthest" and anchors is not None:
            first = None
        centers = k_center_greedy(distances, budget.center_count(candidates), first, anchors=anchors)
        if self._refine is None:
            return Clusters(centers, [], 0.0, (), 0)
        return refine_centers(distances, centers, self._refine, self._max_iterations, anchors)

    def _order(
        self,
        context: QueryContext,
        comparison: Comparison,
        candidates: Sequence[int],
        clusters: Clusters,
        budget: Budget,
    ) -> Selection:
        spending = _Spending(context, comparison, candidates, budget, self._min_distance)
        centers = clusters.centers if self._refine is None else sorted(clusters.centers)
        anchors = comparison.anchors
        first = None if self._first == "farthest" and anchors is not None else 0
        spending.spend(_subset(comparison.distances, centers), centers, first, anchors=anchors and anchors.of(centers))
        if spending.left() and len(spending.chosen) < len(candidates):
            spending.fill()
        sizes = dict(zip(clusters.centers, clusters.sizes, strict=True)) if clusters.sizes else {}
        return spending.result(sizes)


def _subset(distances: Distances, members: Sequence[int]) -> Distances:
    if list(members) == list(range(len(distances))):
        return distances
    if isinstance(distances, DenseDistances):
        return DenseDistances.trusted(distances.block(members, members))
    return SubsetDistances(distances, members)


class _Spending:
    """Walks items farthest first and keeps those that fit the budget and are no near-duplicates."""

    def __init__(
        self,
        context: QueryContext,
        comparison: Comparison,
        candidates: Sequence[int],
        budget: Budget,
        min_distance: float,
    ) -> None:
        self._ids = [context.pool_ids[p] for p in candidates]
        self._candidates, self._budget, self._comparison = candidates, budget, comparison
        self._min_distance = min_distance
        self._spent = 0
        self._refused: set[int] = set()
        self.chosen: dict[int, Neighbour | None] = {}

    def left(self) -> bool:
        """Whether anything can still be afforded."""
        return self._spent < self._budget.limit

    def spend(
        self,
        distances: Distances,
        members: Sequence[int],
        first: int | None,
        fixed: Sequence[int] = (),
        anchors: Anchors | None = None,
    ) -> None:
        """Offer the items of ``distances`` farthest first; ``members`` gives their candidate numbers."""
        walk = farthest_first(distances, first, fixed, anchors)
        pick = next(walk, None)
        while pick is not None and self.left():
            near = pick.anchor if pick.nearest is None else self._ids[members[pick.nearest]]
            accepted = self._offer(members[pick.position], pick.distance, near)
            try:
                pick = walk.send(accepted)
            except StopIteration:
                return

    def fill(self) -> None:
        """Go on with all other candidates, given what has been chosen."""
        distances, anchors = self._comparison.distances, self._comparison.anchors
        first = None if self.chosen or anchors is not None else 0
        self.spend(distances, range(len(distances)), first, list(self.chosen), anchors)

    def _offer(self, candidate: int, distance: float, near: int | None) -> bool:
        """Take a candidate unless it is refused; ``near`` is the id of the nearest image so far."""
        cost = self._budget.costs[self._candidates[candidate]]
        duplicate = near is not None and distance < self._min_distance
        if candidate in self._refused or duplicate or not self._budget.affordable(cost, self._spent):
            self._refused.add(candidate)
            return False
        self._spent += cost
        top = self._comparison.self_similarity
        similarity = None if top is None else top - distance
        self.chosen[candidate] = None if near is None else Neighbour(near, distance, similarity)
        return True

    def result(self, sizes: Mapping[int, int]) -> Selection:
        """What was chosen, by pool position."""
        if self.left() and self._refused:
            logger.info("%d candidates were skipped as near-duplicates or over budget", len(self._refused))
        place = self._candidates
        return Selection(
            [place[c] for c in self.chosen],
            {place[c]: sizes.get(c, 1) for c in self.chosen} if sizes else {},
            {place[c]: near for c, near in self.chosen.items() if near is not None},
        )
