"""Detections of a whole pool on disk: one uncompressed .npz for a few hundred images.

Written once, shard by shard. Read back in order (:func:`read_detections`), or as a sequence that holds nothing but
where each image lies (:class:`StoredDetections`): memory hardly grows with the pool.

Embeddings, most of what is stored, are in half precision: each row is divided by a power of two that brings its largest
number to [0.5, 1), so no detector's numbers are too large or too small for it, and read back in single precision.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np

from ppal_backend.files import atomic_file
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import QueueEntry
from ppal_backend.structures.detections import Detections
from ppal_backend.structures.stream import ImageBatch

log = logging.getLogger(__name__)

DAMAGE = (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile)
"""What reading a damaged shard raises."""

_ROWS = ("boxes_xyxy", "scores", "class_indices", "embeddings")
_BOXES = ("image_ids", "counts", "softmax", "image_sizes", "boxes_xyxy", "scores", "class_indices")
_OPTIONAL = ("class_probs", "levels", "pre_nms_counts")
_EXPONENTS = "embedding_exponents"
_FEATURE = "feature_"
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name


class DetectionsWriter:
    """Writes shards of ``shard_size`` images; a shard appears whole or not at all.

    ``done`` holds the image ids that earlier, complete shards already hold: a resumed pass skips them. A shard that
    cannot be read is removed, its images are not done. Of an image that is written twice the last time counts.
    ``stamps`` are what :meth:`add` was told of the images that are done, 0 where it was told nothing.

    Args:
        folder: Where the shards go.
        shard_size: Images of a shard.
        half: Whether embeddings are stored in half precision.
    """

    def __init__(self, folder: Path, shard_size: int = 256, *, half: bool = True) -> None:
        self._folder, self._size, self._half = folder, shard_size, half
        self._rows: list[tuple[Detections, Mapping[str, Any], int]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.stamps: dict[int, int] = {}
        self._next = 0
        for path in shards_of(folder):
            try:
                self.stamps.update(_stamps_of_intact(path))
            except DAMAGE as error:
                log.error("%s is damaged (%s); its images are done again", path, error)
                path.unlink()
            else:
                self._next = int(path.stem.removeprefix("shard-")) + 1

    @property
    def done(self) -> set[int]:
        """Images that complete shards held at the start."""
        return set(self.stamps)

    def add(self, detections: Detections, features: Mapping[str, Any], stamp: int = 0) -> None:
        """Add one image; ``stamp`` tells its file from one that was changed, 0 for nothing known."""
        self._rows.append((detections, features, stamp))
        if len(self._rows) >= self._size:
            self.flush()

    def flush(self) -> None:
        """Write what is held; call it at the end."""
        if not self._rows:
            return
        items = [d for d, _, _ in self._rows]
        arrays: dict[str, np.ndarray] = {
            "image_ids": np.array([d.image_id for d in items], dtype=np.int64),
            "counts": np.array([len(d) for d in items], dtype=np.int64),
            "softmax": np.array([d.softmax for d in items]),
            "stamps": np.array([stamp for _, _, stamp in self._rows], dtype=np.int64),
        }
        for name in (*_ROWS, *_OPTIONAL):
            if all(getattr(d, name) is not None for d in items):
                arrays[name] = _stack_rows([np.asarray(getattr(d, name)) for d in items])
        if self._half:
            arrays["embeddings"], arrays[_EXPONENTS] = to_half(arrays["embeddings"])
        if all(d.image_size is not None for d in items):
            arrays["image_sizes"] = np.array([d.image_size for d in items], dtype=np.int64)
        for name in self._rows[0][1]:
            arrays[_FEATURE + name] = np.stack([np.asarray(f[name]) for _, f, _ in self._rows])
        with atomic_file(self._folder / f"shard-{self._next:05d}.npz") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        self._next += 1
        self._rows.clear()


def to_half(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[n, d]`` finite rows as float16 and an ``[n]`` int16 power of two to multiply each row by."""
    largest = np.abs(rows).max(axis=1, initial=0.0).astype(np.float64)
    exponents = np.frexp(largest)[1].astype(np.int16)
    return np.ldexp(rows, -exponents[:, None].astype(np.int32)).astype(np.float16), exponents


def from_half(rows: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """``[n, d]`` float32 of what :func:`to_half` gave."""
    return np.ldexp(rows.astype(np.float32), exponents[:, None].astype(np.int32))


def read_detections(folder: Path, only_boxes: bool = False) -> Iterator[tuple[Detections, dict[str, np.ndarray]]]:
    """Detections and image features of every image, in the order they were written.

    With ``only_boxes`` embeddings (``[n, 0]`` then), probabilities and features stay on disk: they are most of it.
    """
    for path in shards_of(folder):
        yield from _read(path, only_boxes)


def link_shards(source: Path, folder: Path) -> int:
    """Put the shards of another folder into an empty one, as hard links where the disk has them; how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = shards_of(source)
    for path in paths:
        try:
            os.link(path, folder / path.name)
        except OSError:
            with path.open("rb") as file, atomic_file(folder / path.name) as copy:
                shutil.copyfileobj(file, copy)
    return len(paths)


def shards_of(folder: Path) -> list[Path]:
    """The shards in the order they were written."""
    return sorted(folder.glob("shard-*.npz")) if folder.is_dir() else []


class StoredDetections(Sequence[Detections]):
    """The images of a folder as a sequence that reads an image when it is asked for.

    Held are the ids and where each image lies: some 100 bytes an image.

    Args:
        folder: Where :class:`DetectionsWriter` left its shards.
        image_ids: Images to take, others are left out; None for all. Their order is that of the folder; of an image
            that is there twice the last one counts.
        embeddings: Whether images come with embeddings; else those have width 0 and stay on disk.
        mark: Applied to every image that is read, for instance to tell which detections are right.
    """

    def __init__(
        self,
        folder: Path,
        image_ids: Collection[int] | None = None,
        *,
        embeddings: bool = True,
        mark: Callable[[Detections], Detections] | None = None,
    ) -> None:
        self._folder, self._embeddings, self._mark = folder, embeddings, mark
        wanted = None if image_ids is None else set(image_ids)
        self._shards = [_Shard(path) for path in shards_of(folder)]
        found: dict[int, tuple[int, int]] = {}
        for number, shard in enumerate(self._shards):
            for row, image_id in enumerate(shard.image_ids.tolist()):
                if wanted is None or image_id in wanted:
                    found.pop(image_id, None)  # looked at once more since
                    found[image_id] = number, row
        self._places = list(found.values())
        self._position = {image_id: position for position, image_id in enumerate(found)}

    @cached_property
    def image_ids(self) -> tuple[int, ...]:
        """Ids of all images, in order."""
        return tuple(self._position)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._position

    @overload
    def __getitem__(self, position: int) -> Detections: ...
    @overload
    def __getitem__(self, position: slice) -> list[Detections]: ...
    def __getitem__(self, position: int | slice) -> Detections | list[Detections]:
        if isinstance(position, slice):
            return [self[k] for k in range(*position.indices(len(self)))]
        number, row = self._places[position]
        return self._marked(self._shards[number].image(row, self._embeddings))

    def boxes_of(self, image_id: int) -> Detections | None:
        """Boxes, scores and classes of an image by its id, None for one that is not there."""
        if image_id not in self._position:
            return None
        number, row = self._places[self._position[image_id]]
        return self._shards[number].image(row, embeddings=False, only_boxes=True)

    def __iter__(self) -> Iterator[Detections]:
        for number, rows in self._by_shard():
            images = [d for d, _ in _read(self._shards[number].path, embeddings=self._embeddings)]
            yield from (self._marked(images[row]) for row in rows)

    def without_embeddings(self) -> Iterator[Detections]:
        """All images in order with embeddings of width 0."""
        for batch in self.batches():
            for detections in batch.images():
                yield self._marked(detections)

    def batches(self) -> Iterator[ImageBatch]:
        """All images in order, a shard at a time, without embeddings (and not marked)."""
        for number, rows in self._by_shard():
            shard = self._shards[number]
            yield from (shard.batch(part) for part in shard.of_one_kind(rows))

    def highest_class(self) -> tuple[int, int]:
        """The highest class index of any box and the image it is in; (-1, -1) without boxes."""
        best = (-1, -1)
        for number, rows in self._by_shard():
            shard = self._shards[number]
            taken = shard.rows_of(rows)
            classes = shard.array("class_indices")[taken]
            if len(classes) and int(classes.max()) > best[0]:
                row = int(np.searchsorted(shard.ends, taken[int(classes.argmax())], side="right"))
                best = (int(classes.max()), int(shard.image_ids[row]))
        return best

    def features(self, name: str) -> np.ndarray | None:
        """``[N, d]`` image features as an array mapped from disk (changes stay in memory); None where there are none.

        They lie in a file without a name, which goes with the array.
        """
        chosen = [(self._shards[number], rows) for number, rows in self._by_shard()]
        if not chosen or any(_FEATURE + name not in shard.names for shard, _ in chosen):
            return None
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (it lives as long as the array)
        width, dtype = 0, np.dtype(np.float32)
        for shard, rows in chosen:
            values = shard.array(_FEATURE + name)[rows]
            width, dtype = values.shape[1], values.dtype
            values.tofile(file)
        file.flush()
        if not width:
            return np.zeros((len(self), 0), dtype)
        return np.memmap(file, dtype, "c", shape=(len(self), width))

    def _by_shard(self) -> Iterator[tuple[int, list[int]]]:
        """Shard numbers and the rows to take from each, in order."""
        start = 0
        while start < len(self._places):
            number, end = self._places[start][0], start
            while end < len(self._places) and self._places[end][0] == number:
                end += 1
            yield number, [row for _, row in self._places[start:end]]
            start = end

    def _marked(self, detections: Detections) -> Detections:
        return detections if self._mark is None else self._mark(detections)


class _Shard:
    """One file, of which single arrays and single rows of an array can be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self._members = {
                info.filename.removesuffix(".npy"): info.header_offset
                for info in archive.infolist()
                if info.compress_type == zipfile.ZIP_STORED
            }
        self._headers: dict[str, tuple[int, np.dtype, tuple[int, ...], int]] = {}
        self.image_ids, self.counts = self.array("image_ids"), self.array("counts")
        self.ends = np.cumsum(self.counts)

    @property
    def names(self) -> Collection[str]:
        """Names of the arrays."""
        return self._members.keys()

    def array(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """An array or some adjacent rows of it, without a look at the rest of the file.

        Raises:
            KeyError: There is no such array.
        """
        offset, dtype, shape, width = self._header(name)
        stop = shape[0] if stop is None else stop
        values = np.fromfile(self.path, dtype, (stop - start) * width, offset=offset + start * width * dtype.itemsize)
        if len(values) != (stop - start) * width:
            raise EOFError(f"expected {(stop - start) * width} numbers of {name} in {self.path}, got {len(values)}")
        return values.reshape(stop - start, *shape[1:])

    @cached_property
    def _softmax(self) -> np.ndarray:
        return self.array("softmax")

    @cached_property
    def _sizes(self) -> np.ndarray | None:
        return self.array("image_sizes") if "image_sizes" in self.names else None

    def gathered(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Some rows of an array, wherever they lie, without a look at the others."""
        offset, dtype, shape, width = self._header(name)
        if not shape[0] or not width:
            return np.zeros((len(rows), *shape[1:]), dtype)
        return np.asarray(np.memmap(self.path, dtype, "r", offset, shape)[rows])

    def _header(self, name: str) -> tuple[int, np.dtype, tuple[int, ...], int]:
        """Where an array's numbers begin, their dtype, the array's shape and the numbers in a row."""
        if name not in self._headers:
            with self.path.open("rb") as file:
                file.seek(self._members[name])
                local = file.read(_LOCAL_HEADER)
                file.seek(int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little"), 1)
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
                if fortran and len(shape) > 1 and 1 not in shape:
                    raise ValueError(f"expected rows of {name} one after the other in {self.path}, got columns")
                self._headers[name] = file.tell(), dtype, shape, math.prod(shape[1:])
        return self._headers[name]

    def reduced(self, by: np.ufunc, values: np.ndarray) -> np.ndarray:
        """A number for each image from those of its boxes, for instance their minimum; infinite without boxes."""
        result = np.full(len(self.counts), np.inf)
        there = self.counts > 0
        if there.any():
            result[there] = by.reduceat(values, (self.ends - self.counts)[there])
        return result

    def rows_of(self, images: Iterable[int]) -> np.ndarray:
        """Numbers of the boxes of some images."""
        parts = [np.arange(self.ends[i] - self.counts[i], self.ends[i]) for i in images]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def image(self, row: int, embeddings: bool, only_boxes: bool = False) -> Detections:
        """One image, for which the file is opened once: opening takes longer than reading."""
        start, stop = int(self.ends[row] - self.counts[row]), int(self.ends[row])
        with_embeddings = embeddings and not only_boxes
        names = [n for n in (*_ROWS, *_OPTIONAL) if n in self.names and (n in _BOXES or not only_boxes)]
        names = [n for n in names if n != "embeddings" or with_embeddings]
        if with_embeddings and _EXPONENTS in self.names:
            names.append(_EXPONENTS)
        with self.path.open("rb", buffering=0) as file:
            values: dict[str, Any] = {name: self._rows(file.fileno(), name, start, stop) for name in names}
        if not with_embeddings:
            values["embeddings"] = np.zeros((stop - start, 0), np.float32)
        elif _EXPONENTS in values:
            values["embeddings"] = from_half(values["embeddings"], values.pop(_EXPONENTS))
        if self._sizes is not None:
            values["image_size"] = tuple(self._sizes[row].tolist())
        return Detections(int(self.image_ids[row]), **values, softmax=bool(self._softmax[row]))

    def _rows(self, file: int, name: str, start: int, stop: int) -> np.ndarray:
        """Adjacent rows of an array from the open file."""
        offset, dtype, shape, width = self._header(name)
        values = np.empty((stop - start, *shape[1:]), dtype)
        got = os.preadv(file, [values.data], offset + start * width * dtype.itemsize) if values.nbytes else 0
        if got != values.nbytes:
            raise EOFError(f"expected {values.nbytes} bytes of {name} in {self.path}, got {got}")
        return values

    def of_one_kind(self, images: list[int]) -> list[list[int]]:
        """The images in parts whose boxes are all of softmax detectors or all not: together, else each alone."""
        flags = self.array("softmax")[images][self.counts[images] > 0]
        return [images] if not len(flags) or bool((flags == flags[0]).all()) else [[image] for image in images]

    def batch(self, images: list[int]) -> ImageBatch:
        """Images of one kind together, without embeddings; probabilities only where utilities need them."""
        softmax = self.array("softmax")[images] & (self.counts[images] > 0)
        given = [n for n in ("boxes_xyxy", "scores", "class_indices", "pre_nms_counts") if n in self.names]
        if softmax.any() and "class_probs" in self.names:
            given.append("class_probs")
        everything = len(images) == len(self.image_ids)
        rows = slice(None) if everything else self.rows_of(images)
        values: dict[str, Any] = {name: self.array(name)[rows] for name in given}
        joined = Detections(
            image_id=int(self.image_ids[images[0]]),
            embeddings=np.zeros((len(values["scores"]), 0), np.float32),
            softmax=bool(softmax.any()),
            **values,
        )
        sizes = self.array("image_sizes")[images] if "image_sizes" in self.names else None
        return ImageBatch(self.image_ids[images], self.counts[images], joined, sizes)


def _stamps_of_intact(path: Path) -> dict[int, int]:
    """Stamps by image id of a shard that can be read in full, its checksums compared."""
    with np.load(path, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    boxes = int(arrays["counts"].sum())
    if any(len(arrays[name]) != boxes for name in (*_ROWS, *_OPTIONAL, _EXPONENTS) if name in arrays):
        raise ValueError(f"expected {boxes} rows of every array")
    ids = arrays["image_ids"].tolist()
    return dict(zip(ids, arrays["stamps"].tolist() if "stamps" in arrays else [0] * len(ids), strict=True))


def _read(
    path: Path, only_boxes: bool = False, embeddings: bool = True
) -> Iterator[tuple[Detections, dict[str, np.ndarray]]]:
    left_out = () if embeddings else ("embeddings", _EXPONENTS)
    with np.load(path, allow_pickle=False) as data:  # an array is read when it is asked for, not before
        names = [name for name in data.files if name not in left_out and (name in _BOXES or not only_boxes)]
        arrays = {name: data[name] for name in names}
    if only_boxes or not embeddings:
        arrays["embeddings"] = np.zeros((len(arrays["scores"]), 0), np.float32)
    elif _EXPONENTS in arrays:
        arrays["embeddings"] = from_half(arrays["embeddings"], arrays[_EXPONENTS])
    features = {n.removeprefix(_FEATURE): v for n, v in arrays.items() if n.startswith(_FEATURE)}
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


@dataclass(frozen=True)
class Box:
    """One predicted box: corners in pixels of the image as displayed, class index, detector confidence in [0, 1]."""

    box_xyxy: tuple[float, float, float, float]
    class_index: int
    score: float


class _Index:
    """Which shard, and which row of it, holds an image's last detections: some 30 bytes an image.

    Args:
        shards: In the order they were written.
    """

    def __init__(self, shards: Sequence[_Shard]) -> None:
        self.shards = shards
        sizes = [len(shard.image_ids) for shard in shards]
        ids = np.concatenate([np.zeros(0, np.int64), *(shard.image_ids for shard in shards)])
        self._ids, back = np.unique(ids[::-1], return_index=True)  # of an image that is there twice the last one counts
        last = len(ids) - 1 - back
        is_last = np.zeros(len(ids), bool)
        is_last[last] = True
        starts = np.cumsum([0, *sizes])
        self._shard = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[last]
        self._row = (last - starts[self._shard]).astype(np.int32)
        self._all = [np.flatnonzero(part) for part in np.split(is_last, starts[1:-1])] if sizes else []

    def find(self, image_ids: Collection[int] | None = None) -> Iterator[tuple[_Shard, np.ndarray]]:
        """Shards with the rows of the images that are there, ascending; of all images for None."""
        if image_ids is None:
            yield from zip(self.shards, self._all, strict=True)
            return
        wanted = np.unique(np.fromiter(image_ids, np.int64, len(image_ids)))
        places = np.searchsorted(self._ids, wanted).clip(max=max(0, len(self._ids) - 1))
        places = places[self._ids[places] == wanted] if len(self._ids) else places[:0]
        numbers, rows = self._shard[places], self._row[places]
        order = np.lexsort((rows, numbers))
        found, firsts = np.unique(numbers[order], return_index=True)
        for number, part in zip(
            found.tolist(), np.split(rows[order], firsts[1:]), strict=False
        ):  # none: one empty part
            yield self.shards[number], part


def _index_of(folder: Path) -> _Index:
    """Where each image of a folder lies, remembered as long as its shards are the same."""
    paths = shards_of(folder)
    stats = [path.stat() for path in paths]
    return _indexed(tuple(paths), tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@lru_cache(maxsize=4)
def _indexed(paths: tuple[Path, ...], _changed: tuple[tuple[int, int], ...]) -> _Index:
    return _Index([_Shard(path) for path in paths])


def boxes_of_images(folder: Path, image_ids: Collection[int]) -> dict[int, Detections]:
    """Boxes, scores and classes of some images (embeddings have width 0), read from where they lie.

    Args:
        folder: Where :class:`DetectionsWriter` left its shards.
        image_ids: Images to read.

    Returns:
        One entry for every image that the folder holds; empty without a folder.
    """
    return {
        int(shard.image_ids[row]): shard.image(row, embeddings=False, only_boxes=True)
        for shard, rows in _index_of(folder).find(image_ids)
        for row in rows.tolist()
    }


def read_boxes(folder: Path, image_ids: Collection[int]) -> dict[int, tuple[Box, ...]]:
    """The same as tuples of boxes; rows as in the image's ``Detections``."""
    return {
        image_id: tuple(
            Box((x1, y1, x2, y2), class_index, score)
            for (x1, y1, x2, y2), class_index, score in zip(
                found.boxes_xyxy.tolist(), found.class_indices.tolist(), found.scores.tolist(), strict=True
            )
        )
        for image_id, found in boxes_of_images(folder, image_ids).items()
    }


def least_sure(folder: Path, least_scores: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest score among the boxes that count, of every image that has one.

    Args:
        folder: Where :class:`DetectionsWriter` left its shards.
        least_scores: ``[C]`` score from which a box of each class counts; infinite for a class that never does.

    Returns:
        ``[n]`` image ids and ``[n]`` scores.
    """
    ids, scores = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for shard, rows in _index_of(folder).find():
        found, classes = shard.array("scores"), shard.array("class_indices")
        counts = found.astype(np.float64) >= np.asarray(least_scores, np.float64)[classes]
        least = shard.reduced(np.minimum, np.where(counts, found, np.inf))[rows]
        ids.append(shard.image_ids[rows[least < np.inf]])
        scores.append(least[least < np.inf])
    return np.concatenate(ids), np.concatenate(scores)


def surest_classes(folder: Path, image_ids: Collection[int] | None = None) -> dict[int, tuple[int, float]]:
    """Class and score of the surest box of every image that has one, by image id.

    Args:
        folder: Where :class:`DetectionsWriter` left its shards.
        image_ids: Images to look at; None for all.
    """
    found: dict[int, tuple[int, float]] = {}
    for shard, rows in _index_of(folder).find(image_ids):
        rows = rows[shard.counts[rows] > 0]
        scores, classes = shard.array("scores"), shard.array("class_indices")
        highest = shard.reduced(np.maximum, scores)
        hits = np.flatnonzero(scores == np.repeat(highest, shard.counts))  # each image's own highest, with ties
        best = hits[np.searchsorted(hits, shard.ends[rows] - shard.counts[rows])]
        ids = shard.image_ids[rows].tolist()
        found.update(zip(ids, zip(classes[best].tolist(), scores[best].tolist(), strict=True), strict=True))
    return found


@dataclass(frozen=True)
class ShardObjects:
    """The surest objects of a shard's images, image after image.

    Args:
        image_ids: Of all images of the shard that were asked for, those without an object included.
        owners: ``[m]`` place in ``image_ids`` of each object's image, ascending.
        rows: ``[m]`` row of each object in its image's ``Detections``.
        classes: ``[m]`` class indices.
        scores: ``[m]`` in [0, 1].
        embeddings: ``[m, d]`` float32, each row up to a factor of its own (for cosines).
    """

    image_ids: np.ndarray
    owners: np.ndarray
    rows: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    embeddings: np.ndarray


def objects_by_shard(
    folder: Path, least_score: float, image_ids: Collection[int] | None = None
) -> Iterator[ShardObjects]:
    """Objects of at least a score, a shard at a time, without a look at the embeddings of others.

    Args:
        folder: Where :class:`DetectionsWriter` left its shards.
        least_score: In [0, 1].
        image_ids: Images to take; None for all.
    """
    for shard, taken in reversed(list(_index_of(folder).find(image_ids))):
        if not len(taken):
            continue
        scores, owners = shard.array("scores"), np.repeat(np.arange(len(shard.counts)), shard.counts)
        place = np.full(len(shard.counts), -1)
        place[taken] = np.arange(len(taken))
        rows = np.flatnonzero((scores >= least_score) & (scores > 0) & (place[owners] >= 0))
        starts = shard.ends - shard.counts
        yield ShardObjects(
            image_ids=np.asarray(shard.image_ids, np.int64)[taken],
            owners=place[owners[rows]],
            rows=rows - starts[owners[rows]],
            classes=shard.array("class_indices")[rows],
            scores=scores[rows],
            embeddings=shard.gathered("embeddings", rows).astype(np.float32),
        )


class StoredQueue(Sequence[QueueEntry]):
    """Every ranked task, the one to label first in front; what was detected is read when an entry is asked for."""

    def __init__(self, folder: RoundFolder) -> None:
        self._ids: list[int] = folder.read("query_set.json")["queue"]
        self._sizes = {e["image_id"]: (e["width"], e["height"]) for e in folder.read("dataset/pool.json")}
        self._stored = StoredDetections(folder / "detections", self._ids, embeddings=False)

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, place: int) -> QueueEntry: ...
    @overload
    def __getitem__(self, place: slice) -> list[QueueEntry]: ...
    def __getitem__(self, place: int | slice) -> QueueEntry | list[QueueEntry]:
        if isinstance(place, slice):
            return [self._entry(task_id) for task_id in self._ids[place]]
        return self._entry(self._ids[place])

    def __iter__(self) -> Iterator[QueueEntry]:
        return map(self._entry, self._ids)

    def _entry(self, task_id: int) -> QueueEntry:
        width, height = self._sizes.get(task_id, (0, 0))
        return QueueEntry(task_id, self._stored.boxes_of(task_id), width, height)


def read_queue(folder: RoundFolder) -> Sequence[QueueEntry]:
    """Every ranked task, the one to label first in front, with what was detected on its image, without embeddings."""
    return StoredQueue(folder)
