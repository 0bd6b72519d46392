"""COCO detection files: validated when read, written atomically."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        images = _unique_ids("images", self.images)
        categories = _unique_ids("categories", self.categories)
        _unique_ids("annotations", self.annotations)
        if not self.categories:
            raise DatasetError("expected at least one category, got none; add the classes")
        CategoryMap(self.labels)
        for image in self.images:
            if image.width <= 0 or image.height <= 0:
                raise DatasetError(
                    f"expected image {image.id} with a size > 0, got {image.width} x {image.height}; mend it"
                )
        for row in self.annotations:
            if row.image_id not in images:
                raise DatasetError(
                    f"expected annotation {row.id} on a listed image, got image_id {row.image_id}; add it"
                )
            if row.category_id not in categories:
                raise DatasetError(
                    f"expected annotation {row.id} of a listed category, got category_id {row.category_id}; add it"
                )
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

    def class_counts(self) -> tuple[int, ...]:
        """Return the number of instances by class index (crowd regions not counted)."""
        counts = Counter(row.category_id for row in self.annotations if not row.iscrowd)
        return tuple(counts[category.id] for category in sorted(self.categories, key=lambda c: c.id))

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
            "images": [vars(image) for image in self.images],
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
            "categories": [vars(category) for category in self.categories],
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
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DatasetError(f"expected a COCO file at {path}, got none ({error.strerror}); check the path") from None
        except ValueError as error:
            raise DatasetError(f"expected JSON in {path}, got broken text ({error}); write the file again") from None
        if not isinstance(data, dict):
            raise DatasetError(
                f"expected a COCO object in {path}, got {type(data).__name__}; give images, annotations …"
            )
        root = (image_root or path.parent).resolve()
        try:
            rows = [_annotation(row, i) for i, row in enumerate(_rows(data, "annotations"))]
            kept = [row for row in rows if not (row.bbox_xywh[2] <= 0 or row.bbox_xywh[3] <= 0)]
            if len(kept) < len(rows):
                logger.warning("%s: dropped %d boxes without area", path.name, len(rows) - len(kept))
            return cls(
                images=tuple(_image(row, i, root) for i, row in enumerate(_rows(data, "images"))),
                annotations=tuple(kept),
                categories=tuple(_category(row, i) for i, row in enumerate(_rows(data, "categories"))),
            )
        except DatasetError as error:
            raise DatasetError(f"{path.name}: {error}") from None


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
        raise DatasetError(f"expected {where} to be an object, got {type(row).__name__}; mend it")
    value = row.get(key)
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise DatasetError(f"expected {where}.{key} to be {names}, got {value!r}; mend it")
    return value


def _pixels(row: Any, where: str, key: str) -> int:
    value = _value(row, where, key, int, float)
    if not math.isfinite(value):
        raise DatasetError(f"expected {where}.{key} in pixels, got {value}; mend it")
    return int(value)


def _image(row: Any, index: int, root: Path) -> CocoImage:
    where = f"images[{index}]"
    name = _value(row, where, "file_name", str)
    return CocoImage(
        id=_value(row, where, "id", int),
        file_name=str(root / name),
        width=_pixels(row, where, "width"),
        height=_pixels(row, where, "height"),
    )


def _annotation(row: Any, index: int) -> CocoAnnotation:
    where = f"annotations[{index}]"
    box = _value(row, where, "bbox", list)
    if len(box) != 4 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in box):
        raise DatasetError(f"expected {where}.bbox to be four numbers [x, y, width, height], got {box!r}; mend it")
    crowd = row.get("iscrowd", 0)
    return CocoAnnotation(
        id=_value(row, where, "id", int),
        image_id=_value(row, where, "image_id", int),
        category_id=_value(row, where, "category_id", int),
        bbox_xywh=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
        iscrowd=1 if crowd else 0,
    )


def _category(row: Any, index: int) -> CocoCategory:
    where = f"categories[{index}]"
    return CocoCategory(id=_value(row, where, "id", int), name=_value(row, where, "name", str))
