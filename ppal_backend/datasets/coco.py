"""COCO detection files: the only reader of them, validated when read, written atomically.

:meth:`CocoDataset.read` asks for a whole file, as this package writes them;
:func:`~ppal_backend.datasets.ground_truth.read_user_coco` takes what people and other tools wrote.
"""

from __future__ import annotations

import json
import logging
import math
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.datasets.categories import CategoryMap
from ppal_backend.errors import DatasetError
from ppal_backend.files import atomic_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoImage:
    """An image: ``file_name`` is an absolute path, ``width`` and ``height`` are pixels as displayed."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass(frozen=True)
class CocoAnnotation:
    """An instance: ``bbox_xywh`` in pixels, ``category_id`` as in the dataset's categories."""

    id: int
    image_id: int
    category_id: int
    bbox_xywh: tuple[float, float, float, float]
    iscrowd: int = 0

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        return self.bbox_xywh[2] * self.bbox_xywh[3]


@dataclass(frozen=True)
class CocoCategory:
    """A class: any positive ``id``, unique ``name``."""

    id: int
    name: str


@dataclass(frozen=True)
class CocoDataset:
    """Images, instances and classes; images without instances are true negatives.

    Raises:
        DatasetError: See :meth:`validate`, which runs at construction.
    """

    images: tuple[CocoImage, ...]
    annotations: tuple[CocoAnnotation, ...]
    categories: tuple[CocoCategory, ...]

    def __post_init__(self) -> None:
        for name in ("images", "annotations", "categories"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self.validate()

    def validate(self) -> None:
        """Check ids, references and numbers.

        Raises:
            DatasetError: An id is given twice, an annotation points nowhere, an image has no size, a box is not
                finite or has no area, or there is no category.
        """
        check_ids(self.images, self.annotations, self.categories)
        if not self.categories:
            raise DatasetError("expected at least one category, got none; add the classes")
        CategoryMap(self.labels)
        for image in self.images:
            if image.width <= 0 or image.height <= 0:
                raise DatasetError(
                    f"expected image {image.id} with a size > 0, got {image.width} x {image.height}; correct it"
                )
        for row in self.annotations:
            box = row.bbox_xywh
            if not all(math.isfinite(v) for v in box) or box[2] <= 0 or box[3] <= 0:
                raise DatasetError(f"expected annotation {row.id} with a finite box of area > 0, got {box}; drop it")

    @property
    def labels(self) -> tuple[str, ...]:
        """Category names by rising category id, that is by class index."""
        return tuple(category.name for category in sorted(self.categories, key=lambda c: c.id))

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Ids of the images in order."""
        return tuple(image.id for image in self.images)

    def class_counts(self, labels: Sequence[str] | None = None) -> tuple[int, ...]:
        """Return the number of instances of each of ``labels``, 0 for one that is no category here; without them by
        class index (crowd regions not counted)."""
        name_of = {category.id: category.name for category in self.categories}
        counts = Counter(name_of[row.category_id] for row in self.annotations if not row.iscrowd)
        return tuple(counts[label] for label in (self.labels if labels is None else labels))

    def subset(self, image_ids: Iterable[int]) -> CocoDataset:
        """Return the dataset of some images, in this dataset's order, with all categories.

        Raises:
            DatasetError: An id is unknown.
        """
        wanted = set(image_ids)
        unknown = sorted(wanted - set(self.image_ids))
        if unknown:
            raise DatasetError(f"expected ids of this dataset's images, got {unknown[:5]}; pass listed ids")
        return CocoDataset(
            images=tuple(image for image in self.images if image.id in wanted),
            annotations=tuple(row for row in self.annotations if row.image_id in wanted),
            categories=self.categories,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the dataset as COCO JSON."""
        return {
            "images": [dict(vars(image)) for image in self.images],
            "annotations": [
                {
                    "id": row.id,
                    "image_id": row.image_id,
                    "category_id": row.category_id,
                    "bbox": list(row.bbox_xywh),
                    "area": row.area,
                    "iscrowd": row.iscrowd,
                }
                for row in self.annotations
            ],
            "categories": [dict(vars(category)) for category in self.categories],
        }

    def write(self, path: Path) -> Path:
        """Write COCO JSON atomically (temporary file, fsync, rename) and return ``path``."""
        with atomic_file(path, "w") as file:
            json.dump(self.as_dict(), file)
        return path

    @classmethod
    def read(cls, path: Path, image_root: Path | None = None) -> CocoDataset:
        """Read and validate a COCO JSON file.

        Boxes without area, which published data sets hold now and then, are dropped with a logged count.

        Args:
            path: The file.
            image_root: Folder of relative file names; the file's own folder by default.

        Raises:
            DatasetError: The file is missing, no JSON, or not what :meth:`validate` asks; the text names the entry.
        """
        root = (image_root or path.parent).resolve()
        file = CocoFile.read(path)
        with named_in_errors(path):
            kept = [row for row in file.annotations if not (row.bbox_xywh[2] <= 0 or row.bbox_xywh[3] <= 0)]
            if len(kept) < len(file.annotations):
                logger.warning("%s: dropped %d boxes without area", path.name, len(file.annotations) - len(kept))
            images = tuple(replace(image, file_name=str(root / image.file_name)) for image in file.images)
            return cls(images, tuple(kept), file.categories)


@dataclass(frozen=True)
class CocoFile:
    """What a COCO file says, entry by entry, before anything is held against anything.

    Args:
        images: With file names as written.
        annotations: In the order of the file; boxes may have no area.
        categories: Classes.
        image_rows: The ``images`` as written, for keys of one's own.
    """

    images: tuple[CocoImage, ...]
    annotations: tuple[CocoAnnotation, ...]
    categories: tuple[CocoCategory, ...]
    image_rows: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, path: Path, *, strict: bool = True, images_alone: bool = False) -> CocoFile:
        """Read a file; this is the only place that does. Ids are whole numbers, also when they are written as text.

        Args:
            path: The file.
            strict: Refuse an image without a size and a box that is not four numbers. Else such an image is of 0 px and
                such a box without area, and an object that has an outline and no box has the box round it.
            images_alone: Leave annotations and categories unread: pools may have none.

        Raises:
            DatasetError: The file is missing, no JSON, or an entry is not as COCO has it; the text names the entry.
        """
        data = _load(path)
        with named_in_errors(path):
            rows = _rows(data, "images")
            images = tuple(_image(row, i, strict) for i, row in enumerate(rows))
            if images_alone:
                return cls(images, (), (), tuple(rows))
            return cls(images, tuple(_annotations(data, strict)), _categories(data), tuple(rows))


def check_ids(
    images: Iterable[CocoImage], annotations: Iterable[CocoAnnotation], categories: Iterable[CocoCategory]
) -> None:
    """Every id once, and every annotation on a listed image and of a listed category.

    Raises:
        DatasetError: It is not so.
    """
    listed, known = _unique_ids("images", images), _unique_ids("categories", categories)
    _unique_ids("annotations", annotations)
    for row in annotations:
        if row.image_id not in listed:
            raise DatasetError(f"expected annotation {row.id} on a listed image, got image_id {row.image_id}; add it")
        if row.category_id not in known:
            raise DatasetError(
                f"expected annotation {row.id} of a listed category, got category_id {row.category_id}; add it"
            )


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"expected a COCO file at {path}, got none ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"expected UTF-8 in {path}, got broken text (byte {error.start}: {error.reason}); save the file as UTF-8"
        ) from None
    except ValueError as error:
        raise DatasetError(f"expected JSON in {path}, got broken text ({error}); write the file again") from None
    if not isinstance(data, dict):
        raise DatasetError(f"expected a COCO object in {path}, got {type(data).__name__}; give images, annotations …")
    return data


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Put the file's name before what is wrong with it, with its folder: some tools name all their files alike."""
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"{'/'.join(path.parts[-2:])}: {error}") from None


def _unique_ids(what: str, rows: Iterable[Any]) -> set[int]:
    seen: set[int] = set()
    for row in rows:
        if row.id in seen:
            raise DatasetError(f"expected every id in {what} once, got {row.id} again; renumber them")
        seen.add(row.id)
    return seen


def _rows(data: Mapping[str, Any], key: str) -> list[Any]:
    rows = data.get(key)
    if not isinstance(rows, list):
        raise DatasetError(f"expected a list {key!r}, got {type(rows).__name__}; add it")
    return rows


def _value(row: Any, where: str, key: str, *kinds: type) -> Any:
    if not isinstance(row, dict):
        raise DatasetError(f"expected {where} to be an object, got {type(row).__name__}; correct it")
    value = row.get(key)
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise DatasetError(f"expected {where}.{key} to be {names}, got {value!r:.80}; correct it")
    return value


def _id(row: Any, where: str, key: str) -> int:
    """An id: a whole number that arrays hold, also when it is written as text or with a fraction of zero."""
    value = _value(row, where, key, int, float, str)
    try:
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError
    except (ValueError, OverflowError):
        raise DatasetError(
            f"expected {where}.{key} to be a whole number, got {value!r:.80}; number images, categories and annotations"
        ) from None
    if not -(2**63) <= number < 2**63:
        raise DatasetError(
            f"expected {where}.{key} to be a whole number of at most 63 bits, got {number}; number them from 1"
        )
    return number


def _pixels(row: Any, where: str, key: str) -> int:
    value = _value(row, where, key, int, float)
    if not math.isfinite(value):
        raise DatasetError(f"expected {where}.{key} in pixels, got {value}; correct it")
    return round(value)


def _image(row: Any, index: int, strict: bool) -> CocoImage:
    where = f"images[{index}]"
    name = _value(row, where, "file_name", str)
    sides = (0 if not strict and row.get(side) is None else _pixels(row, where, side) for side in ("width", "height"))
    return CocoImage(_id(row, where, "id"), name, *sides)


def _annotations(data: Mapping[str, Any], strict: bool) -> list[CocoAnnotation]:
    """The annotations of a file, numbered where one has no id; without ``strict`` a box that is none counts as one
    without area."""
    rows = _rows(data, "annotations")
    numbered = all(isinstance(row, dict) and row.get("id") is not None for row in rows)
    return [_annotation(row, i, numbered, strict) for i, row in enumerate(rows)]


def _annotation(row: Any, index: int, numbered: bool, strict: bool) -> CocoAnnotation:
    where = f"annotations[{index}]"
    image_id = _id(row, where, "image_id")
    category_id = _id(row, where, "category_id")
    box = _value(row, where, "bbox", list) if strict or row.get("bbox") is not None else _box_round(row, where)
    good = len(box) == 4 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in box)
    if strict and not good:
        raise DatasetError(f"expected {where}.bbox to be four numbers x, y, width, height, got {box!r:.80}; correct it")
    x, y, w, h = (float(v) for v in box) if good else (0.0, 0.0, 0.0, 0.0)
    number = _id(row, where, "id") if numbered else index + 1
    return CocoAnnotation(number, image_id, category_id, (x, y, w, h), 1 if row.get("iscrowd", 0) else 0)


def _box_round(row: Mapping[str, Any], where: str) -> list[float]:
    """The box round an outline, which is a list of polygons x, y, x, y …"""
    outline = row.get("segmentation")
    try:
        points = [np.asarray(part, np.float64).reshape(-1, 2) for part in outline] if isinstance(outline, list) else []
    except (ValueError, TypeError):
        points = []
    if not sum(map(len, points)):
        raise DatasetError(
            f"expected {where} with a bbox or an outline in points, got neither; give every object its bbox"
        )
    corners = np.concatenate(points)
    low, high = corners.min(0), corners.max(0)
    return [*low.tolist(), *(high - low).tolist()]


def _categories(data: Mapping[str, Any]) -> tuple[CocoCategory, ...]:
    rows = [(f"categories[{i}]", row) for i, row in enumerate(_rows(data, "categories"))]
    return tuple(CocoCategory(_id(row, where, "id"), _value(row, where, "name", str)) for where, row in rows)


def result_row(image_id: int, box_xywh: np.ndarray, score: float, class_index: int) -> dict[str, Any]:
    """A detection as a COCO result; its category is the class index + 1."""
    x, y, width, height = (float(value) for value in box_xywh)
    bbox, area = [x, y, width, height], width * height
    return {"image_id": image_id, "category_id": class_index + 1, "bbox": bbox, "area": area, "iscrowd": 0,
            "score": score}  # fmt: skip


def write_predictions(
    path: Path, predictions: Mapping[int, Sequence[Mapping[str, Any]]], labels: Sequence[str]
) -> None:
    """Keep COCO results by image id, for :func:`read_predictions`."""
    rows = [row for of_image in predictions.values() for row in of_image]
    with atomic_file(path) as file:
        np.savez(
            file,
            image_ids=np.array(list(predictions), np.int64),
            counts=np.array([len(of_image) for of_image in predictions.values()], np.int64),
            boxes_xywh=np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4),
            scores=np.array([row["score"] for row in rows], np.float64),
            class_indices=np.array([row["category_id"] - 1 for row in rows], np.int64),
            labels=np.array(list(labels), str),
        )


Predicted = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of one image: ``[m, 4]`` boxes x, y, width, height in px, ``[m]`` scores and ``[m]`` class indices."""


def read_prediction_arrays(path: Path, labels: Sequence[str]) -> dict[int, Predicted]:
    """Predictions by image id; none where there is no such file, or one of other classes or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        if tuple(arrays["labels"].tolist()) != tuple(labels) or not len(arrays["counts"]):
            return {}
        ends, columns = np.cumsum(arrays["counts"]), ("boxes_xywh", "scores", "class_indices")
        if any(len(arrays[name]) != arrays["counts"].sum() for name in columns):
            raise ValueError("its arrays are of different lengths")
        boxes, scores, classes = (np.split(arrays[name], ends[:-1]) for name in columns)
        return dict(zip(arrays["image_ids"].tolist(), zip(boxes, scores, classes, strict=True), strict=True))
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged (%s); its images are looked at again", path, error)
        return {}


def read_predictions(path: Path, labels: Sequence[str]) -> dict[int, list[dict[str, Any]]]:
    """The same as COCO results."""
    return {
        image_id: [
            result_row(image_id, box, score, c)
            for box, score, c in zip(boxes, scores.tolist(), classes.tolist(), strict=True)
        ]
        for image_id, (boxes, scores, classes) in read_prediction_arrays(path, labels).items()
    }
