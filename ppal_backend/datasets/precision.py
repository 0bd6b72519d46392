"""How often people keep pre-annotations of a confidence, measured on what they submitted.

Counted are boxes that people were shown on images of which they submitted an annotation: kept (same place and label)
or not. Boxes of one image stand and fall together, so the interval goes by images: from sums over images that can be
added up over versions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ppal_backend.datasets.corrections import Correction
from ppal_backend.structures.round import VERSION_PREFIX

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
ENOUGH_BOXES, ENOUGH_IMAGES = 100, 20
"""From so many boxes, on so many images, a precision counts as measured."""
_Z = 1.959964  # 95 % of a normal distribution
SUMS = ("boxes", "kept", "images", "kept_kept", "kept_boxes", "boxes_boxes", "whole", "untouched")


def precision_of(corrections: Iterable[Correction]) -> dict[str, dict[str, dict[str, int]]]:
    """Sums over images for each version and threshold, for JSON.

    Args:
        corrections: Those made without a prediction are left out, and so must be those of annotations that people did
            not look at box by box.

    Returns:
        By version and threshold (as text): ``boxes`` of at least that confidence, those that were ``kept``, ``images``
        with one, the sums of their products image by image; and of the images on which every box shown was as confident
        (``whole``) those that were submitted ``untouched``.
    """
    sums: defaultdict[str, dict[str, dict[str, int]]] = defaultdict(
        lambda: {f"{t:g}": dict.fromkeys(SUMS, 0) for t in THRESHOLDS}
    )
    for correction in corrections:
        scored = [(score, action == "kept") for action, score in correction.boxes if score is not None]
        if correction.version is None or not scored or len(scored) < len(correction.boxes):
            continue
        same = all(is_kept for _, is_kept in scored) and not correction.added
        for threshold in THRESHOLDS:
            _count(sums[correction.version][f"{threshold:g}"], scored, threshold, same)
    return dict(sums)


def _count(row: dict[str, int], scored: list[tuple[float, bool]], threshold: float, same: bool) -> None:
    sure = [is_kept for score, is_kept in scored if score >= threshold]
    boxes, kept = len(sure), sum(sure)
    if not boxes:
        return
    whole = boxes == len(scored)
    for name, value in zip(
        SUMS, (boxes, kept, 1, kept * kept, kept * boxes, boxes * boxes, whole, whole and same), strict=True
    ):
        row[name] += int(value)


@dataclass(frozen=True)
class Precision:
    """How often people kept boxes of at least a confidence.

    Args:
        threshold: The confidence.
        boxes: Boxes that people were shown.
        kept: Those that they kept.
        images: Images that these are on.
        whole: Images on which every box shown was as confident.
        untouched: Those of them that were submitted without any change.
        interval: Low and high that hold the share kept in 95 % of cases; None without a box.
    """

    threshold: float
    boxes: int
    kept: int
    images: int
    whole: int
    untouched: int
    interval: tuple[float, float] | None

    @property
    def share(self) -> float | None:
        """Share of boxes kept; None without any."""
        return self.kept / self.boxes if self.boxes else None

    @property
    def missing_boxes(self) -> int:
        """Boxes that are missing until it counts as measured."""
        return max(0, ENOUGH_BOXES - self.boxes)

    @property
    def missing_images(self) -> int:
        """Images that are missing until it counts as measured."""
        return max(0, ENOUGH_IMAGES - self.images)

    @property
    def is_measured(self) -> bool:
        """Whether there are enough boxes and images."""
        return not self.missing_boxes and not self.missing_images


def measured(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[Precision]:
    """The precision at every threshold, all versions of this backend together: other models' scores say nothing of it.

    Args:
        counts: What :func:`precision_of` gave.
    """
    made = []
    ours = [of for version, of in counts.items() if version.startswith(VERSION_PREFIX)]
    for threshold in THRESHOLDS:
        rows = [of[f"{threshold:g}"] for of in ours if f"{threshold:g}" in of]
        total = {name: sum(row[name] for row in rows) for name in SUMS}
        made.append(
            Precision(threshold, total["boxes"], total["kept"], total["images"], total["whole"], total["untouched"],
                      _interval(total))
        )  # fmt: skip
    return made


def _interval(total: Mapping[str, int]) -> tuple[float, float] | None:
    """Wilson's interval on as many boxes as would vary as much if each were an image of its own.

    Where all or none were kept nothing varies, and an image counts as one box.
    """
    boxes, images = total["boxes"], total["images"]
    if not boxes:
        return None
    p = total["kept"] / boxes
    spread = total["kept_kept"] - 2 * p * total["kept_boxes"] + p * p * total["boxes_boxes"]
    n = float(images)
    if images > 1 and 0 < p < 1:
        variance = max(spread, 1e-9) / boxes**2 * images / (images - 1)
        n = min(float(boxes), p * (1 - p) / variance)
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)
