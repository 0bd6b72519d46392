"""Stage 1: utilities of the pool and the candidate pool (Difficulty Calibrated Uncertainty Sampling and relatives)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
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
    box_uncertainty,
    contributions,
)
from ppal_backend.structures import Detections, QueryContext
from ppal_backend.structures.detections import to_numpy
from ppal_backend.structures.stream import StreamedImages, without_embeddings

logger = logging.getLogger(__name__)

ClassWeights = Callable[[QueryContext], torch.Tensor | None]


class Scorer(Protocol):
    """Stage 1: a utility for every image."""

    def utilities(self, context: QueryContext, rng: np.random.Generator) -> np.ndarray:
        """``[N]`` finite utilities in the order of the pool."""

    def explain(self, context: QueryContext, positions: Sequence[int]) -> list[BoxContributions | None]:
        """What the boxes of some pool images add to their utilities, or None where boxes play no part: by default."""
        return [None] * len(positions)


class RandomScorer(Scorer):
    """Uniform random utilities in [0, 1)."""

    def utilities(self, context: QueryContext, rng: np.random.Generator) -> np.ndarray:
        """``[N]`` random utilities."""
        return rng.random(len(context.pool))


class ModelScorer(Scorer):
    """The utility that a detector itself gives of each image: ``image_features[name]``, ``[N, 1]``.

    Args:
        name: The method that changed the detector (see :data:`~ppal_backend.acquisition.strategies.RIVALS`).
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def utilities(self, context: QueryContext, rng: np.random.Generator) -> np.ndarray:
        """``[N]`` utilities of any sign.

        Raises:
            ValueError: The context holds none.
        """
        found = context.image_features.get(self._name)
        if found is None or tuple(found.shape) != (len(context.pool), 1):
            raise ValueError(
                f"expected image_features[{self._name!r}] with shape ({len(context.pool)}, 1), got "
                f"{None if found is None else tuple(found.shape)}; look at the pool with a detector that was trained "
                f"with {self._name}"
            )
        return to_numpy(found)[:, 0].astype(np.float64)


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
        return self.of(context, context.pool)

    def of(self, context: QueryContext, images: Sequence[Detections]) -> np.ndarray:
        """Uncertainties of some images."""
        values = [aggregate_values(c.values, self.aggregate) for c in self.box_values(context, images)]
        return np.asarray(values, dtype=np.float64)

    def explain(self, context: QueryContext, positions: Sequence[int]) -> list[BoxContributions | None]:
        """Weighted uncertainty of each box that counts."""
        return list(self.box_values(context, [context.pool[p] for p in positions]))


IMAGE_S, BOX_S = 5.0, 7.0
"""Seconds to open and search an image (an assumption) and to draw a box (Papadopoulos et al., Extreme clicking for
efficient object annotation, ICCV 2017, arXiv:1708.02750)."""


class GainScorer:
    """What labelling an image is expected to teach, for the time that it is expected to take.

    With ``e_b`` the uncertainty of box b as a share of the largest possible one, ``a_c`` the weight of class c, and
    ``s_b`` scores::

        gain    = sum over classes c of a_c * log(1 + sum over boxes b of class c of e_b)
        cost    = (IMAGE_S + BOX_S * sum of s_b) ^ price
        utility = gain / cost

    The tenth doubtful fish of an image teaches less than the first one, so a crowd does not beat two doubtful
    stingrays; and every box takes time. ``price`` is 0 where people are paid by the image, 1 where by the second.

    Args:
        measure: ``entropy``, ``posterior`` or ``margin``.
        boxes: Which boxes count.
        weights: Gives ``[C]`` class weights for a context, or None for 1.
        price: Power of the cost, in [0, 1].
    """

    def __init__(self, measure: str, boxes: BoxFilter, weights: ClassWeights | None, price: float) -> None:
        self._measure, self._boxes, self._weights, self._price = measure, boxes, weights, price

    def utilities(self, context: QueryContext, rng: np.random.Generator) -> np.ndarray:
        """``[N]`` gains for their cost, >= 0; of a pool that lies on disk shard by shard."""
        if not isinstance(context.pool, StreamedImages):
            return self.of(context, context.pool)
        return self._for_cost(
            context, ((b.joined, *self._boxes.valid_rows_of_batch(b)) for b in context.pool.batches())
        )

    def of(self, context: QueryContext, images: Sequence[Detections]) -> np.ndarray:
        """Utilities of some images."""
        counted = ((d, rows := self._boxes.valid_rows(d), torch.tensor([len(rows)])) for d in images)
        return self._for_cost(context, counted)

    def explain(self, context: QueryContext, positions: Sequence[int]) -> list[BoxContributions | None]:
        """Of each box that counts its part of the utility: boxes of a class share by their uncertainty."""
        weights, made = self._class_weights(context), []
        for image in without_embeddings([context.pool[p] for p in positions]):
            rows = self._boxes.valid_rows(image)
            mass, scores = self._masses(image, rows, torch.tensor([len(rows)]), context.num_classes)
            share = weights * np.log1p(mass[0]) / np.maximum(mass[0], np.finfo(float).tiny) / self._cost(scores)[0]
            classes = to_numpy(image.class_indices)[rows.cpu().numpy()]
            values = self._shares(image)[rows.cpu().numpy()] * share[classes]
            made.append(BoxContributions(rows, torch.from_numpy(values)))
        return list(made)

    def _class_weights(self, context: QueryContext) -> np.ndarray:
        weights = self._weights(context) if self._weights else None
        return np.ones(context.num_classes) if weights is None else to_numpy(weights).astype(np.float64)

    def _shares(self, found: Detections) -> np.ndarray:
        """Uncertainty of every box as a share of the largest possible one."""
        classes = 2 if found.class_probs is None or not found.softmax else found.class_probs.shape[1]
        largest = {"entropy": math.log(classes), "posterior": 1.0, "margin": 1.0}[self._measure]
        return to_numpy(box_uncertainty(found, self._measure)) / largest

    def _masses(
        self, found: Detections, rows: torch.Tensor, held: torch.Tensor, num_classes: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """``[m, C]`` summed uncertainty by class and ``[m]`` summed score of m images, whose boxes are ``rows``."""
        kept, images = rows.cpu().numpy(), np.repeat(np.arange(len(held)), held.cpu().numpy())
        cells = images * num_classes + to_numpy(found.class_indices)[kept].astype(np.int64)
        mass = np.bincount(cells, self._shares(found)[kept], minlength=len(held) * num_classes)
        scores = np.bincount(images, to_numpy(found.scores)[kept].astype(np.float64), minlength=len(held))
        return mass.reshape(len(held), num_classes), scores

    def _cost(self, scores: np.ndarray) -> np.ndarray:
        return (IMAGE_S + BOX_S * scores) ** self._price

    def _for_cost(
        self, context: QueryContext, counted: Iterable[tuple[Detections, torch.Tensor, torch.Tensor]]
    ) -> np.ndarray:
        """Utilities of images whose boxes come together: with the rows that count, and how many each image has."""
        weights, parts = self._class_weights(context), [np.zeros(0)]
        for one in counted:
            mass, scores = self._masses(*one, context.num_classes)
            parts.append((np.log1p(mass) * weights).sum(1) / self._cost(scores))
        return np.concatenate(parts)


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


def rarity_weights(base: ClassWeights, strength: float = 1.0) -> ClassWeights:
    """Multiply class weights by sqrt((mean n + 1) / (n_c + 1)) ^ strength, n_c the labelled boxes of c, where these are
    known."""
    if not strength >= 0:
        raise ValueError(f"expected strength >= 0, got {strength}")

    def weights(context: QueryContext) -> torch.Tensor | None:
        start = base(context)
        if context.class_counts is None:
            return start
        counts = as_tensor(context.class_counts).double().cpu()
        factor = ((counts.mean() + 1.0) / (counts + 1.0)).sqrt() ** strength
        return factor if start is None else start.double().cpu() * factor

    return weights


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
