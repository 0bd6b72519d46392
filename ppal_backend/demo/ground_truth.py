"""Ground truth for the demo and the simulator: generated sets or the user's own COCO file, cleaned once."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.errors import DatasetError

logger = logging.getLogger(__name__)

Box = tuple[str, float, float, float, float]
"""Label, then x, y, width, height in px of the image."""


@dataclass(frozen=True)
class ImageTruth:
    """All objects of one image: its size in px and its boxes (none = a true negative)."""

    width: int
    height: int
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class TruthReport:
    """What cleaning a COCO file left out."""

    images: int = 0
    annotations: int = 0
    degenerate: int = 0
    crowd: int = 0
    outside: int = 0
    clipped: int = 0

    @property
    def dropped(self) -> int:
        """Annotations that were left out."""
        return self.degenerate + self.crowd + self.outside

    def __str__(self) -> str:
        return (
            f"{self.images} images, {self.annotations} boxes; dropped {self.degenerate} degenerate, {self.crowd} crowd "
            f"and {self.outside} outside the image; clipped {self.clipped}"
        )


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
    report: TruthReport = field(default_factory=TruthReport)

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


def load_user_coco(path: Path, images_dir: Path | None = None) -> GroundTruth:
    """Read and clean a COCO detection file: the user's own or a generated one.

    ``file_name`` may be absolute, or relative to ``images_dir``; without one, to the folder ``images`` beside the file
    if there is one, else to the file's own folder. Boxes without area, crowd regions and boxes outside their image
    are dropped and counted; boxes reaching over the border are clipped.

    Args:
        path: The COCO JSON file, or a folder that holds ``annotations.json``.
        images_dir: Folder of the images.

    Raises:
        DatasetError: The file cannot be read, is not COCO detection, has duplicate ids, names an unknown category or
            image, or images are missing.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "annotations.json"
    coco = _read(path)
    folder = _images_folder(path, images_dir)
    images = tuple(_image(row, folder) for row in _rows(coco, "images", ("id", "file_name", "width", "height"), path))
    if not images:
        raise DatasetError(f"expected images in {path}, got an empty list; use another file")
    _check_files(images, folder)
    categories = tuple(
        CocoCategory(int(row["id"]), str(row["name"])) for row in _rows(coco, "categories", ("id", "name"), path)
    )
    rows = _rows(coco, "annotations", ("image_id", "category_id", "bbox"), path)
    annotations, counts = _clean(rows, images, categories, path)
    report = TruthReport(images=len(images), annotations=len(annotations), **counts)
    if report.dropped or report.clipped:
        logger.warning("%s: %s", path, report)
    return GroundTruth(
        dataset=CocoDataset(images, tuple(annotations), categories),
        groups={row["id"]: row["group"] for row in coco["images"] if "group" in row},
        scenes={row["id"]: row["scene"] for row in coco["images"] if "scene" in row},
        report=report,
    )


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


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"expected a COCO file at {path}, got none; check the path") from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"expected COCO JSON in {path}, got an unreadable file ({error}); check it") from None
    if not isinstance(content, dict):
        raise DatasetError(f"expected a COCO object in {path}, got a {type(content).__name__}; export it as COCO")
    return content


def _rows(coco: Mapping[str, Any], part: str, names: Sequence[str], path: Path) -> list[dict[str, Any]]:
    rows = coco.get(part)
    if not isinstance(rows, list):
        raise DatasetError(f"expected a list {part!r} in {path}, got {type(rows).__name__}; export it as COCO")
    for index, row in enumerate(rows):
        lacking = [name for name in names if not isinstance(row, dict) or name not in row]
        if lacking:
            raise DatasetError(
                f"expected {', '.join(names)} in {part}[{index}] of {path}, got none of {lacking}; add it"
            )
    return rows


def _images_folder(path: Path, images_dir: Path | None) -> Path:
    if images_dir is not None:
        folder = Path(images_dir)
        if not folder.is_dir():
            raise DatasetError(f"expected a folder of images at {folder}, got none; check the path")
        return folder.resolve()
    beside = path.parent / "images"
    return (beside if beside.is_dir() else path.parent).resolve()


def _image(row: Mapping[str, Any], folder: Path) -> CocoImage:
    try:
        return CocoImage(int(row["id"]), str(folder / str(row["file_name"])), int(row["width"]), int(row["height"]))
    except (TypeError, ValueError):
        raise DatasetError(f"expected numbers for id, width and height of an image, got {dict(row)}; mend it") from None


def _check_files(images: Sequence[CocoImage], folder: Path) -> None:
    gone = [image.file_name for image in images if not Path(image.file_name).is_file()]
    if gone:
        raise DatasetError(
            f"expected {len(images)} images in {folder}, got {len(gone)} missing, such as {gone[:3]}; "
            "pass their folder or remove them from the file"
        )
    names = [image.file_name for image in images]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})[:3]
        raise DatasetError(f"expected every image file once, got {twice} again; remove the second entry")


def _clean(
    rows: Sequence[Mapping[str, Any]], images: Sequence[CocoImage], categories: Sequence[CocoCategory], path: Path
) -> tuple[list[CocoAnnotation], dict[str, int]]:
    sides = {image.id: (image.width, image.height) for image in images}
    known = {category.id for category in categories}
    counts = {"degenerate": 0, "crowd": 0, "outside": 0, "clipped": 0}
    kept: list[CocoAnnotation] = []
    for number, row in enumerate(rows, start=1):
        if row["category_id"] not in known:
            raise DatasetError(f"{path}: expected a listed category_id, got {row['category_id']}; add or remove it")
        if row["image_id"] not in sides:
            raise DatasetError(f"{path}: expected a listed image_id, got {row['image_id']}; add or remove it")
        verdict, box = _clip(row, *sides[row["image_id"]])
        if verdict:
            counts[verdict] += 1
        if box is not None:
            kept.append(CocoAnnotation(row.get("id", number), row["image_id"], row["category_id"], box))
    return kept, counts


def _clip(row: Mapping[str, Any], width: int, height: int) -> tuple[str, tuple[float, float, float, float] | None]:
    """What is wrong with a box ("" for nothing) and the box inside its image, or None when it is dropped."""
    if row.get("iscrowd"):
        return "crowd", None
    box = row["bbox"]
    numbers = isinstance(box, Sequence) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
    if not numbers or not all(math.isfinite(value) for value in box) or box[2] <= 0 or box[3] <= 0:
        return "degenerate", None
    left, top = max(0.0, box[0]), max(0.0, box[1])
    right, bottom = min(float(width), box[0] + box[2]), min(float(height), box[1] + box[3])
    if right <= left or bottom <= top:
        return "outside", None
    if (left, top, right, bottom) == (box[0], box[1], box[0] + box[2], box[1] + box[3]):
        return "", (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    return "clipped", (left, top, right - left, bottom - top)
