"""COCO detection files: the only reader of them, validated when read, written atomically.

:meth:`CocoDataset.read` takes a file as it is and asks for a whole one, as this package writes them.
:func:`read_user_coco` takes what people and other tools wrote: it finds the images, holds the sizes against them, and
cleans the boxes, counting what it leaves out.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

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
        data = _load(path)
        root = (image_root or path.parent).resolve()
        with _named(path):
            rows = _annotations(data)
            kept = [row for row in rows if not (row.bbox_xywh[2] <= 0 or row.bbox_xywh[3] <= 0)]
            if len(kept) < len(rows):
                logger.warning("%s: dropped %d boxes without area", path.name, len(rows) - len(kept))
            images = [_image(row, i) for i, row in enumerate(_rows(data, "images"))]
            return cls(
                images=tuple(replace(image, file_name=str(root / image.file_name)) for image in images),
                annotations=tuple(kept),
                categories=_categories(data),
            )


@dataclass(frozen=True)
class CleaningReport:
    """What became of a file's boxes; all but ``images``, ``annotations`` and ``clipped`` were left out.

    ``turned`` counts images whose sides the file names the other way round than the picture is shown.
    """

    images: int = 0
    annotations: int = 0
    degenerate: int = 0
    crowd: int = 0
    outside: int = 0
    clipped: int = 0
    turned: int = 0

    @property
    def dropped(self) -> int:
        """Annotations that were left out."""
        return self.degenerate + self.crowd + self.outside

    def __str__(self) -> str:
        turned = f"; the sides of {self.turned} images were exchanged, as their pictures are shown" * bool(self.turned)
        return (
            f"{self.images} images, {self.annotations} boxes; dropped {self.degenerate} degenerate, {self.crowd} crowd "
            f"and {self.outside} outside the image; clipped {self.clipped}{turned}"
        )


@dataclass(frozen=True)
class UserCoco:
    """A file of people's own, cleaned.

    Args:
        dataset: Images with absolute paths and sizes as displayed; every box lies inside its image and has an area.
        groups: Group of near-duplicates by image id, for the images that name one.
        scenes: Kind of scene by image id, for the images that name one.
        report: What was left out while reading.
    """

    dataset: CocoDataset
    groups: Mapping[int, int] = field(default_factory=dict)
    scenes: Mapping[int, str] = field(default_factory=dict)
    report: CleaningReport = field(default_factory=CleaningReport)


def read_user_coco(
    path: Path, images: Path | None = None, *, keep_crowd: bool = False, labels: Sequence[str] | None = None
) -> UserCoco:
    """Read a COCO detection file that people or other tools wrote.

    A relative ``file_name`` is looked for in ``images``; without that in the folder ``images`` beside the file, then in
    the file's own folder. Backslashes separate folders, and a name that repeats the images' folder
    (``images/a.png`` in ``images``) is found, as Label Studio and others write it. Ids are whole numbers, also when
    they are written as text; annotations may have none.

    Args:
        path: The file, or a folder that holds ``annotations.json`` or ``result.json``.
        images: Folder of the images.
        keep_crowd: Keep crowd regions (training and evaluation ignore them); else they are dropped.
        labels: Read the images alone and take these classes: for pools, whose files may have no annotations.

    Raises:
        DatasetError: The file cannot be read, is not COCO detection, has duplicate ids, names an unknown category or
            image; images are missing or cannot be opened, or are of another size than the file says.
    """
    path = _file_of(Path(path))
    if images is not None and not Path(images).is_dir():
        raise DatasetError(f"expected a folder of images at {images}, got none; check the path")
    data = _load(path)
    with _named(path):
        found = [_image(row, i) for i, row in enumerate(_rows(data, "images"))]
        if not found:
            raise DatasetError("expected images, got an empty list; use another file")
        _unique_ids("images", found)
        located = _locate(found, path, images)
        if labels is None:
            rows, categories = _annotations(data, strict=False), _categories(data)
        else:
            rows, categories = [], tuple(CocoCategory(i, label) for i, label in enumerate(labels, start=1))
        _check_references(rows, found, categories)
        upright, rows, turned = fit_to_pictures(located, rows)
        kept, counts = _clean(rows, upright, keep_crowd)
        report = CleaningReport(len(upright), len(kept), **counts, turned=turned)
        dataset = CocoDataset(tuple(upright), tuple(kept), categories)
    if report.dropped or report.clipped or report.turned:
        logger.warning("%s: %s", path, report)
    ids = [image.id for image in found]
    raw = dict(zip(ids, data["images"], strict=True))
    return UserCoco(
        dataset,
        {i: row["group"] for i, row in raw.items() if isinstance(row.get("group"), int)},
        {i: row["scene"] for i, row in raw.items() if "scene" in row},
        report,
    )


def fit_to_pictures(
    images: Sequence[CocoImage], rows: Sequence[CocoAnnotation]
) -> tuple[list[CocoImage], list[CocoAnnotation], int]:
    """Hold sizes that a file names against the pictures as they are shown (EXIF orientation applied).

    Where the sides are exchanged, the boxes tell which of the two frames they were drawn in: as shown, which is what
    Label Studio's exports hold under the sides of the stored picture, or as stored; then they are turned too. Boxes
    that fit both ways are taken as the other boxes of the file are, else as shown.

    Args:
        images: Images with absolute paths.
        rows: Their annotations.

    Returns:
        The images with the sizes of the pictures, the annotations in their frame, and how many images were turned.

    Raises:
        DatasetError: A picture cannot be opened, has another size than the file says, or boxes that fit neither way.
    """
    seen = {image.id: shown_size(Path(image.file_name)) for image in images}
    turned = {i.id: i for i in images if seen[i.id][:2] == (i.height, i.width) and i.width != i.height}
    for image in images:
        width, height, _ = seen[image.id]
        if image.id not in turned and (image.width, image.height) != (width, height):
            raise DatasetError(
                f"expected image {image.id} ({Path(image.file_name).name[:80]}) of {image.width} x {image.height} px "
                f"as the file says, got a picture of {width} x {height}; use the pictures that were annotated, or "
                "correct width, height and boxes"
            )
    if not turned:
        return list(images), list(rows), 0
    mine = [row for row in rows if row.image_id in turned]
    as_stored = any(not _fits(row, seen[row.image_id][0], seen[row.image_id][1]) for row in mine)
    as_shown = any(not _fits(row, turned[row.image_id].width, turned[row.image_id].height) for row in mine)
    if as_stored and as_shown:
        name = Path(next(iter(turned.values())).file_name).name[:80]
        raise DatasetError(
            f"expected boxes inside pictures whose sides are exchanged ({name} and {len(turned) - 1} more), got some "
            "that fit only as shown and some only as stored; correct width and height of these images"
        )
    sizes = {i: seen[i][:2] for i in turned}
    upright = [replace(i, width=sizes[i.id][0], height=sizes[i.id][1]) if i.id in turned else i for i in images]
    if not as_stored:
        return upright, list(rows), len(turned)
    moved = [
        replace(row, bbox_xywh=_turned(row.bbox_xywh, turned[row.image_id], seen[row.image_id][2]))
        if row.image_id in turned
        else row
        for row in rows
    ]
    return upright, moved, len(turned)


def shown_size(path: Path) -> tuple[int, int, int]:
    """Width and height in pixels of a picture as it is shown, and its EXIF orientation (1 to 8).

    Raises:
        DatasetError: It cannot be opened.
    """
    try:
        with Image.open(path) as picture:
            orientation = picture.getexif().get(_ORIENTATION, 1)
            width, height = picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"expected a picture at {path}, got a file that cannot be opened ({error})") from None
    turned = orientation in (5, 6, 7, 8)
    return (height, width, orientation) if turned else (width, height, orientation if orientation in _UPRIGHT else 1)


def need_files(dataset: CocoDataset) -> CocoDataset:
    """The same data set, once every image file is there.

    Raises:
        DatasetError: Files are missing, or two images are one file.
    """
    _need_files([image.file_name for image in dataset.images])
    return dataset


_ORIENTATION = 0x0112
_UPRIGHT = (1, 2, 3, 4)
_SLACK_PX = 1.5  # exports round, and VOC counts from 1


def _fits(row: CocoAnnotation, width: int, height: int) -> bool:
    x, y, w, h = row.bbox_xywh
    inside = x >= -_SLACK_PX and y >= -_SLACK_PX and x + w <= width + _SLACK_PX and y + h <= height + _SLACK_PX
    return inside or not all(math.isfinite(v) for v in row.bbox_xywh)


def _turned(box: tuple[float, ...], stored: CocoImage, orientation: int) -> tuple[float, float, float, float]:
    """A box of the stored picture in the frame in which the picture is shown."""
    x, y, w, h = box
    right, below = stored.width - x - w, stored.height - y - h
    places = {5: (y, x), 6: (below, x), 7: (below, right), 8: (y, right)}
    return (*places.get(orientation, (y, x)), h, w)


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = ("annotations.json", "result.json")
    return next((path / name for name in names if (path / name).is_file()), path / names[0])


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
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
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"{path.name}: {error}") from None


def _locate(images: Sequence[CocoImage], path: Path, folder: Path | None) -> list[CocoImage]:
    """The images with absolute file names."""
    here = path.parent.resolve()
    beside = here / "images"
    roots = [Path(folder).resolve()] if folder is not None else [*([beside] if beside.is_dir() else []), here]
    names = [str(_find(image.file_name, roots)) for image in images]
    _need_files(names)
    return [replace(image, file_name=name) for image, name in zip(images, names, strict=True)]


def _find(name: str, roots: Sequence[Path]) -> Path:
    plain = PurePosixPath(name.replace("\\", "/"))
    for root in roots:
        ways = [root / plain]
        if len(plain.parts) > 1 and plain.parts[0] == root.name:
            ways.append(root / PurePosixPath(*plain.parts[1:]))
        for way in (*ways, root / name):
            if way.is_file():
                return way
    return roots[0] / plain


def _need_files(names: Sequence[str]) -> None:
    gone = [name for name in names if not Path(name).is_file()]
    if gone:
        raise DatasetError(
            f"expected {len(names)} image files, got {len(gone)} missing, such as {gone[:3]}; pass their folder or "
            "remove them from the file"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DatasetError(f"expected every image file once, got {twice[:3]} again; remove the second entry")


def _check_references(
    rows: Sequence[CocoAnnotation], images: Sequence[CocoImage], categories: Sequence[CocoCategory]
) -> None:
    listed, known = _unique_ids("images", images), _unique_ids("categories", categories)
    for row in rows:
        if row.image_id not in listed:
            raise DatasetError(f"expected annotation {row.id} on a listed image, got image_id {row.image_id}; add it")
        if row.category_id not in known:
            raise DatasetError(
                f"expected annotation {row.id} of a listed category, got category_id {row.category_id}; add it"
            )


def _clean(
    rows: Sequence[CocoAnnotation], images: Sequence[CocoImage], keep_crowd: bool
) -> tuple[list[CocoAnnotation], dict[str, int]]:
    sides = {image.id: (image.width, image.height) for image in images}
    counts = {"degenerate": 0, "crowd": 0, "outside": 0, "clipped": 0}
    kept: list[CocoAnnotation] = []
    for row in rows:
        verdict, box = ("crowd", None) if row.iscrowd and not keep_crowd else _clip(row, *sides[row.image_id])
        if verdict:
            counts[verdict] += 1
        if box is not None:
            kept.append(replace(row, bbox_xywh=box))
    return kept, counts


def _clip(row: CocoAnnotation, width: int, height: int) -> tuple[str, tuple[float, float, float, float] | None]:
    """What is wrong with a box ("" for nothing) and the box inside its image, or None when it is dropped."""
    x, y, w, h = row.bbox_xywh
    if not all(math.isfinite(value) for value in row.bbox_xywh) or w <= 0 or h <= 0:
        return "degenerate", None
    left, top, right, bottom = max(0.0, x), max(0.0, y), min(float(width), x + w), min(float(height), y + h)
    if right <= left or bottom <= top:
        return "outside", None
    if (left, top, right, bottom) == (x, y, x + w, y + h):
        return "", row.bbox_xywh
    return "clipped", (left, top, right - left, bottom - top)


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
        raise DatasetError(f"expected {where}.{key} to be {names}, got {value!r:.80}; mend it")
    return value


def _id(row: Any, where: str, key: str) -> int:
    """An id: a whole number, also when it is written as text or with a fraction of zero."""
    value = _value(row, where, key, int, float, str)
    try:
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError
    except (ValueError, OverflowError):
        raise DatasetError(
            f"expected {where}.{key} to be a whole number, got {value!r:.80}; number images, categories and annotations"
        ) from None
    return number


def _pixels(row: Any, where: str, key: str) -> int:
    value = _value(row, where, key, int, float)
    if not math.isfinite(value):
        raise DatasetError(f"expected {where}.{key} in pixels, got {value}; mend it")
    return int(value)


def _image(row: Any, index: int) -> CocoImage:
    where = f"images[{index}]"
    name = _value(row, where, "file_name", str)
    return CocoImage(_id(row, where, "id"), name, _pixels(row, where, "width"), _pixels(row, where, "height"))


def _annotations(data: Mapping[str, Any], strict: bool = True) -> list[CocoAnnotation]:
    """The annotations of a file, numbered where one has no id; without ``strict`` a box that is none counts as one
    without area."""
    rows = _rows(data, "annotations")
    numbered = all(isinstance(row, dict) and row.get("id") is not None for row in rows)
    return [_annotation(row, i, numbered, strict) for i, row in enumerate(rows)]


def _annotation(row: Any, index: int, numbered: bool, strict: bool) -> CocoAnnotation:
    where = f"annotations[{index}]"
    image_id = _id(row, where, "image_id")
    category_id = _id(row, where, "category_id")
    box = _value(row, where, "bbox", list)
    good = len(box) == 4 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in box)
    if strict and not good:
        raise DatasetError(f"expected {where}.bbox to be four numbers [x, y, width, height], got {box!r:.80}; mend it")
    x, y, w, h = (float(v) for v in box) if good else (0.0, 0.0, 0.0, 0.0)
    number = _id(row, where, "id") if numbered else index + 1
    return CocoAnnotation(number, image_id, category_id, (x, y, w, h), 1 if row.get("iscrowd", 0) else 0)


def _categories(data: Mapping[str, Any]) -> tuple[CocoCategory, ...]:
    rows = [(f"categories[{i}]", row) for i, row in enumerate(_rows(data, "categories"))]
    return tuple(CocoCategory(_id(row, where, "id"), _value(row, where, "name", str)) for where, row in rows)
