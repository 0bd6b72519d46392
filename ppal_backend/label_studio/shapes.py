"""Polygons, ellipses and brush masks as the upright boxes around them: what a detector can learn of them."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

LEAST_ALPHA = 1  # of 255: what the editor shows at all
MOST_PX = 200_000_000

Hull = tuple[float, float, float, float]


def hull_of(region: Mapping[str, Any], width: int, height: int) -> Hull | None:
    """Corners ``(x1, y1, x2, y2)`` in pixels of the box around a region, not clipped; None if it has no usable shape.

    Args:
        region: A region of an annotation, its type one of :data:`~ppal_backend.datasets.label_studio_json.SHAPES`.
        width: Of the image, in pixels.
        height: Likewise.
    """
    value = region.get("value")
    if not isinstance(value, Mapping):
        return None
    if region.get("type") == "polygonlabels":
        return _polygon(value, width, height)
    if region.get("type") == "ellipselabels":
        return _ellipse(value, width, height)
    return _brush(value, region.get("original_width"), region.get("original_height"), width, height)


def _polygon(value: Mapping[str, Any], width: int, height: int) -> Hull | None:
    points = value.get("points")
    if not isinstance(points, list) or len(points) < 3:
        return None
    if not all(isinstance(p, list | tuple) and len(p) == 2 and _are_numbers(p) for p in points):
        return None
    xs, ys = ([float(p[axis]) / 100 * size for p in points] for axis, size in ((0, width), (1, height)))
    return min(xs), min(ys), max(xs), max(ys)


def _ellipse(value: Mapping[str, Any], width: int, height: int) -> Hull | None:
    """``x, y`` is the centre and the radii are its half axes, in percent; ``rotation`` turns it about its centre."""
    numbers = [value.get(name) for name in ("x", "y", "radiusX", "radiusY")] + [value.get("rotation") or 0]
    if not _are_numbers(numbers):
        return None
    x, y, radius_x, radius_y, degrees = (float(n) for n in numbers)
    a, b, angle = radius_x / 100 * width, radius_y / 100 * height, math.radians(degrees)
    half_width = math.hypot(a * math.cos(angle), b * math.sin(angle))
    half_height = math.hypot(a * math.sin(angle), b * math.cos(angle))
    x, y = x / 100 * width, y / 100 * height
    return x - half_width, y - half_height, x + half_width, y + half_height


def _brush(value: Mapping[str, Any], mask_width: Any, mask_height: Any, width: int, height: int) -> Hull | None:
    """A run-length code of ``original_height x original_width x 4`` bytes, of which the last is what was painted."""
    code = value.get("rle")
    sizes = mask_width, mask_height
    if value.get("format") != "rle" or not isinstance(code, list) or len(code) < 7:
        return None
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        return None
    if not all(isinstance(n, int) and 0 <= n <= 255 for n in code):
        return None
    count = int.from_bytes(bytes(code[:4]), "big")
    if count != mask_width * mask_height * 4 or count > 4 * MOST_PX:
        return None  # the decoder would make an array of whatever size the code names
    try:
        alpha = _decoder()(code).reshape(mask_height, mask_width, 4)[:, :, 3]
    except (ValueError, IndexError, OverflowError):
        return None
    rows, columns = np.flatnonzero((alpha >= LEAST_ALPHA).any(1)), np.flatnonzero((alpha >= LEAST_ALPHA).any(0))
    if not len(rows):
        return None
    scale_x, scale_y = width / mask_width, height / mask_height
    return (
        float(columns[0]) * scale_x, float(rows[0]) * scale_y, float(columns[-1] + 1) * scale_x,
        float(rows[-1] + 1) * scale_y,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _decoder() -> Callable[[list[int]], np.ndarray]:
    with contextlib.redirect_stdout(io.StringIO()):  # the converter prints which packages it lacks
        from label_studio_sdk.converter.brush import decode_rle
    found: Callable[[list[int]], np.ndarray] = decode_rle
    return found


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in values)
