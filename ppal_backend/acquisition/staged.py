"""Query strategies of two stages: their protocol, their options, how both stages run, and why each image was picked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
import torch

from ppal_backend.acquisition.arrays import as_tensor
from ppal_backend.acquisition.budget import UNITS, Budget
from ppal_backend.acquisition.ccms import MakeSimilarity
from ppal_backend.acquisition.ccms.objects import METRICS
from ppal_backend.acquisition.clustering import METHODS
from ppal_backend.acquisition.dcus import Scorer
from ppal_backend.acquisition.selection import FIRST, Selection, Selector
from ppal_backend.acquisition.uncertainty import AGGREGATES, MEASURES, BoxContributions, BoxFilter
from ppal_backend.structures import (
    BoxContribution,
    CandidatePool,
    ClassContribution,
    Detections,
    Explanation,
    QueryContext,
    QuerySet,
)
from ppal_backend.structures.query import by_utility
from ppal_backend.structures.stream import without_embeddings

PRESETS = ("paper", "reference")
PAPER_DELTA = 4.0
_WHOLE = ("max_detections", "max_iterations")
_NUMBERS = (
    *_WHOLE, "delta", "alpha", "beta", "strength", "price", "score_threshold", "min_size_px", "max_aspect",
    "min_distance", "memory_gib",
)  # fmt: skip


Needs = Mapping[str, str]
"""What a strategy reads beside boxes, scores and classes: ``embeddings`` of detections, or image features by their name
(``global``, ``fpn``), each of its ``candidates`` or of the whole ``pool``. The rest may be left out of the context."""


class QueryStrategy(Protocol):
    """Chooses images for labeling. Deterministic for one context, budget and generator state; inputs unchanged."""

    @property
    def name(self) -> str:
        """The name that :func:`get_strategy` knows it by."""

    def candidates(self, context: QueryContext, budget: int, rng: np.random.Generator) -> CandidatePool:
        """Stage 1: utilities of the pool and the candidates."""

    def query(
        self,
        context: QueryContext,
        budget: int,
        rng: np.random.Generator,
        candidates: CandidatePool | None = None,
    ) -> QuerySet:
        """Both stages, or stage 2 alone on given candidates."""


@dataclass(frozen=True)
class Options:
    """Settings of strategies; each strategy reads those that concern it.

    Args:
        uncertainty: ``entropy``, ``posterior`` or ``margin`` (strategies named after a measure have their own).
        aggregate: ``sum``, ``mean`` or ``max`` of the boxes of an image.
        delta: Budget expanding ratio, > 1; the candidate pool is delta times the budget.
        alpha: Eq. 4, > 0.
        beta: Eq. 4, >= 0.
        score_threshold: Lowest score that counts.
        max_detections: Boxes per image that count, the highest-scored; None for the preset's number.
        min_size_px: See :class:`~ppal_backend.acquisition.uncertainty.BoxFilter`; None for the preset's.
        max_aspect: Likewise.
        preset: ``paper``, or ``reference`` for the box filter of the authors' code, in both stages; what still
            differs from that code stands at :meth:`~ppal_backend.acquisition.uncertainty.BoxFilter.reference`.
        unit: Whether the budget counts ``images`` or predicted ``boxes``.
        min_distance: Near-duplicates closer than this to an earlier pick are skipped.
        refine: ``kmedoids`` or ``fasterpam``.
        max_iterations: Of the refinement.
        first: First greedy centre: ``utility`` or ``random``.
        metric: CCMS on ``cosine`` or ``kl``; ``auto`` decides by what the detections hold.
        memory_gib: Bound for stage 2; beyond it similarities are computed row by row.
        device: Where to compute similarities; default where the detections are.
        similarity: Makes what computes CCMS where a matrix does not fit, from the arguments of
            :class:`~ppal_backend.acquisition.ccms.LazySimilarity`; None for that class itself.
        strength: How much ``auto`` prefers classes that lack boxes, and ``ppal+balance`` rare predicted ones, >= 0.
        price: How much time costs ``auto``, from 0 (paid by the image) to 1 (by the second).
    """

    uncertainty: str = "entropy"
    aggregate: str = "sum"
    delta: float = PAPER_DELTA
    alpha: float = 0.3
    beta: float = 0.2
    score_threshold: float = 0.05
    max_detections: int | None = None
    min_size_px: float | None = None
    max_aspect: float | None = None
    preset: str = "paper"
    unit: str = "images"
    min_distance: float = 0.0
    refine: str = "kmedoids"
    max_iterations: int = 100
    first: str = "utility"
    metric: str = "auto"
    memory_gib: float | None = None
    device: str | None = None
    strength: float = 1.0
    price: float = 0.3
    similarity: MakeSimilarity | None = None

    def __post_init__(self) -> None:
        choices = {
            "uncertainty": MEASURES,
            "aggregate": AGGREGATES,
            "preset": PRESETS,
            "unit": UNITS,
            "first": FIRST,
            "refine": METHODS,
            "metric": METRICS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"expected {name} to be one of {allowed}, got {getattr(self, name)!r}")
        for name in _NUMBERS:
            value, kind = getattr(self, name), Integral if name in _WHOLE else Real
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                what = "a whole number" if name in _WHOLE else "a number"
                raise ValueError(f"expected {name} to be {what}, got {value!r}")
        if not 1 < self.delta < math.inf:
            raise ValueError(f"expected delta > 1, got {self.delta}; the candidate pool must exceed the budget")
        if not self.alpha > 0 or not 0 <= self.beta < math.inf or not 0 <= self.strength < math.inf:
            raise ValueError(
                f"expected alpha > 0, beta >= 0 and strength >= 0, got {self.alpha}, {self.beta}, {self.strength}"
            )
        if not self.min_distance >= 0 or not self.max_iterations >= 0:
            raise ValueError(
                f"expected min_distance >= 0 and max_iterations >= 0, got {self.min_distance}, {self.max_iterations}"
            )
        if not 0 <= self.price <= 1:
            raise ValueError(f"expected price in [0, 1], got {self.price}")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ValueError(f"expected memory_gib > 0, got {self.memory_gib}")
        if self.similarity is not None and not callable(self.similarity):
            raise ValueError(f"expected similarity to be what makes similarities, got {self.similarity!r}")
        self._check_device()
        _ = self.boxes

    def _check_device(self) -> None:
        try:
            torch.device("cpu" if self.device is None else self.device)
        except (RuntimeError, TypeError):
            raise ValueError(f"expected device to be cpu, cuda or cuda:N, got {self.device!r}") from None

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Options:
        """Build options from keywords.

        Raises:
            ValueError: An unknown name or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"expected strategy options among {sorted(known)}, got {unknown}; correct the name")
        return cls(**values)

    @property
    def boxes(self) -> BoxFilter:
        """Which boxes count."""
        preset = BoxFilter.reference() if self.preset == "reference" else BoxFilter()
        own = {name: getattr(self, name) for name in ("max_detections", "min_size_px", "max_aspect")}
        given = {name: value for name, value in own.items() if value is not None}
        return replace(preset, score_threshold=self.score_threshold, **given)


@dataclass(frozen=True)
class StagedStrategy:
    """A strategy of two stages: score the pool and keep candidates, then select among them.

    Args:
        name: Its name.
        scorer: Stage 1.
        selector: Stage 2.
        options: Settings.
        whole_pool: Whether every image is a candidate, instead of delta times the budget.
        widest: Largest share of the pool that may be candidates, in (0, 1], where delta times the budget is more; at
            least the paper's four budgets are. 1 is the paper's rule.
        needs: See :data:`Needs`.
    """

    name: str
    scorer: Scorer
    selector: Selector
    options: Options
    whole_pool: bool = False
    widest: float = 1.0
    needs: Needs = field(default_factory=dict)

    def candidates(self, context: QueryContext, budget: int, rng: np.random.Generator) -> CandidatePool:
        """Score the pool and keep the candidates of largest utility, ties by lowest id.

        Raises:
            ValueError: The budget is below 1, or the context lacks what the strategy needs.
        """
        limits = self._budget(context, budget)
        if not context.pool:
            return CandidatePool((), {})
        values = self.scorer.utilities(context, rng)
        utilities = dict(zip(context.pool_ids, values.tolist(), strict=True))
        place = {image_id: p for p, image_id in enumerate(context.pool_ids)}
        order = [place[i] for i in by_utility(utilities, utilities)]
        kept = order if self.whole_pool else limits.expanded(order, self._delta(limits))
        return CandidatePool(tuple(context.pool_ids[p] for p in kept), utilities)

    def query(
        self,
        context: QueryContext,
        budget: int,
        rng: np.random.Generator,
        candidates: CandidatePool | None = None,
    ) -> QuerySet:
        """Choose a query set.

        Args:
            context: What may be looked at.
            budget: Images (or boxes, see ``Options.unit``), >= 1. All candidates are chosen when they fit.
            rng: Source of randomness.
            candidates: Stage-1 answer to go on from; None runs stage 1.

        Returns:
            Chosen ids in labeling order, with an explanation each; empty for an empty pool.

        Raises:
            ValueError: The budget is below 1, a candidate is not in the pool, or the context lacks what the
                strategy needs.
        """
        limits = self._budget(context, budget)
        chosen = candidates if candidates is not None else self.candidates(context, budget, rng)
        if not chosen.image_ids:
            return QuerySet((), dict(chosen.utilities), ())
        place = {image_id: p for p, image_id in enumerate(context.pool_ids)}
        outside = [i for i in chosen.image_ids if i not in place]
        if outside:
            raise ValueError(f"expected every candidate in the pool, got {outside[:5]} outside; recompute stage 1")
        ids = by_utility(chosen.image_ids, chosen.utilities)
        selection = self.selector.select(context, [place[i] for i in ids], limits, rng)
        parts = self.scorer.explain(context, selection.positions)
        return QuerySet(
            image_ids=tuple(context.pool_ids[p] for p in selection.positions),
            utilities=dict(chosen.utilities),
            candidate_ids=tuple(ids),
            explanations=explain(context, selection, chosen.utilities, parts),
        )

    def _delta(self, limits: Budget) -> float:
        widest = max(PAPER_DELTA, self.widest * sum(limits.costs) / limits.limit)
        return min(self.options.delta, widest)

    def _budget(self, context: QueryContext, budget: int) -> Budget:
        boxes = self.options.boxes
        if self.options.unit == "images":
            return Budget(budget, [1] * len(context.pool))
        return Budget(budget, [max(1, len(boxes.valid_rows(d))) for d in without_embeddings(context.pool)])


TOP_BOXES = 5
TOP_CLASSES = 5


def top_boxes(detections: Detections, parts: BoxContributions) -> tuple[BoxContribution, ...]:
    """The boxes that contribute most, largest first; ties by lowest row."""
    rows, values = parts.rows.tolist(), parts.values.tolist()
    best = sorted(range(len(rows)), key=lambda k: (-values[k], rows[k]))[:TOP_BOXES]
    boxes = as_tensor(detections.boxes_xyxy)
    made = []
    for k in best:
        x1, y1, x2, y2 = (float(v) for v in boxes[rows[k]])
        cls, score = int(detections.class_indices[rows[k]]), float(detections.scores[rows[k]])
        second = _second_class(detections, rows[k], cls)
        made.append(BoxContribution(rows[k], (x1, y1, x2, y2), cls, score, values[k], *second))
    return tuple(made)


def _second_class(detections: Detections, row: int, own: int) -> tuple[int | None, float | None]:
    """The likeliest class of a box beside its own, and its share of the own one's probability, at most 1."""
    if detections.class_probs is None:
        return None, None
    probs = as_tensor(detections.class_probs)[row].double().clone()
    if detections.softmax:
        probs = probs[:-1]  # the last one is the background
    if len(probs) < 2 or float(probs[own]) <= 0:
        return None, None
    of_own, probs[own] = float(probs[own]), -1.0
    second = int(probs.argmax())
    return second, min(1.0, max(0.0, float(probs[second]) / of_own))


def top_classes(detections: Detections, parts: BoxContributions) -> tuple[ClassContribution, ...]:
    """The classes that contribute most, largest first; ties by lowest class."""
    sums: dict[int, tuple[int, float]] = {}
    classes = as_tensor(detections.class_indices)[parts.rows].tolist()
    for cls, value in zip(classes, parts.values.tolist(), strict=True):
        boxes, total = sums.get(cls, (0, 0.0))
        sums[cls] = (boxes + 1, total + value)
    best = sorted(sums, key=lambda cls: (-sums[cls][1], cls))[:TOP_CLASSES]
    return tuple(ClassContribution(cls, *sums[cls]) for cls in best)


def explain(
    context: QueryContext,
    selection: Selection,
    utilities: Mapping[int, float],
    parts: Sequence[BoxContributions | None],
) -> dict[int, Explanation]:
    """Explain every pick.

    Args:
        context: What the strategy saw.
        selection: What it chose.
        utilities: Utility of every image of the pool, by id.
        parts: For each chosen position, what its boxes add to its utility, or None.

    Returns:
        Image id to explanation.
    """
    utility_rank = {image_id: rank for rank, image_id in enumerate(by_utility(utilities, utilities))}
    made = {}
    for rank, (position, boxes) in enumerate(zip(selection.positions, parts, strict=True)):
        detections = context.pool[position]
        near = selection.neighbours.get(position)
        made[detections.image_id] = Explanation(
            image_id=detections.image_id,
            rank=rank,
            utility=utilities[detections.image_id],
            utility_rank=utility_rank[detections.image_id],
            classes=top_classes(detections, boxes) if boxes is not None else (),
            boxes=top_boxes(detections, boxes) if boxes is not None else (),
            cluster_size=selection.cluster_sizes.get(position),
            nearest_chosen=near.image_id if near else None,
            nearest_similarity=near.similarity if near else None,
            nearest_distance=near.distance if near else None,
        )
    return made
