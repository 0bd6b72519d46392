"""Stage 1: utilities of the pool and the candidate pool (Difficulty Calibrated Uncertainty Sampling and relatives)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from ppal_backend.acquisition.arrays import as_tensor
from ppal_backend.acquisition.difficulty import difficulty_coefficients
from ppal_backend.acquisition.uncertainty import (
    AGGREGATES,
    MEASURES,
    BoxContributions,
    BoxFilter,
    aggregate_values,
    batch_uncertainties,
    contributions,
)
from ppal_backend.structures import Detections, QueryContext
from ppal_backend.structures.stream import StreamedImages, without_embeddings

logger = logging.getLogger(__name__)

ClassWeights = Callable[[QueryContext], torch.Tensor | None]


class Scorer(Protocol):
    """Stage 1: a utility for every image."""

    def utilities(self, context: QueryContext, rng: np.random.Generator) -> np.ndarray:
        """``[N]`` finite utilities in the order of the pool."""

    def explain(self, context: QueryContext, positions: Sequence[int]) -> list[BoxContributions | None]:
        """What the boxes of some pool images add to their utilities, or None where boxes play no part."""


class RandomScorer:
    """Uniform random utilities in [0, 1)."""

    def utilities(self, context: QueryContext, rng: np.random.Generator) -> np.ndarray:
        """``[N]`` random utilities."""
        return rng.random(len(context.pool))

    def explain(self, context: QueryContext, positions: Sequence[int]) -> list[BoxContributions | None]:
        """Nothing to explain."""
        return [None] * len(positions)


class UncertaintyScorer:
    """Summed (or mean, or largest) weighted uncertainty of an image's boxes (Eq. 5).

    Args:
        measure: ``entropy``, ``posterior`` or ``margin``.
        aggregate: ``sum``, ``mean`` or ``max``.
        boxes: Which boxes count.
        weights: Gives ``[C]`` class weights for a context, or None for 1.
    """

    def __init__(
        self,
        measure: str = "entropy",
        aggregate: str = "sum",
        boxes: BoxFilter | None = None,
        weights: ClassWeights | None = None,
    ) -> None:
        if measure not in MEASURES:
            raise ValueError(f"expected measure to be one of {MEASURES}, got {measure!r}")
        if aggregate not in AGGREGATES:
            raise ValueError(f"expected aggregate to be one of {AGGREGATES}, got {aggregate!r}")
        self.measure, self.aggregate, self.boxes = measure, aggregate, boxes or BoxFilter()
        self._weights = weights

    def box_values(self, context: QueryContext, images: Sequence[Detections]) -> list[BoxContributions]:
        """Contributions of the boxes of some images."""
        weights = self._weights(context) if self._weights else None
        return [contributions(d, weights, self.measure, self.boxes) for d in images]

    def utilities(self, context: QueryContext, rng: np.random.Generator) -> np.ndarray:
        """``[N]`` uncertainties >= 0; of a pool that lies on disk shard by shard."""
        if isinstance(context.pool, StreamedImages):
            weights = self._weights(context) if self._weights else None
            shards = (
                batch_uncertainties(batch, weights, self.measure, self.aggregate, self.boxes)
                for batch in context.pool.batches()
            )
            return np.asarray([value for values in shards for value in values], dtype=np.float64)
        values = [aggregate_values(c.values, self.aggregate) for c in self.box_values(context, context.pool)]
        return np.asarray(values, dtype=np.float64)

    def explain(self, context: QueryContext, positions: Sequence[int]) -> list[BoxContributions | None]:
        """Weighted uncertainty of each box that counts."""
        return list(self.box_values(context, [context.pool[p] for p in positions]))


def difficulty_weights(alpha: float = 0.3, beta: float = 0.2) -> ClassWeights:
    """Class weights by Eq. 4; without known difficulties every class has difficulty 1, as before training."""

    def weights(context: QueryContext) -> torch.Tensor:
        if context.difficulty is None:
            logger.info("no class difficulties given: every class counts as difficulty 1")
            return as_tensor(difficulty_coefficients(torch.ones(context.num_classes, dtype=torch.float64), alpha, beta))
        return as_tensor(difficulty_coefficients(as_tensor(context.difficulty), alpha, beta))

    return weights


def frequency_weights(context: QueryContext) -> torch.Tensor:
    """Class weights 1 - class frequency in the labelled set (Table 1, D-Freq).

    Raises:
        ValueError: The context holds no class counts.
    """
    if context.class_counts is None:
        raise ValueError(
            f"expected class_counts with shape ({context.num_classes},) in the context, got None; "
            f"count the annotated instances per class"
        )
    counts = as_tensor(context.class_counts).double()
    return 1.0 - counts / counts.sum().clamp(min=1.0)


def balanced_weights(base: ClassWeights, strength: float = 1.0, boxes: BoxFilter | None = None) -> ClassWeights:
    """Multiply class weights by 1 + strength * (1 - f_c / max f), f_c the summed score of class c in the pool.

    The class predicted most keeps its weight; one that is hardly ever predicted counts up to 1 + strength times.
    """
    if not strength >= 0:
        raise ValueError(f"expected strength >= 0, got {strength}")

    def weights(context: QueryContext) -> torch.Tensor:
        chosen = boxes or BoxFilter()
        mass = torch.zeros(context.num_classes, dtype=torch.float64)
        for d in without_embeddings(context.pool):
            rows = chosen.valid_rows(d)
            classes = as_tensor(d.class_indices)[rows].long().cpu()
            mass.index_add_(0, classes, as_tensor(d.scores)[rows].double().cpu())
        share = mass / mass.max().clamp(min=torch.finfo(torch.float64).tiny)
        start = base(context)
        factor = 1.0 + strength * (1.0 - share)
        return factor if start is None else start.double().cpu() * factor

    return weights
