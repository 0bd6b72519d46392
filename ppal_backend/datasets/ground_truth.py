"""Data sets whose boxes are known, as people and other tools wrote them.

Images are found, sizes held against them, boxes cleaned; what is left out is counted.
"""

from __future__ import annotations

import logging
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from ppal_backend.datasets.coco import (
    CocoAnnotation,
    CocoCategory,
    CocoDataset,
    CocoFile,
    CocoImage,
    check_ids,
    named_in_errors,
)
from ppal_backend.datasets.images import exif_orientation, open_image, orientation_of
from ppal_backend.errors import DatasetError

logger = logging.getLogger(__name__)

_SLACK_PX = 1.5  # exports round, and VOC counts from 1

Box = tuple[str, float, float, float, float]
"""Label, then x, y, width, height in px of the image."""


@dataclass(frozen=True)
class CleaningReport:
    """What became of a file's boxes; all but ``images``, ``annotations`` and ``clipped`` were left out.

    ``turned`` counts images whose sides the file names the other way round than the picture is shown, ``sized`` those
    whose size it does not name.
    """

    images: int = 0
    annotations: int = 0
    degenerate: int = 0
    crowd: int = 0
    outside: int = 0
    clipped: int = 0
    turned: int = 0
    sized: int = 0

    @property
    def dropped(self) -> int:
        """Annotations that were left out."""
        return self.degenerate + self.crowd + self.outside

    @property
    def is_clean(self) -> bool:
        """Whether all is as the file says."""
        return not (self.dropped or self.clipped or self.turned or self.sized)

    def __str__(self) -> str:
        sized = f"; the file has no size of {self.sized} images, so it is their pictures'" * bool(self.sized)
        turned = f"; the sides of {self.turned} images were exchanged, as their pictures are shown" * bool(self.turned)
        return (
            f"{self.images} images, {self.annotations} boxes; dropped {self.degenerate} degenerate, {self.crowd} crowd "
            f"and {self.outside} outside the image; clipped {self.clipped}{turned}{sized}"
        )


@dataclass(frozen=True)
class ImageTruth:
    """All objects of one image: its size in px and its boxes (none = a true negative)."""

    width: int
    height: int
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class GroundTruth:
    """A cleaned data set.

    Attributes:
        dataset: Images with absolute paths; every box lies inside its image and has an area.
        groups: Group of near-duplicates by image id, for the images that name one.
        scenes: Kind of scene by image id, for the images that name one.
        report: What was left out while reading.
    """

    dataset: CocoDataset
    groups: Mapping[int, int] = field(default_factory=dict)
    scenes: Mapping[int, str] = field(default_factory=dict)
    report: CleaningReport = field(default_factory=CleaningReport)

    @property
    def labels(self) -> tuple[str, ...]:
        """Category names by rising category id."""
        return self.dataset.labels

    def paths(self) -> dict[int, Path]:
        """Absolute image path by image id."""
        return {image.id: Path(image.file_name) for image in self.dataset.images}

    def truths(self) -> dict[int, ImageTruth]:
        """Size and boxes by image id."""
        names = {category.id: category.name for category in self.dataset.categories}
        boxes: dict[int, list[Box]] = {image.id: [] for image in self.dataset.images}
        for row in self.dataset.annotations:
            boxes[row.image_id].append((names[row.category_id], *row.bbox_xywh))
        return {
            image.id: ImageTruth(image.width, image.height, tuple(boxes[image.id])) for image in self.dataset.images
        }

    def truths_by_path(self) -> dict[Path, ImageTruth]:
        """Size and boxes by absolute image path."""
        truths = self.truths()
        return {path: truths[image_id] for image_id, path in self.paths().items()}

    def subset(self, image_ids: Iterable[int]) -> GroundTruth:
        """The same categories with only these images, in the set's order.

        Raises:
            DatasetError: One of the ids is not in the set.
        """
        return replace(self, dataset=self.dataset.subset(image_ids))


def read_user_coco(
    path: Path, images: Path | None = None, *, keep_crowd: bool = False, labels: Sequence[str] | None = None
) -> GroundTruth:
    """Read a COCO detection file that people or other tools wrote.

    A relative ``file_name`` is looked for in ``images``; without that in the folder ``images`` beside the file, then in
    the file's own folder. Backslashes separate folders, and a name that repeats the images' folder
    (``images/a.png`` in ``images``) is found, as others write it; so is one with the folders of the machine that wrote
    it (``../../media/upload/1/a.png``), as Label Studio does, unless two images end in the same name. Ids are whole
    numbers, also when they are written as text; annotations may have none.

    Args:
        path: The file, or a folder that holds ``annotations.json``, ``result.json`` or ``_annotations.coco.json``.
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
    file = CocoFile.read(path, strict=False, images_alone=labels is not None)
    with named_in_errors(path):
        if not file.images:
            raise DatasetError("expected images, got an empty list; use another file")
        categories = file.categories
        if labels is not None:
            categories = tuple(CocoCategory(number, label) for number, label in enumerate(labels, start=1))
        check_ids(file.images, file.annotations, categories)
        located = _locate(file.images, path, images)
        dataset, report = clean(located, file.annotations, categories, str(path), keep_crowd=keep_crowd)
    details = {image.id: row for image, row in zip(file.images, file.image_rows, strict=True)}
    return GroundTruth(
        dataset,
        {i: row["group"] for i, row in details.items() if isinstance(row.get("group"), int)},
        {i: row["scene"] for i, row in details.items() if "scene" in row},
        report,
    )


def clean(
    images: Sequence[CocoImage],
    rows: Sequence[CocoAnnotation],
    categories: Sequence[CocoCategory],
    source: str,
    *,
    keep_crowd: bool = False,
) -> tuple[CocoDataset, CleaningReport]:
    """Hold images against their pictures and clean their boxes; what changes is counted, and logged.

    Args:
        images: With absolute paths and the sizes that were written down.
        rows: Their annotations.
        categories: Classes.
        source: Name of the data in the log.
        keep_crowd: Keep crowd regions; else they are dropped.

    Raises:
        DatasetError: See :func:`fit_to_pictures`.
    """
    upright, turned_rows, turned = fit_to_pictures(images, rows)
    kept, counts = _clean(turned_rows, upright, keep_crowd)
    sized = sum(not (image.width and image.height) for image in images)
    report = CleaningReport(len(upright), len(kept), **counts, turned=turned, sized=sized)
    if not report.is_clean:
        logger.warning("%s: %s", source, report)
    return CocoDataset(tuple(upright), tuple(kept), tuple(categories)), report


def fit_to_pictures(
    images: Sequence[CocoImage], rows: Sequence[CocoAnnotation]
) -> tuple[list[CocoImage], list[CocoAnnotation], int]:
    """Hold sizes that a file names against the pictures as browsers show them.

    An image without a size (a side is 0) has that of its picture.
    Where the sides are exchanged, the boxes tell which of the two frames they were drawn in: as shown, which is what
    Label Studio's exports hold under the sides of the stored picture, or as stored; then they are turned too. Boxes
    that fit both ways are taken as the other boxes of the file are, else as shown.

    Args:
        images: Images with absolute paths.
        rows: Their annotations.

    Returns:
        The images with the sizes of the pictures, the annotations in their frame, and how many images were turned.

    Raises:
        DatasetError: Pictures cannot be opened, one has another size than the file says, or boxes fit neither way.
    """
    seen = _shown_sizes(images)
    images = [i if i.width and i.height else replace(i, width=seen[i.id][0], height=seen[i.id][1]) for i in images]
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
    """Width and height in pixels of a picture as a browser shows it, and the EXIF orientation that it applies (1 to 8).

    Raises:
        DatasetError: It cannot be opened, or is a WebP that detectors turn and browsers do not.
    """
    try:
        with open_image(path) as picture:
            orientation = orientation_of(picture)
            width, height = picture.size
            is_ambiguous = picture.format == "WEBP" and exif_orientation(picture) != 1
    except (OSError, ValueError, SyntaxError) as error:
        raise DatasetError(f"expected a picture at {path}, got a file that cannot be opened ({error})") from None
    if is_ambiguous:
        raise DatasetError(
            f"expected a picture that all programs show alike at {path}, got a WebP with an EXIF orientation, by which "
            "detectors turn it and browsers do not; save it upright"
        )
    return (height, width, orientation) if orientation >= 5 else (width, height, orientation)


def _shown_sizes(images: Sequence[CocoImage]) -> dict[int, tuple[int, int, int]]:
    """:func:`shown_size` by image id; pictures that cannot be used are told together."""
    seen: dict[int, tuple[int, int, int]] = {}
    broken: list[str] = []
    for image in images:
        try:
            seen[image.id] = shown_size(Path(image.file_name))
        except DatasetError:
            broken.append(image.file_name)
    what = "that cannot be opened, or are WebP that only detectors turn, by an EXIF orientation (save these upright)"
    refuse_pictures(len(images), broken, what)
    return seen


def refuse_pictures(total: int, broken: Sequence[str], what: str) -> None:
    """Tell of pictures that cannot be used, all at once.

    Raises:
        DatasetError: There are any.
    """
    if broken:
        raise DatasetError(
            f"expected {total} pictures, got {len(broken)} files {what}, such as {list(broken[:3])}; fetch or save "
            "them again, or take them out of the data with their boxes"
        )


def need_files(names: Sequence[str]) -> None:
    """Hold a list of image files against the disk.

    Raises:
        DatasetError: Files are missing, or two images are one file.
    """
    gone = [name for name in names if not Path(name).is_file()]
    if gone:
        raise DatasetError(
            f"expected {len(names)} image files, got {len(gone)} missing, such as {gone[:3]}; pass their folder or "
            "remove them from the file"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DatasetError(f"expected every image file once, got {twice[:3]} again; remove the second entry")


def split(truth: GroundTruth, sizes: Mapping[str, int], *, seed: int = 0) -> dict[str, GroundTruth]:
    """Cut a set into disjoint parts of exact sizes without cutting a group of near-duplicates.

    Large groups are dealt out first, each to the part that is furthest from full; single images fill the rest.
    Images beyond the sum of ``sizes`` go nowhere.

    Args:
        truth: The set; images that name no group are groups of one.
        sizes: Number of images by name of the part.
        seed: Which of the equal groups goes where.

    Raises:
        DatasetError: The parts cannot be filled, for want of images or because the groups do not fit.
    """
    ids = truth.dataset.image_ids
    if sum(sizes.values()) > len(ids) or any(size < 0 for size in sizes.values()):
        raise DatasetError(f"expected sizes within {len(ids)} images, got {dict(sizes)}; ask for fewer")
    groups: dict[tuple[str, int], list[int]] = {}
    for image_id in ids:
        key = ("group", truth.groups[image_id]) if image_id in truth.groups else ("image", image_id)
        groups.setdefault(key, []).append(image_id)
    members = list(groups.values())
    order = np.random.default_rng(seed).permutation(len(members))
    parts: dict[str, list[int]] = {name: [] for name in sizes}
    for index in sorted(order, key=lambda index: -len(members[index])):
        group = members[index]
        fitting = [name for name, size in sizes.items() if size - len(parts[name]) >= len(group)]
        if fitting:
            best = max(fitting, key=lambda name: (sizes[name] - len(parts[name])) / sizes[name])
            parts[best].extend(group)
    short = {name: sizes[name] - len(chosen) for name, chosen in parts.items() if len(chosen) < sizes[name]}
    if short:
        raise DatasetError(f"expected groups that fill {dict(sizes)}, got {short} images short; use other sizes")
    return {name: truth.subset(chosen) for name, chosen in parts.items()}


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
    names = ("annotations.json", "result.json", "_annotations.coco.json")
    return next((path / name for name in names if (path / name).is_file()), path / names[0])


def _locate(images: Sequence[CocoImage], path: Path, folder: Path | None) -> list[CocoImage]:
    """The images with absolute file names."""
    here = path.parent.resolve()
    beside = here / "images"
    roots = [Path(folder).resolve()] if folder is not None else [*([beside] if beside.is_dir() else []), here]
    times = Counter(_plain(image.file_name).name for image in images)
    names = [str(_find(i.file_name, roots, times[_plain(i.file_name).name] == 1)) for i in images]
    need_files(names)
    return [replace(image, file_name=name) for image, name in zip(images, names, strict=True)]


def _find(name: str, roots: Sequence[Path], is_alone: bool) -> Path:
    """Where a picture lies. Accents may be spelled otherwise than in the file: names in archives made on macOS are."""
    spellings = dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))))
    ways = (way for spelled in spellings for way in _ways(spelled, roots, is_alone))
    return next((way for way in ways if way.is_file()), roots[0] / _plain(name))


def _ways(name: str, roots: Sequence[Path], is_alone: bool) -> Iterator[Path]:
    """Where to look; a picture whose last name no other has may lie without the folders before it."""
    plain = _plain(name)
    for root in roots:
        yield root / plain
        if len(plain.parts) > 1 and plain.parts[0] == root.name:
            yield root / PurePosixPath(*plain.parts[1:])
        yield root / name
    yield from (root / plain.name for root in roots if is_alone)


def _plain(name: str) -> PurePosixPath:
    return PurePosixPath(name.replace("\\", "/"))


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
