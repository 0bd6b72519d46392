"""Boxes of a few images of a round, without reading what was detected on all the others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Box:
    """One predicted box: corners in pixels of the image as displayed, class index, detector confidence in [0, 1]."""

    box_xyxy: tuple[float, float, float, float]
    class_index: int
    score: float


def read_boxes(folder: Path, image_ids: Collection[int]) -> dict[int, tuple[Box, ...]]:
    """Boxes by image id; rows as in the image's ``Detections``.

    Args:
        folder: Where :class:`ppal_backend.rounds.detections_store.DetectionsWriter` left its shards.
        image_ids: Images to read.

    Returns:
        One entry for every image that the folder holds; empty without a folder.
    """
    wanted = set(image_ids)
    found: dict[int, tuple[Box, ...]] = {}
    for path in sorted(folder.glob("shard-*.npz")):
        if wanted <= found.keys():
            break
        with np.load(path, allow_pickle=False) as data:  # an array is read when it is asked for, not before
            ids, ends = data["image_ids"], np.cumsum(data["counts"])
            rows = [row for row, image_id in enumerate(ids.tolist()) if image_id in wanted]
            if not rows:
                continue
            boxes, classes, scores = data["boxes_xyxy"], data["class_indices"], data["scores"]
            for row in rows:
                part = slice(int(ends[row - 1]) if row else 0, int(ends[row]))
                found[int(ids[row])] = tuple(
                    Box((x1, y1, x2, y2), class_index, score)
                    for (x1, y1, x2, y2), class_index, score in zip(
                        boxes[part].tolist(), classes[part].tolist(), scores[part].tolist(), strict=True
                    )
                )
    return found
