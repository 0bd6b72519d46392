"""Ground truth for the demo and the simulator: generated sets or the user's own COCO file, cleaned once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ppal_backend.datasets.coco import CleaningReport, CocoDataset, read_user_coco
from ppal_backend.errors import DatasetError

Box = tuple[str, float, float, float, float]
"""Label, then x, y, width, height in px of the image."""


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


def load_truth(path: Path, images_dir: Path | None = None) -> GroundTruth:
    """Read and clean a COCO detection file: the user's own or a generated one.

    Args:
        path: The file, or a folder that holds it; see :func:`~ppal_backend.datasets.coco.read_user_coco`.
        images_dir: Folder of the images.

    Raises:
        DatasetError: See there.
    """
    found = read_user_coco(path, images_dir)
    return GroundTruth(found.dataset, found.groups, found.scenes, found.report)


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
