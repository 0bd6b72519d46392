"""Boxes over an image: a colour for each class, and labels that neither overlap nor leave the image."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

COLOURS = 12
FONT_SHARE = 1 / 24  # of the image's width
LETTER_SHARE = 0.62  # of the font's height, wide letters included
EDGE = 0.1  # room for the line round its letters, in heights of its font
BORDER = 0.3  # room round a label, in heights of its font


@dataclass(frozen=True)
class LabelPlace:
    """Where a label begins (baseline, in pixels of the image) and the height of its font."""

    x: float
    y: float
    font_px: float


def colours_of(class_indices: Collection[int]) -> dict[int, int]:
    """The number of each class's colour on a page; classes share colours from the thirteenth on."""
    return {index: number % COLOURS for number, index in enumerate(sorted(set(class_indices)))}


def place_labels(
    boxes_xyxy: Sequence[tuple[float, float, float, float]], texts: Sequence[str], width: float, height: float
) -> list[LabelPlace | None]:
    """A place for every label, in order of importance; None where there is no room left for it.

    A label stands above its box, else within its upper edge, else below it, always inside the image.

    Args:
        boxes_xyxy: Corners in pixels of the image, the most important box first.
        texts: What is to stand at each; "" for nothing.
        width: Of the image, in pixels.
        height: Of the image, in pixels.
    """
    taken: list[tuple[float, float, float, float]] = []
    places: list[LabelPlace | None] = []
    font = round(width * FONT_SHARE, 1)
    for (x1, y1, _, y2), text in zip(boxes_xyxy, texts, strict=True):
        wide, high = len(text) * font * LETTER_SHARE, font * (1 + BORDER)
        edge = font * EDGE
        left = min(max(x1, edge), width - wide - edge)
        found = None
        for top in (y1 - high, y1 + font * BORDER, y2):
            area = (left, top, left + wide, top + high)
            inside = left >= edge and top >= 0 and top + high <= height
            if text and inside and not any(_overlap(area, other) for other in taken):
                taken.append(area)
                found = LabelPlace(round(left, 1), round(top + font, 1), font)
                break
        places.append(found)
    return places


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@dataclass(frozen=True)
class ShownBox:
    """A box over an image, in its pixels, with its style and what it says."""

    x: float
    y: float
    width: float
    height: float
    style: str
    text: str
    label_at: LabelPlace | None = None

    @property
    def written(self) -> str:
        """What stands at the box."""
        return self.text


def shown_box(box_xyxy: Sequence[float], style: str, text: str) -> ShownBox:
    """A box of corners in pixels."""
    x1, y1, x2, y2 = box_xyxy
    return ShownBox(x1, y1, x2 - x1, y2 - y1, style, text)
