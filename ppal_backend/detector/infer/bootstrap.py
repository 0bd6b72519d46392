"""How sure an mAP is, and whether one detector is better than another on the same images: a bootstrap over the images.

Detections are matched with the annotations once, by pycocotools; a resample only counts each image's matches as often
as it was drawn, which gives what evaluating the copies would (but for equal scores of different images, whose order is
anybody's).

On few images mAP is too high (the best precision from a recall on is taken, and chance adds to a maximum), and classes
with boxes in three images vary more than a resample of these three shows: plain percentiles hold the truth in 60 to
90 % of cases. So the interval is as wide as Student's t asks for with the degrees of freedom that the classes' images
leave, and its ends are moved by what mAP is too high by: the bootstrap's estimate, and that of halves of the images
(the excess falls with about the 2/3 power of their number), which is larger. The interval reaches from the one to the
other. What another training on the same data would give is in no interval.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval
from scipy import stats

from ppal_backend.structures.quality import (
    FEWEST_BOXES,
    FEWEST_IMAGES,
    FEWEST_IMAGES_OF_A_CLASS,
    Difference,
    Interval,
    Measured,
)

RESAMPLES = 500
HALVES = 200
EXCESS_OF_HALVES = 1.7
"""The excess of all images over that of halves less that of all: 1 / (2 ** (2 / 3) - 1)."""
COVERED = 0.95
_AT_ONCE = 2**20


def measure(evaluator: COCOeval, labels: Sequence[str], seed: int = 0) -> Measured:
    """Tell what a set of images tells.

    Args:
        evaluator: After ``evaluate()``; objects of all sizes and its largest number of detections count.
        labels: Of the evaluator's categories, in their order.
        seed: Of the bootstrap; the same evaluation gives the same interval.
    """
    found = Evaluated(evaluator)
    ap = found.average_precision(np.ones((1, found.images), dtype=int))[0]
    return Measured(
        map=float(ap[found.measured].mean()) if found.measured.any() else None,
        interval=found.interval(ap, found.resampled(seed), found.halved(seed)),
        classes={label: float(ap[c]) for c, label in enumerate(labels) if found.measured[c]},
        too_few={label: int(found.boxes[c]) for c, label in enumerate(labels) if not found.measured[c]},
        images=found.images,
    )


def compare(evaluator: COCOeval, other: COCOeval, seed: int = 0) -> Difference | None:
    """Tell how much better a detector is than another.

    Args:
        evaluator: Of the detector, after ``evaluate()``.
        other: Of the other one, on the same images, annotations and classes.
        seed: Of the bootstrap, which draws the same images for both.

    Returns:
        None where no class is measured.
    """
    one, two = Evaluated(evaluator), Evaluated(other)
    if not one.measured.any():
        return None
    once = np.ones((1, one.images), dtype=int)
    ap = one.average_precision(once)[0] - two.average_precision(once)[0]
    resampled, halved = one.resampled(seed) - two.resampled(seed), one.halved(seed) - two.halved(seed)
    return Difference(float(ap[one.measured].mean()), one.interval(ap, resampled, halved, lowest=-1.0))


class Evaluated:
    """An evaluation, ready to be resampled; classes in the order of the evaluator's categories."""

    def __init__(self, evaluator: COCOeval) -> None:
        matches, images = list(_by_class(evaluator)), len(evaluator.params.imgIds)
        self._set(matches, np.asarray(evaluator.params.recThrs), images)

    def _set(self, matches: list[_Matches | None], recalls: np.ndarray, images: int) -> None:
        self._matches, self._recalls, self.images = matches, recalls, images
        self.boxes = np.array([0.0 if m is None else m.boxes.sum() for m in self._matches])
        self.images_of = np.array([0 if m is None else np.count_nonzero(m.boxes) for m in self._matches])
        self.measured = (self.boxes >= FEWEST_BOXES) & (self.images_of >= FEWEST_IMAGES_OF_A_CLASS)

    def drawn(self, positions: Sequence[int] | np.ndarray) -> Evaluated:
        """The evaluation of some of the images, by their positions; an image may be drawn several times."""
        found = object.__new__(Evaluated)
        found._set([None if m is None else _drawn(m, positions) for m in self._matches], self._recalls, len(positions))
        return found

    def average_precision(self, times: np.ndarray) -> np.ndarray:
        """``[B, C]`` AP in sets in which images occur several times (``[B, N]``); NaN without a box of the class."""
        ap = np.full((len(times), len(self._matches)), np.nan)
        for position, matches in enumerate(self._matches):
            if matches is not None:
                for rows in _parts(len(times), len(matches.image)):
                    ap[rows, position] = _average_precision(matches, times[rows], self._recalls)
        return ap

    def resampled(self, seed: int) -> np.ndarray:
        """``[B, C]`` AP in sets of as many images, drawn with replacement; none of too few images."""
        if self.images < FEWEST_IMAGES:
            return np.zeros((0, len(self._matches)))
        even = np.full(self.images, 1.0 / self.images)
        return self.average_precision(np.random.default_rng(seed).multinomial(self.images, even, size=RESAMPLES))

    def halved(self, seed: int) -> np.ndarray:
        """``[B, C]`` AP in halves of the images, drawn without replacement; none of too few images."""
        if self.images < FEWEST_IMAGES:
            return np.zeros((0, len(self._matches)))
        order = np.random.default_rng(seed).random((HALVES, self.images)).argsort(axis=1)
        return self.average_precision((order < self.images // 2).astype(int))

    def interval(
        self, ap: np.ndarray, resampled: np.ndarray, halved: np.ndarray, lowest: float = 0.0
    ) -> Interval | None:
        """The interval of the mean of the measured classes.

        Args:
            ap: ``[C]`` of the images as they are.
            resampled: ``[B, C]`` of resamples.
            halved: ``[B, C]`` of halves.
            lowest: What the mean cannot be below.

        Returns:
            Low and high, at most 1; None of fewer than ``FEWEST_IMAGES`` images and without a measured class.

        Source: bootstrap t with the degrees of freedom of Welch and Satterthwaite; where no resample differs, the
            rule of three.
        """
        if not len(resampled) or not self.measured.any():
            return None
        of_class = resampled[:, self.measured]
        with warnings.catch_warnings():  # a resample may lack a class, or all
            warnings.simplefilter("ignore", RuntimeWarning)
            means = np.nanmean(of_class, axis=1)
            of_halves = float(np.nanmean(np.nanmean(halved[:, self.measured], axis=0)))
            variances = np.nan_to_num(np.nanvar(of_class, axis=0, ddof=1))
        means = means[np.isfinite(means)]
        point = float(ap[self.measured].mean())
        total = float(variances.sum())
        if total <= 0 or len(means) < 2:
            half, excess = 3.0 / self.images, (0.0, 0.0)
        else:
            freedom = self.images_of[self.measured] - 1.0
            widened = np.sqrt((variances * (freedom + 1) / freedom).sum() / total)
            quantile = stats.t.ppf((1 + COVERED) / 2, total**2 / (variances**2 / freedom).sum())
            half = float(quantile * widened * means.std(ddof=1))
            excess = float(means.mean()) - point, EXCESS_OF_HALVES * float(np.nan_to_num(of_halves - point))
        return max(lowest, point - max(excess) - half), min(1.0, point - min(excess) + half)


@dataclass(frozen=True)
class _Matches:
    """Detections of one class by falling score: ``[D]`` their image, ``[T, D]`` whether they are right or do not count
    at each IoU threshold; and ``[N]`` annotated boxes of each image."""

    image: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    boxes: np.ndarray


def _drawn(matches: _Matches, positions: Sequence[int] | np.ndarray) -> _Matches | None:
    boxes = matches.boxes[np.asarray(positions, int)]
    if not boxes.any():
        return None
    rows_of = [np.flatnonzero(matches.image == position) for position in positions]
    rows, image = np.concatenate(rows_of), np.repeat(np.arange(len(rows_of)), [len(rows) for rows in rows_of])
    order = np.argsort(rows, kind="stable")  # rows are by falling score
    rows, image = rows[order], image[order]
    return _Matches(image, matches.right[:, rows], matches.ignored[:, rows], boxes)


def _by_class(evaluator: COCOeval) -> Iterator[_Matches | None]:
    """Each class's; None without an annotated box."""
    images, areas = len(evaluator.params.imgIds), len(evaluator.params.areaRng)
    for position in range(len(evaluator.params.catIds)):
        first = position * areas * images  # objects of all sizes come first
        found = [(n, e) for n, e in enumerate(evaluator.evalImgs[first : first + images]) if e is not None]
        boxes = np.zeros(images)
        for n, of_image in found:
            boxes[n] = np.count_nonzero(np.asarray(of_image["gtIgnore"]) == 0)
        if not boxes.any():
            yield None
            continue
        scores = np.concatenate([e["dtScores"] for _, e in found])
        order = np.argsort(-scores, kind="mergesort")
        ignored = np.concatenate([e["dtIgnore"] for _, e in found], axis=1)[:, order].astype(bool)
        matched = np.concatenate([e["dtMatches"] for _, e in found], axis=1)[:, order] > 0
        image = np.repeat([n for n, _ in found], [len(e["dtScores"]) for _, e in found])[order]
        yield _Matches(image.astype(int), matched & ~ignored, ignored, boxes)


def _average_precision(matches: _Matches, times: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """``[b]`` AP over the IoU thresholds; NaN in sets without a box of the class."""
    wanted = times @ matches.boxes
    drawn = times[:, matches.image].astype(float)
    always = not matches.ignored.any()
    seen = drawn.cumsum(axis=1)
    total = np.zeros(len(times))
    for right, ignored in zip(matches.right, matches.ignored, strict=True):
        at = np.flatnonzero(right)
        counted = seen if always else np.where(ignored, 0.0, drawn).cumsum(axis=1)
        found = drawn[:, at].cumsum(axis=1)
        precision = found / np.maximum(counted[:, at], 1.0)
        best_from_here = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(recalls, found / np.maximum(wanted, 1.0)[:, None], side="right")
        total += (best_from_here * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(recalls)
    return np.where(wanted > 0, total / len(matches.right), np.nan)


def _parts(count: int, width: int) -> Iterator[slice]:
    """Rows that take a few MiB at a time."""
    size = max(1, _AT_ONCE // max(1, width))
    return (slice(start, start + size) for start in range(0, count, size))
