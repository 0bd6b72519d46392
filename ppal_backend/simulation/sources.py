"""Where a simulation's data come from: COCO files, a COCO or VOC folder as published, or generated scenes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppal_backend.datasets.coco import CocoAnnotation, CocoDataset
from ppal_backend.demo.ground_truth import load_user_coco
from ppal_backend.demo.scenes import GENERATOR_VERSION, generate, read_manifest
from ppal_backend.errors import DatasetError, SettingsError
from ppal_backend.simulation.benchmark import Benchmark, check_files
from ppal_backend.simulation.voc import read_voc

logger = logging.getLogger(__name__)

_TEST_SEED = 1_000_003
FORMATS = ("coco", "coco-layout", "voc", "emoji")


@dataclass(frozen=True)
class DataSource:
    """Which data to read.

    Args:
        format: ``coco`` (two files), ``coco-layout`` (a folder as published), ``voc`` (a VOCdevkit) or ``emoji``
            (generated).
        data: COCO file of the pool, or the folder of a layout.
        images: Folder of the pool's images (``coco``).
        test: COCO file of the test set (``coco``).
        test_images: Folder of its images; the pool's by default.
        train_splits: Of ``voc``, pairs of year and list; of ``coco-layout``, names such as ``train2017``.
        test_splits: Likewise.
        family: Glyph family of ``emoji``.
        pool_images: Of ``emoji``.
        test_size: Of ``emoji``.
        seed: Of ``emoji``.
        burst_share: Of ``emoji``: share of the pool's images in bursts of near-duplicates; None for the family's own.
        sha256: Expected checksum of the generated files; a difference is logged and told in the report.
    """

    format: str = "coco"
    data: Path | None = None
    images: Path | None = None
    test: Path | None = None
    test_images: Path | None = None
    train_splits: tuple[Any, ...] = ()
    test_splits: tuple[Any, ...] = ()
    family: str = "demo"
    pool_images: int = 1500
    test_size: int = 400
    seed: int = 0
    burst_share: float | None = None
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise SettingsError(f"expected a data format of {', '.join(FORMATS)}, got {self.format!r}; choose one")
        if self.format != "emoji" and self.data is None:
            wanted = "the folder of the data set" if self.format != "coco" else "a COCO file"
            raise SettingsError(f"expected {wanted}, got none; pass it with --data")
        if self.format == "coco" and self.test is None:
            raise SettingsError("expected a COCO file of test images, got none; pass it with --test")

    def load(self, work: Path, on_progress: Callable[[int, int], None] | None = None) -> Benchmark:
        """Read (or generate) the data.

        Args:
            work: Folder for generated images.
            on_progress: Called with (done, total) while generating.

        Raises:
            DatasetError: Something is missing or broken; the message names it.
        """
        if self.format == "emoji":
            return self._generate(work, on_progress)
        assert self.data is not None  # checked at construction
        if self.format == "voc":
            pool, test = (
                check_files(read_voc(self.data, [(str(year), str(name)) for year, name in splits]))
                for splits in (self.train_splits, self.test_splits)
            )
            names = [f"{year} {name}" for year, name in (*self.train_splits, *self.test_splits)]
            return Benchmark(pool, test, {}, f"Pascal VOC ({', '.join(names)})")
        if self.format == "coco-layout":
            pool, test = (_coco_layout(self.data, names) for names in (self.train_splits, self.test_splits))
            return Benchmark(pool, test, {}, f"COCO ({', '.join((*self.train_splits, *self.test_splits))})")
        assert self.test is not None  # checked at construction
        pool = read_coco(self.data, self.images)
        test = read_coco(self.test, self.test_images or self.images)
        return Benchmark(pool, test, read_groups(self.data), f"{self.data.name} and {self.test.name}")

    def _generate(self, work: Path, on_progress: Callable[[int, int], None] | None) -> Benchmark:
        """The pool with the bursts asked for, and test images that are a scene each."""
        total = self.pool_images + self.test_size
        kept = "own" if self.burst_share is None else f"{self.burst_share:g}"
        parts = []
        for part, size, seed, share, before in (
            ("pool", self.pool_images, self.seed, self.burst_share, 0),
            ("test", self.test_size, self.seed + _TEST_SEED, 0.0, self.pool_images),
        ):
            folder = Path(work) / f"emoji-{self.family}-{part}-{size}-{self.seed}-{kept}-v{GENERATOR_VERSION}"
            report = None if on_progress is None else _shifted(on_progress, before, total)
            path = generate(
                folder, images=size, seed=seed, glyphs=self.family, burst_share=share, on_progress=report
            )  # fmt: skip
            parts.append((load_user_coco(path), str((read_manifest(folder) or {}).get("sha256", ""))))
        (pool, _), (test, _) = parts
        checksum = hashlib.sha256("".join(digest for _, digest in parts).encode()).hexdigest()
        if self.sha256 and checksum != self.sha256:
            logger.warning(
                "the generated images differ from those of the preset (sha256 %s…, expected %s…): another version of "
                "an image library; results will not be equal to published ones",
                checksum[:12],
                self.sha256[:12],
            )
        agrees = "" if not self.sha256 else (", as published" if checksum == self.sha256 else ", NOT as published")
        source = f"emoji/{self.family}, seed {self.seed}, sha256 {checksum[:16]}{agrees}"
        return Benchmark(pool.dataset, test.dataset, dict(pool.groups), source)


def _shifted(on_progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: on_progress(before + done, total)


def read_coco(path: Path, images: Path | None = None) -> CocoDataset:
    """Read a COCO file for training and evaluation: crowd regions stay (they are ignored, not counted).

    Args:
        path: The file.
        images: Folder of relative file names; without one ``images`` beside the file, else the file's own folder.

    Returns:
        The data with absolute file names; boxes without area are dropped and boxes clipped to their image.

    Raises:
        DatasetError: See :meth:`~ppal_backend.datasets.coco.CocoDataset.read`; or images are missing.
    """
    path = Path(path)
    if images is not None and not Path(images).is_dir():
        raise DatasetError(f"expected a folder of images at {images}, got none; check the path")
    beside = path.parent / "images"
    folder = Path(images) if images is not None else (beside if beside.is_dir() else path.parent)
    dataset = check_files(CocoDataset.read(path, folder))
    sides = {image.id: (image.width, image.height) for image in dataset.images}
    rows = [_clipped(row, *sides[row.image_id]) for row in dataset.annotations]
    kept = tuple(row for row in rows if row is not None)
    if len(kept) < len(rows):
        logger.warning("%s: dropped %d boxes outside their image", path.name, len(rows) - len(kept))
    return replace(dataset, annotations=kept)


def read_groups(path: Path) -> dict[int, int]:
    """Groups of near-duplicates by image id, for images of a COCO file that have a field ``group``."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))["images"]
    return {row["id"]: row["group"] for row in rows if isinstance(row.get("group"), int)}


def source_from(table: Mapping[str, Any]) -> DataSource:
    """A data source from a preset's ``[data]`` table and what the command line says.

    Raises:
        SettingsError: A key is unknown or a value is missing.
    """
    known = set(DataSource.__dataclass_fields__)
    unknown = sorted(set(table) - known)
    if unknown:
        raise SettingsError(f"expected data settings among {sorted(known)}, got {unknown}; correct the name")
    values = dict(table)
    for name in ("data", "images", "test", "test_images"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    for name in ("train_splits", "test_splits"):
        values[name] = tuple(tuple(v) if isinstance(v, list) else v for v in values.get(name, ()))
    return DataSource(**values)


def _coco_layout(root: Path, names: Sequence[str]) -> CocoDataset:
    """``root/annotations/instances_NAME.json`` with its images in ``root/NAME``; one split a set."""
    if len(names) != 1:
        raise SettingsError(f"expected one split of a COCO folder, got {list(names)}; name one")
    return read_coco(Path(root) / "annotations" / f"instances_{names[0]}.json", Path(root) / str(names[0]))


def _clipped(row: CocoAnnotation, width: int, height: int) -> CocoAnnotation | None:
    x, y, w, h = row.bbox_xywh
    left, top, right, bottom = max(0.0, x), max(0.0, y), min(float(width), x + w), min(float(height), y + h)
    if right <= left or bottom <= top:
        return None
    if (left, top, right, bottom) == (x, y, x + w, y + h):
        return row
    return replace(row, bbox_xywh=(left, top, right - left, bottom - top))
