"""Small objects: an image is looked at as a whole and in overlapping tiles, and learned from in both ways.

A detector shrinks an image to its input. What is a few pixels there may be many in the photo, so tiles of the photo are
shown at full resolution beside the whole, and what was found in all of them is merged. How long a training learned from
tiles of which size stands in its checkpoint, so everything that looks through it later does so in the same way.

Source: Akyon et al., "Slicing Aided Hyper Inference and Fine-tuning for Small Object Detection", ICIP 2022,
arXiv:2202.06934.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mmdet.registry import TRANSFORMS

from ppal_backend.detector.data import ImageRecord
from ppal_backend.detector.recipe import type_name
from ppal_backend.errors import DetectorError

OVERLAP = 0.2
"""Share of a tile that it has in common with its neighbour: what is smaller than that is whole in one of them."""
MOST_TILES = 24
"""Tiles of one image. Where there would be more they get larger, so the cost of a picture has a bound."""
SMALL_PX = 32.0
"""COCO's bound of small boxes: the side of a square, in pixels."""
SAME_OBJECT_IOU = 0.5
SAME_OBJECT_INSIDE = 0.5
LEAST_VISIBLE = 0.3

_HARDLY_LARGER = 1.2
_LEAST_LARGER_IMAGES = 0.5
_SHARE_OF_SLICES = 0.5
_SLICES_WITH_AN_OBJECT = 0.75
_BORDER = 0.01

Window = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels of the image."""


def windows(width: int, height: int, tile: int) -> list[Window]:
    """The tiles of an image, row by row.

    Tiles of a row lie evenly and overlap by at least ``OVERLAP``. A side of the image that hardly exceeds the tile is
    not cut. The whole image is not among them.

    Args:
        width: Width of the image in pixels.
        height: Its height.
        tile: Side of a tile in pixels.

    Returns:
        At most ``MOST_TILES`` windows that cover the image; none for an image no larger than a tile.
    """
    side = _side(width, height, tile)
    across, down = _offsets(width, side), _offsets(height, side)
    if len(across) * len(down) == 1:
        return []
    wide, high = (width if len(across) == 1 else side), (height if len(down) == 1 else side)
    return [(x, y, x + wide, y + high) for y in down for x in across]


def _side(width: int, height: int, tile: int) -> int:
    """Side of the tiles: as wanted, or as much larger as their number asks for."""
    side = tile
    while len(_offsets(width, side)) * len(_offsets(height, side)) > MOST_TILES:
        side = math.ceil(side * 1.05)
    return side


def _offsets(length: int, tile: int) -> list[int]:
    if length <= tile * _HARDLY_LARGER:
        return [0]
    count = math.ceil((length - OVERLAP * tile) / (tile - OVERLAP * tile))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def merge(
    boxes_xyxy: np.ndarray, scores: np.ndarray, classes: np.ndarray, views: np.ndarray, cut: np.ndarray
) -> np.ndarray:
    """Which detections of the views of an image are left when every object counts once.

    A detection goes when one of another view and of its class stays that comes first and is of the same object. Whole
    ones come before those that a border between tiles cut, and by falling score among each other. Two are of the same
    object when they overlap by more than ``SAME_OBJECT_IOU``, or when one was cut and more than ``SAME_OBJECT_INSIDE``
    of its area lies in the other. What suppression has left within one view is not judged again.

    Args:
        boxes_xyxy: ``[n, 4]`` in pixels of the image.
        scores: ``[n]``.
        classes: ``[n]`` class indices.
        views: ``[n]`` number of the view that each was found in.
        cut: ``[n]`` bool, whether a border between tiles cuts it, see :func:`cut_by_window`.

    Returns:
        ``[k]`` int64 rows that stay, by falling score.
    """
    order = np.lexsort((-scores, cut))
    areas = np.clip(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0.0, None).prod(1)
    gone = np.zeros(len(scores), dtype=bool)
    for place, row in enumerate(order):
        if gone[row]:
            continue
        later = order[place + 1 :]
        later = later[~gone[later] & (classes[later] == classes[row]) & (views[later] != views[row])]
        low = np.maximum(boxes_xyxy[row, :2], boxes_xyxy[later, :2])
        high = np.minimum(boxes_xyxy[row, 2:], boxes_xyxy[later, 2:])
        shared = np.clip(high - low, 0.0, None).prod(1)
        same = shared > SAME_OBJECT_IOU * (areas[row] + areas[later] - shared)
        same |= cut[later] & (shared > SAME_OBJECT_INSIDE * areas[later])
        gone[later[same]] = True
    kept = np.flatnonzero(~gone)
    return kept[np.argsort(-scores[kept], kind="stable")]


def cut_by_window(boxes_xyxy: np.ndarray, window: Window, size: tuple[int, int]) -> np.ndarray:
    """``[n]`` whether a box reaches a side of the window that is not a side of the image.

    Args:
        boxes_xyxy: ``[n, 4]`` in pixels of the image.
        window: Where the boxes were found.
        size: Width and height of the image.
    """
    margin = _BORDER * max(window[2] - window[0], window[3] - window[1])
    x1, y1, x2, y2 = boxes_xyxy.T
    cut = np.zeros(len(boxes_xyxy), dtype=bool)
    if window[0] > 0:
        cut |= x1 <= window[0] + margin
    if window[1] > 0:
        cut |= y1 <= window[1] + margin
    if window[2] < size[0]:
        cut |= x2 >= window[2] - margin
    if window[3] < size[1]:
        cut |= y2 >= window[3] - margin
    return cut


@dataclass(frozen=True)
class Slicing:
    """Whether images are sliced: the side of a tile in pixels of the image, or None; and why, for people."""

    tile: int | None
    reason: str


def choose(wanted: int | str, records: Sequence[ImageRecord], input_size: tuple[int, int]) -> Slicing:
    """Decide for one training.

    ``auto`` slices when half of the labelled boxes are small (under 32 px) once their image has been shrunk to the
    detector's input, and most images are larger than that: then tiles show more than the whole.

    Args:
        wanted: ``off``, ``auto``, or the side of a tile in pixels of the image.
        records: Labelled images.
        input_size: Width and height of the detector's input.
    """
    if wanted == "off":
        return Slicing(None, "switched off")
    if wanted != "auto":
        return Slicing(int(wanted), "chosen in the settings")
    long, short = max(input_size), min(input_size)
    sides = [
        math.sqrt((x2 - x1) * (y2 - y1)) * min(long / max(r.width, r.height), short / min(r.width, r.height))
        for r in records
        for x1, y1, x2, y2 in (item.box_xyxy for item in r.instances)
    ]
    if not sides:
        return Slicing(None, "no boxes are labelled")
    middle = float(np.median(sides))
    shown = f"the detector's input of {input_size[0]} × {input_size[1]} px"
    if middle >= SMALL_PX:
        return Slicing(None, f"half of the {len(sides)} labelled boxes are {middle:.0f} px or more at {shown}")
    larger = sum(bool(windows(r.width, r.height, short)) for r in records)
    if larger < _LEAST_LARGER_IMAGES * len(records):
        return Slicing(
            None, f"{len(records) - larger} of {len(records)} labelled images are hardly larger than {shown}"
        )
    return Slicing(short, f"half of the {len(sides)} labelled boxes are under {middle:.0f} px at {shown}")


def slice_steps(steps: Sequence[Mapping[str, Any]], tile: int) -> list[dict[str, Any]]:
    """A training pipeline that shows a random tile in place of the image every other time, from its reading on.

    Args:
        steps: Steps of the pipeline; what combines images gets tiles of the others as well.
        tile: Side of a tile in pixels of the image.

    Raises:
        DetectorError: No step reads annotations.
    """
    sliced: list[dict[str, Any]] = []
    read = False
    for step in steps:
        if "source" in step:
            sliced.append({**step, "source": slice_steps(step["source"], tile)})
        else:
            sliced.append(dict(step))
        if not read and type_name(step) == "LoadAnnotations":
            sliced.append({"type": "RandomSlice", "tile": tile})
            read = True
    if not read:
        raise DetectorError(
            "expected LoadAnnotations in the training pipeline to slice after it, found none; set slices to off"
        )
    return sliced


@TRANSFORMS.register_module()
class RandomSlice:
    """Cuts a random tile out of an image that is larger, in a share of cases; most of them around an object.

    Boxes are clipped to the tile; of which less than ``LEAST_VISIBLE`` is left, they are dropped.

    Args:
        tile: Side of a tile in pixels of the image.
        prob: Share of images that are cut, in [0, 1].
    """

    def __init__(self, tile: int, prob: float = _SHARE_OF_SLICES) -> None:
        self._tile, self._prob = tile, prob

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Cut, or return the image as it is."""
        height, width = results["img"].shape[:2]
        if np.random.uniform() >= self._prob or not windows(width, height, self._tile):
            if not results["img"].flags.writeable:  # mapped from disk, see ``LoadDecodedImage``
                results["img"] = np.array(results["img"])
            return results
        side = _side(width, height, self._tile)
        boxes = results["gt_bboxes"].tensor.numpy()
        around = None
        if len(boxes) and np.random.uniform() < _SLICES_WITH_AN_OBJECT:
            x1, y1, x2, y2 = boxes[np.random.randint(len(boxes))]
            around = ((x1 + x2) / 2, (y1 + y2) / 2)
        left, right = _position(width, side, None if around is None else around[0])
        top, bottom = _position(height, side, None if around is None else around[1])
        results["img"] = np.ascontiguousarray(results["img"][top:bottom, left:right])
        results["img_shape"] = results["img"].shape[:2]
        return _clip_boxes(results, left, top)


def _position(length: int, side: int, around: float | None) -> tuple[int, int]:
    """Begin and end of a random stretch of ``side`` pixels, ``around`` within it."""
    if length <= side * _HARDLY_LARGER:
        return 0, length
    low, high = 0.0, float(length - side)
    if around is not None:
        low, high = max(low, min(high, around - side)), max(low, min(high, around))
    begin = round(np.random.uniform(low, high))
    return begin, begin + side


def _clip_boxes(results: dict[str, Any], left: int, top: int) -> dict[str, Any]:
    boxes = results["gt_bboxes"]
    before = boxes.areas
    boxes = boxes.clone()
    boxes.translate_([-left, -top])
    boxes.clip_(results["img_shape"])
    stay = ((boxes.areas > 0) & (boxes.areas >= LEAST_VISIBLE * before)).numpy()
    results["gt_bboxes"] = boxes[stay]
    for name in ("gt_bboxes_labels", "gt_ignore_flags"):
        if name in results:
            results[name] = results[name][stay]
    return results
