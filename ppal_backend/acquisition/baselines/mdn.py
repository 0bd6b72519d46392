"""How mixture density outputs become a utility of an image: the largest of four uncertainties, each as a z-score.

Source: Choi, Elezi, Lee, Farabet and Alvarez, "Active Learning for Deep Object Detection via Probabilistic Modeling",
ICCV 2021, arXiv:2103.16130, Sec. 3.3. A detection has the uncertainties :data:`KINDS`. Of each kind an image keeps its
largest; that is compared with the mean and standard deviation of the kind over all detections of the pool, and the
largest of the four comparisons is the image's utility. Detections count from a score of 0.5, as in the authors' code.

Liberties: the authors give images without such a detection -99999; here they come last by id, one below the lowest
other utility, so that utilities stay readable. A kind that is the same for all detections compares as 0, where theirs
divides by zero.
"""

from __future__ import annotations

import numpy as np
import torch

from ppal_backend.acquisition.dcus import Scorer
from ppal_backend.structures import QueryContext
from ppal_backend.structures.detections import to_numpy

KINDS = ("localisation, aleatoric", "localisation, epistemic", "class, aleatoric", "class, epistemic")
LOWEST_SCORE = 0.5
WIDTH = 1 + 3 * len(KINDS)
"""Numbers that describe an image: detections that count, then largest, sum and sum of squares of each kind."""


def image_summary(uncertainties: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """What has to be known of an image for the utilities of a pool.

    Args:
        uncertainties: ``[n, 4]`` >= 0, one column for each of :data:`KINDS`.
        scores: ``[n]`` in [0, 1].

    Returns:
        ``[WIDTH]`` float32; zeros without a detection that counts.
    """
    counted = uncertainties[scores >= LOWEST_SCORE].float()
    if not len(counted):
        return counted.new_zeros(WIDTH)
    count = counted.new_tensor([float(len(counted))])
    return torch.cat([count, counted.max(0).values, counted.sum(0), counted.square().sum(0)])


def pool_utilities(summaries: np.ndarray) -> np.ndarray:
    """Utilities of a pool from the summaries of its images.

    Args:
        summaries: ``[N, WIDTH]``.

    Returns:
        ``[N]`` float64 of any sign.
    """
    rows = summaries.astype(np.float64)
    counts, largest, sums, squares = rows[:, 0], rows[:, 1:5], rows[:, 5:9], rows[:, 9:]
    total = counts.sum()
    if not total:
        return np.zeros(len(rows))
    mean = sums.sum(0) / total
    spread = np.sqrt(np.clip(squares.sum(0) / total - mean**2, 0.0, None))
    same = spread <= 1e-6 * np.abs(mean)  # what is left of equal numbers in single precision
    scores = np.where(same, 0.0, (largest - mean) / np.where(same, 1.0, spread)).max(1)
    return np.where(counts > 0, scores, scores[counts > 0].min() - 1.0)


class MixtureScorer(Scorer):
    """Utilities by :func:`pool_utilities` from ``image_features["mdn"]``, ``[N, WIDTH]``."""

    def utilities(self, context: QueryContext, rng: np.random.Generator) -> np.ndarray:
        """``[N]`` utilities of any sign.

        Raises:
            ValueError: The context holds no summaries.
        """
        found = context.image_features.get("mdn")
        if found is None or tuple(found.shape) != (len(context.pool), WIDTH):
            raise ValueError(
                f"expected image_features['mdn'] with shape ({len(context.pool)}, {WIDTH}), got "
                f"{None if found is None else tuple(found.shape)}; look at the pool with a detector that was trained "
                f"with mdn"
            )
        return pool_utilities(to_numpy(found))
