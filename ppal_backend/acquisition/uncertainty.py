"""Uncertainty of boxes and images (Eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ppal_backend.acquisition.arrays import Array, as_tensor, require_finite
from ppal_backend.structures import Detections
from ppal_backend.structures.detections import is_tensor
from ppal_backend.structures.stream import ImageBatch

MEASURES = ("entropy", "posterior", "margin")
AGGREGATES = ("sum", "mean", "max")
MAX_DETECTIONS = 100


@dataclass(frozen=True)
class BoxFilter:
    """Which detections count.

    Args:
        score_threshold: Lowest score that counts, in [0, 1].
        max_detections: Highest-scored detections per image that count, >= 1.
        min_size_px: Boxes with sqrt(area) <= this do not count; 0 keeps all. Of a box only what lies in its image is
            measured, where the image's size is known.
        max_aspect: Boxes whose longer side is more than this times the shorter do not count; None keeps all.
    """

    score_threshold: float = 0.05
    max_detections: int = MAX_DETECTIONS
    min_size_px: float = 0.0
    max_aspect: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.score_threshold <= 1.0:
            raise ValueError(f"expected score_threshold in [0, 1], got {self.score_threshold}")
        if self.max_detections < 1:
            raise ValueError(f"expected max_detections >= 1, got {self.max_detections}")
        if not self.min_size_px >= 0.0:
            raise ValueError(f"expected min_size_px >= 0, got {self.min_size_px}")
        if self.max_aspect is not None and not self.max_aspect >= 1.0:
            raise ValueError(f"expected max_aspect >= 1 or None, got {self.max_aspect}")

    @classmethod
    def reference(cls) -> BoxFilter:
        """The filter of the authors' code (ChenhongyiYang/PPAL): sqrt(area) > 16 px, aspect <= 5, the 200 best boxes.

        What differs from their code:

        * They filter by size and aspect in stage 1 only, and give CCMS the 100 best boxes of a second pass with a
          suppression of its own. Here both stages count the same boxes of one pass.
        * They clip boxes to the right and lower edge, as theirs begin inside the image; here to all four.
        * In CCMS they count scores above the threshold; here scores equal to it count too, as in stage 1.
        * A detector gives no more boxes than its own ``max_per_img``, 100 in this project's zoo.

        It is a filter and no more. Of their other choices ``DifficultyEMA(absent="drift")`` and
        ``Options(first="random")`` are options; the embedding from the classification tower is not offered, and their
        CCMS, in which the k-th boxes of any two images count as equal, is not reproduced (it is not Eq. 6).
        """
        return cls(max_detections=200, min_size_px=16.0, max_aspect=5.0)

    def _of_size_and_shape(self, detections: Detections, sizes: torch.Tensor | None = None) -> torch.Tensor | None:
        """``[n]`` bool, which boxes, as far as they lie in the image, have a size and shape that counts; None: all.

        ``sizes`` holds ``[n, 2]`` width and height of each box's image where there are several.
        """
        if self.min_size_px <= 0 and self.max_aspect is None:
            return None
        corners = as_tensor(detections.boxes_xyxy).double()
        x, y = corners[:, 0::2], corners[:, 1::2]
        if detections.image_size is not None:
            sizes = torch.tensor([detections.image_size], device=corners.device)
        if sizes is not None:
            x, y = (v.clamp(min=0.0).minimum(sizes[:, k : k + 1].double()) for k, v in enumerate((x, y)))
        width, height = ((v[:, 1] - v[:, 0]).clamp(min=0.0) for v in (x, y))
        keep = (width * height).sqrt() > self.min_size_px
        if self.max_aspect is not None:
            keep &= torch.maximum(width, height) <= self.max_aspect * torch.minimum(width, height)
        return keep

    def shaped(self, detections: Detections) -> Detections:
        """The detections without boxes of a size or shape that does not count; low scores stay."""
        keep = self._of_size_and_shape(detections)
        if keep is None or bool(keep.all()):
            return detections
        return detections.filter(keep if is_tensor(detections.scores) else keep.numpy())

    def valid_rows(self, detections: Detections) -> torch.Tensor:
        """Return the rows of ``detections`` that count, ascending (int64, on their device)."""
        scores = as_tensor(detections.scores)
        keep = scores >= self.score_threshold
        shaped = self._of_size_and_shape(detections)
        rows = torch.nonzero(keep if shaped is None else keep & shaped)[:, 0]
        return self._best(scores, rows)

    def _best(self, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The ``max_detections`` of one image's rows with the highest scores, ascending."""
        if len(rows) <= self.max_detections:
            return rows
        order = torch.sort(scores[rows], descending=True, stable=True).indices[: self.max_detections]
        return rows[order].sort().values

    def valid_rows_of_batch(self, batch: ImageBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """What :meth:`valid_rows` gives for each image of a batch.

        Returns:
            ``[v]`` rows of ``batch.joined`` that count, ascending, and ``[m]`` how many each image has of them.
        """
        scores = as_tensor(batch.joined.scores)
        counts = torch.as_tensor(batch.counts)
        images = torch.repeat_interleave(torch.arange(len(batch)), counts)
        sizes = None if batch.image_sizes is None else torch.as_tensor(batch.image_sizes)[images]
        keep = scores >= self.score_threshold
        shaped = self._of_size_and_shape(batch.joined, sizes)
        rows = torch.nonzero(keep if shaped is None else keep & shaped)[:, 0]
        held = torch.bincount(images[rows], minlength=len(batch))
        if len(held) and int(held.max()) > self.max_detections:
            rows = torch.cat([self._best(scores, part) for part in rows.split(held.tolist())])
            held = held.clamp(max=self.max_detections)
        return rows, held

    def counted(self, detections: Detections) -> Detections:
        """The detections that count alone, without the rest in memory."""
        rows = self.valid_rows(detections)
        return detections.filter(rows if is_tensor(detections.scores) else rows.numpy())


def _plogp(p: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(p)


def binary_uncertainty(p: Array, measure: str = "entropy") -> torch.Tensor:
    """Uncertainty of a yes-no probability.

    Args:
        p: ``[n]`` probabilities in [0, 1].
        measure: ``entropy`` (nats, at most log 2), ``posterior`` (1 - p) or ``margin`` (1 - |2p - 1|).

    Returns:
        ``[n]`` float64 values >= 0.
    """
    values = as_tensor(p).double()
    if measure == "entropy":
        return _plogp(values) + _plogp(1.0 - values)
    if measure == "posterior":
        return 1.0 - values
    if measure == "margin":
        return 1.0 - (2.0 * values - 1.0).abs()
    raise ValueError(f"expected measure to be one of {MEASURES}, got {measure!r}")


def softmax_uncertainty(probs: Array, measure: str = "entropy") -> torch.Tensor:
    """Uncertainty of a distribution.

    Args:
        probs: ``[n, k]`` rows that sum to 1.
        measure: ``entropy`` (nats, at most log k), ``posterior`` (1 - largest) or ``margin`` (1 - difference of
            the two largest).

    Returns:
        ``[n]`` float64 values >= 0.
    """
    values = as_tensor(probs).double()
    if measure == "entropy":
        return _plogp(values.clamp(min=0.0)).sum(1)
    if measure == "posterior":
        return 1.0 - values.max(1).values
    if measure == "margin":
        top = values.topk(min(2, values.shape[1]), dim=1).values
        return 1.0 - (top[:, 0] - top[:, 1]) if top.shape[1] == 2 else torch.zeros_like(values[:, 0])
    raise ValueError(f"expected measure to be one of {MEASURES}, got {measure!r}")


def box_uncertainty(detections: Detections, measure: str = "entropy") -> torch.Tensor:
    """Uncertainty of each box, before class weights.

    Softmax detectors (``detections.softmax`` with ``class_probs``) use their whole distribution over C + 1
    classes; all others the binary distribution of the final score (C' = 2). ``posterior`` is 1 - top score: of the
    distribution for softmax detectors, 1 - score for the others.

    Args:
        detections: ``n`` boxes.
        measure: See :data:`MEASURES`.

    Returns:
        ``[n]`` float64 values >= 0 on the device of the detections.

    Source: inner sum of Eq. 5; Table 3 for the other measures.
    """
    if measure not in MEASURES:
        raise ValueError(f"expected measure to be one of {MEASURES}, got {measure!r}")
    if detections.softmax and detections.class_probs is not None:
        return softmax_uncertainty(detections.class_probs, measure).clamp(min=0.0)
    return binary_uncertainty(detections.scores, measure).clamp(min=0.0)


@dataclass(frozen=True, eq=False)
class BoxContributions:
    """What each counting box adds to its image's utility.

    Args:
        rows: ``[m]`` rows of the boxes in the image's detections.
        values: ``[m]`` weighted uncertainties >= 0, float64.
    """

    rows: torch.Tensor
    values: torch.Tensor


def contributions(
    detections: Detections, coefficients: Array | None, measure: str = "entropy", boxes: BoxFilter | None = None
) -> BoxContributions:
    """Weighted uncertainty of every box that counts.

    Args:
        detections: Boxes of one image.
        coefficients: ``[C]`` class weights >= 0, or None for 1.
        measure: See :data:`MEASURES`.
        boxes: Which boxes count; default score >= 0.05, at most 100.

    Raises:
        ValueError: Weights have the wrong shape, are negative or not finite; the measure is unknown.
    """
    rows = (boxes or BoxFilter()).valid_rows(detections)
    return BoxContributions(rows, _weighted(detections, rows, coefficients, measure))


def _weighted(detections: Detections, rows: torch.Tensor, coefficients: Array | None, measure: str) -> torch.Tensor:
    """Uncertainty of some boxes times the weight of their class."""
    values = box_uncertainty(detections, measure)[rows]
    if coefficients is None:
        return values
    weights = as_tensor(coefficients).double()
    if weights.ndim != 1:
        raise ValueError(f"expected coefficients with shape (C,), got {tuple(weights.shape)}")
    require_finite(weights, "coefficients")
    if len(weights) and float(weights.min()) < 0:
        raise ValueError(f"expected coefficients >= 0, got {float(weights.min())}")
    classes = as_tensor(detections.class_indices)[rows].long()
    if len(classes) and int(classes.max()) >= len(weights):
        raise ValueError(
            f"expected coefficients with shape (C,) for class indices up to {int(classes.max())}, got "
            f"({len(weights)},); give one weight per class"
        )
    return values * weights.to(values.device)[classes]


def batch_uncertainties(
    batch: ImageBatch, coefficients: Array | None, measure: str, aggregate: str, boxes: BoxFilter
) -> list[float]:
    """:func:`image_uncertainty` of every image of a batch, to the bit, with one computation for all boxes."""
    rows, held = boxes.valid_rows_of_batch(batch)
    values = _weighted(batch.joined, rows, coefficients, measure)
    return [aggregate_values(part, aggregate) for part in values.split(held.tolist())]


def image_uncertainty(
    detections: Detections,
    coefficients: Array | None,
    measure: str = "entropy",
    score_threshold: float = 0.05,
    aggregate: str = "sum",
    boxes: BoxFilter | None = None,
) -> float:
    """Uncertainty of an image, the weighted sum over its boxes.

    Args:
        detections: Boxes of one image after NMS.
        coefficients: ``[C]`` class weights (Eq. 4), or None for 1.
        measure: ``entropy``, ``posterior`` or ``margin``.
        score_threshold: Lowest score that counts. Ignored when ``boxes`` is given.
        aggregate: ``sum`` (the paper), ``mean`` or ``max`` over boxes.
        boxes: Complete filter, for size and aspect limits.

    Returns:
        A float >= 0 (nats for entropy); 0 for an image without boxes that count.

    Raises:
        ValueError: See :func:`contributions`; or an unknown aggregate.

    Source: Eq. 5.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"expected aggregate to be one of {AGGREGATES}, got {aggregate!r}")
    chosen = boxes if boxes is not None else BoxFilter(score_threshold=score_threshold)
    return aggregate_values(contributions(detections, coefficients, measure, chosen).values, aggregate)


def aggregate_values(values: torch.Tensor | np.ndarray, aggregate: str = "sum") -> float:
    """Join box values into one image value; 0 for none."""
    tensor = as_tensor(values)
    if not len(tensor):
        return 0.0
    if aggregate == "mean":
        return float(tensor.mean())
    return float(tensor.max() if aggregate == "max" else tensor.sum())
