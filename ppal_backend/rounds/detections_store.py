"""Detections of a whole pool on disk: one uncompressed .npz for a few hundred images.

Read back in order, or the boxes of a few images alone, or joined with the ranking as the queue to publish.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.files import atomic_file
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import PoolEntry, QueueEntry
from ppal_backend.structures.detections import Detections

log = logging.getLogger(__name__)

_ROWS = ("boxes_xyxy", "scores", "class_indices", "embeddings")
_BOXES = ("image_ids", "counts", "softmax", "image_sizes", "boxes_xyxy", "scores", "class_indices")
_OPTIONAL = ("class_probs", "levels", "pre_nms_counts")


class DetectionsWriter:
    """Writes shards of ``shard_size`` images; a shard appears whole or not at all.

    ``done`` holds the image ids that earlier, complete shards already hold: a resumed pass skips them. A shard that
    cannot be read is removed, its images are not done.
    """

    def __init__(self, folder: Path, shard_size: int = 256) -> None:
        self._folder, self._size = folder, shard_size
        self._rows: list[tuple[Detections, Mapping[str, Any]]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.done: set[int] = set()
        self._next = 0
        for path in _shards(folder):
            try:
                self.done.update(detections.image_id for detections, _ in _read(path))
            except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
                log.error("%s is damaged (%s); its images are done again", path, error)
                path.unlink()
            else:
                self._next = int(path.stem.removeprefix("shard-")) + 1

    def add(self, detections: Detections, features: Mapping[str, Any]) -> None:
        """Add one image."""
        self._rows.append((detections, features))
        if len(self._rows) >= self._size:
            self.flush()

    def flush(self) -> None:
        """Write what is held; call it at the end."""
        if not self._rows:
            return
        items = [d for d, _ in self._rows]
        arrays: dict[str, np.ndarray] = {
            "image_ids": np.array([d.image_id for d in items], dtype=np.int64),
            "counts": np.array([len(d) for d in items], dtype=np.int64),
            "softmax": np.array([d.softmax for d in items]),
        }
        for name in (*_ROWS, *_OPTIONAL):
            if all(getattr(d, name) is not None for d in items):
                arrays[name] = _stack_rows([np.asarray(getattr(d, name)) for d in items])
        if all(d.image_size is not None for d in items):
            arrays["image_sizes"] = np.array([d.image_size for d in items], dtype=np.int64)
        for name in self._rows[0][1]:
            arrays[f"feature_{name}"] = np.stack([np.asarray(f[name]) for _, f in self._rows])
        with atomic_file(self._folder / f"shard-{self._next:05d}.npz") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        self._next += 1
        self._rows.clear()


def read_detections(folder: Path, only_boxes: bool = False) -> Iterator[tuple[Detections, dict[str, np.ndarray]]]:
    """Detections and image features of every image, in the order they were written.

    With ``only_boxes`` embeddings (``[n, 0]`` then), probabilities and features stay on disk: they are most of it.
    """
    for path in _shards(folder):
        yield from _read(path, only_boxes)


def _read(path: Path, only_boxes: bool = False) -> Iterator[tuple[Detections, dict[str, np.ndarray]]]:
    with np.load(path, allow_pickle=False) as data:  # an array is read when it is asked for, not before
        arrays = {name: data[name] for name in data.files if not only_boxes or name in _BOXES}
    if only_boxes:
        arrays["embeddings"] = np.zeros((len(arrays["scores"]), 0), np.float32)
    features = {n.removeprefix("feature_"): v for n, v in arrays.items() if n.startswith("feature_")}
    ends = np.cumsum(arrays["counts"])
    for i, end in enumerate(ends):
        rows = slice(int(end - arrays["counts"][i]), int(end))
        of_image: dict[str, Any] = {n: arrays[n][rows] for n in (*_ROWS, *_OPTIONAL) if n in arrays}
        of_image["softmax"] = bool(arrays["softmax"][i])
        if "image_sizes" in arrays:
            of_image["image_size"] = tuple(arrays["image_sizes"][i].tolist())
        detections = Detections(int(arrays["image_ids"][i]), **of_image)
        yield detections, {name: value[i] for name, value in features.items()}


def _stack_rows(values: list[np.ndarray]) -> np.ndarray:
    """Concatenate, leaving out images without detections: their width may be unknown."""
    return np.concatenate([v for v in values if len(v)] or values[:1])


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.npz")) if folder.is_dir() else []


@dataclass(frozen=True)
class Box:
    """One predicted box: corners in pixels of the image as displayed, class index, detector confidence in [0, 1]."""

    box_xyxy: tuple[float, float, float, float]
    class_index: int
    score: float


def read_boxes(folder: Path, image_ids: Collection[int]) -> dict[int, tuple[Box, ...]]:
    """Boxes by image id; rows as in the image's ``Detections``.

    Args:
        folder: Where :class:`DetectionsWriter` left its shards.
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


def read_queue(folder: RoundFolder) -> list[QueueEntry]:
    """Every ranked task, the one to label first in front, with what was detected on its image, without embeddings."""
    sizes = {entry["image_id"]: PoolEntry(**entry) for entry in folder.read("dataset/pool.json")}
    detections = {d.image_id: d for d, _ in read_detections(folder / "detections", only_boxes=True)}
    queue = []
    for task_id in folder.read("query_set.json")["queue"]:
        entry = sizes.get(task_id)
        width, height = (entry.width, entry.height) if entry else (0, 0)
        queue.append(QueueEntry(task_id, detections.get(task_id), width, height))
    return queue
