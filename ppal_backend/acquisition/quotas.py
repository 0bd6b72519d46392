"""Query sets that hold at least so many images of given groups: exact, with as few other picks as possible.

On top of any strategy. What it chose is exchanged only as far as quotas demand: of all query sets of the same size that
miss quotas by as few images as can be, the one with most of the strategy's own picks, and of those the one whose new
images are worth most. What stage 2 chooses within a group is worth more than the rest of the group, which goes by
utility.

The value of a set is a sum over its images, so images that count for the same quotas differ in nothing but their value,
and the best of each kind are enough. What is left is an integer program of a few hundred unknowns, which is solved
exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from ppal_backend.acquisition.staged import QueryStrategy
from ppal_backend.structures import CandidatePool, QueryContext, QuerySet
from ppal_backend.structures.query import by_utility

PREFERRED = 0.5
"""Share of an image's value that being stage 2's choice within a group is worth; utility is the other share."""

MORE_THAN_ENOUGH = 1000
"""Budget for each image of a set that is only to be put in order, be it counted in images or in boxes."""


@dataclass(frozen=True)
class Constrained:
    """A query set under quotas, against the one without.

    Args:
        query: The set that was chosen.
        reached: Images of each quota's group in it.
        entered: Images that it holds because of quotas, in labeling order.
        left: Images that it would hold without.
        utility_share: Sum of utilities as a share of that without quotas; None where that is not above 0.
    """

    query: QuerySet
    reached: tuple[int, ...]
    entered: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    utility_share: float | None = None


def exchange(
    chosen: Sequence[int],
    values: Mapping[int, float],
    groups: Sequence[Collection[int]],
    needed: Sequence[int],
) -> list[int]:
    """Of all sets as large as ``chosen``, one that misses quotas least, then keeps most, then is worth most.

    Args:
        chosen: What a strategy chose.
        values: Of every image that may be chosen, in [0, 1].
        groups: For each quota the images that count for it; those without a value do not matter.
        needed: Images that each quota needs, >= 0.

    Returns:
        Ids, those of ``chosen`` that stay in their order, then the others by falling value.
    """
    kinds: defaultdict[tuple[bool, ...], list[int]] = defaultdict(list)
    own, members = set(chosen), [frozenset(group) for group in groups]
    for image_id in values:
        kind = tuple(image_id in group for group in members)
        if image_id in own or any(kind):
            kinds[(image_id in own, *kind)].append(image_id)
    ids: list[int] = []
    worth: list[float] = []
    counts: list[tuple[bool, ...]] = []
    for (mine, *which), found in kinds.items():
        for image_id in sorted(found, key=lambda i: (-values[i], i))[: len(chosen)]:
            ids.append(image_id)
            worth.append(values[image_id] + mine * (len(chosen) + 1.0))
            counts.append(tuple(which))
    if not ids:
        return list(chosen)
    counted = np.array(counts, float).reshape(len(ids), len(members)).T
    size = LinearConstraint(np.concatenate([np.ones(len(ids)), np.zeros(len(members))]), len(chosen), len(chosen))
    enough = LinearConstraint(np.hstack([counted, np.eye(len(members))]), np.array(needed, float), np.inf)
    upper = np.concatenate([np.ones(len(ids)), np.array(needed, float)])
    missing = np.concatenate([np.zeros(len(ids)), np.ones(len(members))])
    lacking = round(float(missing @ _solve(missing, upper, [size, enough])))
    within = LinearConstraint(missing, 0, lacking)
    best = _solve(np.concatenate([-np.array(worth), np.zeros(len(members))]), upper, [size, enough, within])
    taken = {image_id for image_id, x in zip(ids, best, strict=False) if x > 0.5}
    return [i for i in chosen if i in taken] + sorted(taken - own, key=lambda i: (-values[i], i))


def _solve(cost: np.ndarray, upper: np.ndarray, constraints: list[LinearConstraint]) -> np.ndarray:
    found = milp(cost, integrality=np.ones(len(cost)), bounds=Bounds(0, upper), constraints=constraints,
                 options={"mip_rel_gap": 0.0})  # fmt: skip
    if found.x is None:  # images and missing ones can always be chosen, so that is no answer
        raise RuntimeError(f"expected the integer program of the quotas to be solved, got: {found.message}")
    return np.asarray(found.x)


def hold_quotas(
    strategy: QueryStrategy,
    context: QueryContext,
    query: QuerySet,
    groups: Sequence[Collection[int]],
    needed: Sequence[int],
    rng: np.random.Generator,
) -> Constrained:
    """Exchange images of a query set until it holds its quotas, as far as the pool allows.

    Args:
        strategy: What chose ``query``; it chooses within the groups, too, and puts the result in order.
        context: What it saw.
        query: Its answer.
        groups: For each quota the images of the pool that count for it.
        needed: Images that each quota needs.
        rng: Source of randomness.
    """
    chosen = query.image_ids
    missing = [n - len(set(chosen) & set(group)) for group, n in zip(groups, needed, strict=True)]
    if not chosen or max(missing, default=0) <= 0:
        return Constrained(query, _reached(chosen, groups))
    preferred: set[int] = set()
    for group, lacking in zip(groups, missing, strict=True):
        others = by_utility((set(group) & query.utilities.keys()) - set(chosen), query.utilities)
        if lacking > 0 and others:
            some = CandidatePool(tuple(others[: 4 * lacking]), query.utilities)
            preferred |= set(strategy.query(context, lacking, rng, candidates=some).image_ids)
    values = _values(query.utilities, preferred)
    taken = exchange(chosen, values, groups, needed)
    before, after = (sum(query.utilities[i] for i in ids) for ids in (chosen, taken))
    ordered = _in_order(strategy, context, query, taken, rng)
    return Constrained(
        ordered,
        _reached(taken, groups),
        entered=tuple(i for i in ordered.image_ids if i not in set(chosen)),
        left=tuple(i for i in chosen if i not in set(taken)),
        utility_share=after / before if before > 0 else None,
    )


def _reached(ids: Iterable[int], groups: Sequence[Collection[int]]) -> tuple[int, ...]:
    there = set(ids)
    return tuple(len(there & set(group)) for group in groups)


def _values(utilities: Mapping[int, float], preferred: Collection[int]) -> dict[int, float]:
    low, high = min(utilities.values()), max(utilities.values())
    scale = (1 - PREFERRED) / (high - low) if high > low else 0.0
    return {i: scale * (u - low) + PREFERRED * (i in preferred) for i, u in utilities.items()}


def _in_order(
    strategy: QueryStrategy, context: QueryContext, query: QuerySet, taken: Sequence[int], rng: np.random.Generator
) -> QuerySet:
    """The set as the strategy orders and explains it; kept picks go on standing for the cluster they stood for."""
    again = strategy.query(
        context, MORE_THAN_ENOUGH * len(taken), rng, candidates=CandidatePool(tuple(taken), query.utilities)
    )
    ids = (*again.image_ids, *(i for i in taken if i not in set(again.image_ids)))
    sizes = {i: e.cluster_size for i, e in query.explanations.items()}
    explained = {i: replace(e, cluster_size=sizes.get(i)) for i, e in again.explanations.items()}
    candidates = by_utility(set(query.candidate_ids) | set(ids), query.utilities)
    return QuerySet(ids, query.utilities, tuple(candidates), explained)
