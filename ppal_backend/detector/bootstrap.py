"""How far an mAP may be off because other images could have been held out: a bootstrap over the images.

The detections are matched with the annotations once, by pycocotools; a resample only counts each image's matches as
often as it was drawn, which gives what evaluating the copies would (but for equal scores of different images, whose
order is anybody's).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pycocotools.cocoeval import COCOeval

RESAMPLES = 500
FEWEST_IMAGES = 10
COVERED_PCT = (2.5, 97.5)
_AT_ONCE = 2**20


def map_interval(evaluator: COCOeval, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float] | None:
    """Percentiles 2.5 and 97.5 of the mAP over resampled images.

    The interval tells nothing of what another training on the same data would give. The same evaluation gives the
    same interval.

    Args:
        evaluator: After ``evaluate()``.
        resamples: How many sets of as many images to draw, with replacement.
        seed: Of the draw.

    Returns:
        Low and high in [0, 1]; None for fewer than ``FEWEST_IMAGES`` images, which say too little even of their own
        spread, and where nothing is annotated.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, percentile interval.
    """
    images = len(evaluator.params.imgIds)
    if images < FEWEST_IMAGES:
        return None
    rng = np.random.default_rng(seed)
    found = resampled_map(evaluator, rng.multinomial(images, np.full(images, 1.0 / images), size=resamples))
    if not len(found):
        return None
    low, high = np.percentile(found, COVERED_PCT)
    return float(low), float(high)


def resampled_map(evaluator: COCOeval, times: np.ndarray) -> np.ndarray:
    """mAP of sets in which images occur several times.

    Args:
        evaluator: After ``evaluate()``; objects of all sizes and its largest number of detections count.
        times: ``[B, N]`` how often each image occurs in each set, in the order of the evaluator's image ids.

    Returns:
        ``[b]`` mAP in [0, 1] of the sets that hold any annotated box, averaged over the classes they hold.
    """
    recalls = np.asarray(evaluator.params.recThrs)
    total, classes = np.zeros(len(times)), np.zeros(len(times), dtype=int)
    for matches in _by_class(evaluator):
        for rows in _parts(len(times), len(matches.image)):
            ap, present = _average_precision(matches, times[rows], recalls)
            total[rows] += ap
            classes[rows] += present
    return total[classes > 0] / classes[classes > 0]


@dataclass(frozen=True)
class _Matches:
    """Detections of one class by falling score: ``[D]`` their image, ``[T, D]`` whether they are right or do not count
    at each IoU threshold; and ``[N]`` annotated boxes of each image."""

    image: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    boxes: np.ndarray


def _by_class(evaluator: COCOeval) -> Iterator[_Matches]:
    images, areas = len(evaluator.params.imgIds), len(evaluator.params.areaRng)
    for position in range(len(evaluator.params.catIds)):
        first = position * areas * images  # objects of all sizes come first
        found = [(n, e) for n, e in enumerate(evaluator.evalImgs[first : first + images]) if e is not None]
        boxes = np.zeros(images)
        for n, of_image in found:
            boxes[n] = np.count_nonzero(np.asarray(of_image["gtIgnore"]) == 0)
        if not boxes.any():
            continue
        scores = np.concatenate([e["dtScores"] for _, e in found])
        order = np.argsort(-scores, kind="mergesort")
        ignored = np.concatenate([e["dtIgnore"] for _, e in found], axis=1)[:, order].astype(bool)
        matched = np.concatenate([e["dtMatches"] for _, e in found], axis=1)[:, order] > 0
        image = np.repeat([n for n, _ in found], [len(e["dtScores"]) for _, e in found])[order]
        yield _Matches(image.astype(int), matched & ~ignored, ignored, boxes)


def _average_precision(matches: _Matches, times: np.ndarray, recalls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[b]`` AP over the IoU thresholds, 0 in sets without a box of the class; and ``[b]`` whether they hold one."""
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
    return np.where(wanted > 0, total / len(matches.right), 0.0), wanted > 0


def _parts(count: int, width: int) -> Iterator[slice]:
    """Rows that take a few MiB at a time."""
    size = max(1, _AT_ONCE // max(1, width))
    return (slice(start, start + size) for start in range(0, count, size))
