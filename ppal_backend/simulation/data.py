"""The data of a simulation: a pool with true boxes, a test set, groups of near-duplicates, and where they come from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.datasets.coco import CocoDataset
from ppal_backend.datasets.ground_truth import GroundTruth, read_user_coco, refuse_pictures
from ppal_backend.datasets.images import MOST_ELONGATED
from ppal_backend.datasets.voc import LABELS, read_voc
from ppal_backend.errors import DatasetError, SettingsError
from ppal_backend.files import read_json, write_json
from ppal_backend.structures.quality import count, listed
from ppal_backend.synthetic.scenes import GENERATOR_VERSION, generate, read_manifest

logger = logging.getLogger(__name__)

FORMATS = ("coco", "folder", "coco-layout", "voc", "emoji")
POOL, TEST, FACTS = "pool.json", "test.json", "facts.json"
_TEST_SEED = 1_000_003
_TAKEN = {"images": ("coco", "folder"), "test": ("coco",), "test_images": ("coco", "folder"), "classes": ("voc",),
          "data": ("coco", "folder", "coco-layout", "voc")}  # fmt: skip
"""Formats that read a setting: given with another one, it would be left unread."""


@dataclass(frozen=True)
class Benchmark:
    """Data with all boxes known.

    Args:
        pool: Images to label, with their boxes; file names are absolute.
        test: Images to evaluate on.
        groups: Group of near-duplicates by image id of the pool, for images that name one.
        source: Where it comes from, for people.
        notes: What was left out and what stands out, for people, in the report too.

    Raises:
        DatasetError: The pool has no images or boxes, the test set has none, or it has classes that the pool lacks.
    """

    pool: CocoDataset
    test: CocoDataset
    groups: Mapping[int, int] = field(default_factory=dict)
    source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, dataset in (("pool", self.pool), ("test", self.test)):
            if not dataset.images or not any(not row.iscrowd for row in dataset.annotations):
                raise DatasetError(
                    f"expected a {name} set with images and boxes, got {len(dataset.images)} images with "
                    f"{len(dataset.annotations)} boxes; use another file or split"
                )
        unknown = sorted(set(self.test.labels) - set(self.pool.labels))
        if unknown:
            raise DatasetError(
                f"expected the classes of the test set among those of the pool, got {unknown[:5]} besides; write the "
                "same categories into both"
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels in the order of the class indices."""
        return self.pool.labels

    @cached_property
    def boxes(self) -> dict[int, int]:
        """True boxes by image id of the pool, crowd regions apart."""
        counts = Counter(row.image_id for row in self.pool.annotations if not row.iscrowd)
        return {image_id: counts[image_id] for image_id in self.pool.image_ids}

    @cached_property
    def class_sets(self) -> dict[int, frozenset[int]]:
        """Category ids present, by image id of the pool."""
        present: dict[int, set[int]] = {image_id: set() for image_id in self.pool.image_ids}
        for row in self.pool.annotations:
            if not row.iscrowd:
                present[row.image_id].add(row.category_id)
        return {image_id: frozenset(ids) for image_id, ids in present.items()}

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of annotations, sizes and file names without their folder."""
        digest = hashlib.sha256()
        for dataset in (self.pool, self.test):
            digest.update(json.dumps(list(dataset.labels)).encode())
            for image in sorted(dataset.images, key=lambda image: image.id):
                digest.update(f"{image.id} {Path(image.file_name).name} {image.width} {image.height}\n".encode())
            for row in sorted(dataset.annotations, key=lambda row: row.id):
                digest.update(f"{row.image_id} {row.category_id} {row.bbox_xywh} {row.iscrowd}\n".encode())
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """What a report needs to know about the data without reading it again."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "labels": list(self.labels),
            "class_counts": list(self.pool.class_counts()),
            "pool_images": len(self.pool.images),
            "pool_boxes": sum(self.boxes.values()),
            "test_images": len(self.test.images),
            "test_boxes": sum(not row.iscrowd for row in self.test.annotations),
            "groups": [[image_id, group] for image_id, group in self.groups.items()],
            "notes": list(self.notes),
        }

    def need_pictures(self) -> None:
        """Decode every picture as detectors do: a damaged one would end a simulation after its first training.

        Raises:
            DatasetError: Some are damaged, or so long that nothing is left of them at a detector's input size.
        """
        import cv2

        images = (*self.pool.images, *self.test.images)
        broken = []
        for image in images:
            is_strip = max(image.width, image.height) > MOST_ELONGATED * min(image.width, image.height)
            content = np.fromfile(image.file_name, np.uint8)
            if is_strip or not len(content) or cv2.imdecode(content, cv2.IMREAD_REDUCED_COLOR_8) is None:
                broken.append(image.file_name)
        what = f"that are damaged, of a kind no detector reads, or longer than {MOST_ELONGATED} times their width"
        refuse_pictures(len(images), broken, what)

    def write(self, folder: Path) -> None:
        """Write the data where the processes of a simulation read it; the facts come last."""
        self.pool.write(folder / POOL)
        self.test.write(folder / TEST)
        write_json(folder / FACTS, self.facts())

    @classmethod
    def read(cls, folder: Path) -> Benchmark:
        """Read what :meth:`write` wrote."""
        facts = read_json(folder / FACTS)
        pool, test = CocoDataset.read(folder / POOL), CocoDataset.read(folder / TEST)
        groups = {int(i): int(g) for i, g in facts["groups"]}
        return cls(pool, test, groups, facts["source"], tuple(facts.get("notes", ())))


@dataclass(frozen=True)
class DataSource:
    """Which data to read.

    Args:
        format: ``coco`` (two files), ``folder`` (one that holds both, see :func:`_files_of`), ``coco-layout`` (a folder
            as published), ``voc`` (a VOCdevkit) or ``emoji`` (generated).
        data: COCO file of the pool, or the folder of a layout.
        images: Folder of the pool's images (``coco`` and ``folder``).
        test: COCO file of the test set (``coco``).
        test_images: Folder of its images; the pool's by default.
        train_splits: Of ``voc``, pairs of year and list; of ``coco-layout``, names such as ``train2017``.
        test_splits: Likewise.
        classes: Of ``voc``: its classes in the order of the class indices; empty for the twenty of Pascal VOC.
        family: Glyph family of ``emoji``.
        pool_images: Of ``emoji``.
        test_size: Of ``emoji``.
        seed: Of ``emoji``.
        burst_share: Of ``emoji``: share of the pool's images in bursts of near-duplicates; None for the family's own.
        sha256: Expected checksum of the generated files; a difference is logged and named in the report.
    """

    format: str = "coco"
    data: Path | None = None
    images: Path | None = None
    test: Path | None = None
    test_images: Path | None = None
    train_splits: tuple[Any, ...] = ()
    test_splits: tuple[Any, ...] = ()
    classes: tuple[str, ...] = ()
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
        for name, formats in _TAKEN.items():
            if getattr(self, name) and self.format not in formats:
                raise SettingsError(
                    f"expected no --{name.replace('_', '-')} with data of the form {self.format}, got one; leave it out"
                )

    def load(self, work: Path, on_progress: Callable[[int, int], None] | None = None) -> Benchmark:
        """Read (or generate) the data.

        Args:
            work: Folder for generated images.
            on_progress: Called with (done, total) while generating.

        Raises:
            DatasetError: Something is missing or broken; the message names it.
        """
        found = self._read(work, on_progress)
        remarks = tuple(_remarks(found))
        for remark in remarks:
            logger.warning("%s: %s", found.source, remark)
        return replace(found, notes=(*found.notes, *remarks))

    def _read(self, work: Path, on_progress: Callable[[int, int], None] | None) -> Benchmark:
        if self.format == "emoji":
            return self._generate(work, on_progress)
        assert self.data is not None  # checked at construction
        if self.format == "voc":
            pool, test = (
                read_voc(self.data, [(str(year), str(name)) for year, name in splits], self.classes or LABELS)
                for splits in (self.train_splits, self.test_splits)
            )
            names = [f"{year} {name}" for year, name in (*self.train_splits, *self.test_splits)]
            return Benchmark(pool, test, {}, f"Pascal VOC ({', '.join(names)})")
        if self.format == "coco-layout":
            parts = [_coco_layout(self.data, names) for names in (self.train_splits, self.test_splits)]
            return _joined(parts[0], parts[1], f"COCO ({', '.join((*self.train_splits, *self.test_splits))})")
        if self.format == "folder":
            paths, notes = _files_of(self.data)
            source = self.data.resolve().name
        else:
            assert self.test is not None  # checked at construction
            paths, notes = (self.data, self.test), ()
            alike = self.data.name == self.test.name
            source = " and ".join("/".join(path.resolve().parts[-2 if alike else -1 :]) for path in paths)
        folders = self.images, self.test_images or self.images
        parts = [read_user_coco(*where, keep_crowd=True) for where in zip(paths, folders, strict=True)]
        return _joined(parts[0], parts[1], source, notes)

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
            parts.append((read_user_coco(path), str((read_manifest(folder) or {}).get("sha256", ""))))
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
    if values.get("data") and values.get("format", "coco") in ("coco", "folder"):
        if values.get("test") is not None or values["data"].is_file():
            values["format"] = "coco"
        elif values["data"].is_dir():
            values["format"] = "folder"
    if isinstance(values.get("classes"), str):
        values["classes"] = [name.strip() for name in values["classes"].split(",") if name.strip()]
    values["classes"] = tuple(values.get("classes") or ())
    for name in ("train_splits", "test_splits"):
        values[name] = tuple(tuple(v) if isinstance(v, list) else v for v in values.get(name, ()))
    return DataSource(**values)


def _files_of(root: Path) -> tuple[tuple[Path, Path], tuple[str, ...]]:
    """COCO files of the pool and of the test set in a folder, and what of it is not read.

    ``pool.json`` and ``test.json``, or as Roboflow exports them: folders ``train`` and ``test``, or ``valid`` where
    there is no ``test``, each with its own file.

    Raises:
        DatasetError: The folder holds neither.
    """
    parts = [root / name for name in ("train", "test", "valid") if (root / name).is_dir()]
    if (root / POOL).is_file() and (root / TEST).is_file():
        return (root / POOL, root / TEST), ()
    if len(parts) < 2 or parts[0].name != "train":
        there = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else "no folder"
        raise DatasetError(
            f"expected {POOL} and {TEST} with images, or train and test as Roboflow exports COCO, in {root}, got "
            f"{there}; lay the data out so, or pass COCO files with --data and --test"
        )
    unread = tuple(f"{path.name} is neither in the pool nor in the test set" for path in parts[2:])
    return (parts[0], parts[1]), unread


def _joined(pool: GroundTruth, test: GroundTruth, source: str, notes: Sequence[str] = ()) -> Benchmark:
    """A benchmark of two COCO files, less the classes without a box in either: nobody can find or measure these."""
    told = [
        *notes,
        *(f"{n}: {part.report}" for n, part in (("pool", pool), ("test", test)) if not part.report.is_clean),
    ]
    drawn = _drawn(pool.dataset) | _drawn(test.dataset)
    idle = sorted({*pool.labels, *test.labels} - drawn)
    parts = pool.dataset, test.dataset
    if idle and drawn:
        told.append(f"left out {count(len(idle), 'class', 'classes')} without a box: {listed(idle)}")
        logger.warning("%s: %s", source, told[-1])
        parts = _of_classes(parts[0], drawn), _of_classes(parts[1], drawn)
    return Benchmark(*parts, dict(pool.groups), source, tuple(told))


def _of_classes(data: CocoDataset, labels: set[str]) -> CocoDataset:
    return replace(data, categories=tuple(c for c in data.categories if c.name in labels))


def _remarks(data: Benchmark) -> Iterator[str]:
    """What figures cannot mean what they seem to."""
    pool, test = _drawn(data.pool), _drawn(data.test)
    for name, other, classes, what in (
        ("pool", "test set", test - pool, "no model learns them, and they count in mAP"),
        ("test set", "pool", pool - test, "they do not count in mAP"),
    ):
        if classes:
            missing = count(len(classes), "class", "classes")
            yield f"the {name} has no box of {missing} that the {other} has: {listed(sorted(classes))}; {what}"
    measured = {image.file_name for image in data.test.images}
    both = [Path(image.file_name).name for image in data.pool.images if image.file_name in measured]
    if both:
        what = f"in the pool and in the test set, such as {both[0]}; models are measured on what they learn from"
        yield f"{count(len(both), 'picture is', 'pictures are')} {what}"


def _drawn(data: CocoDataset) -> set[str]:
    """Labels of the classes that have a box, a crowd region at least."""
    names = {category.id: category.name for category in data.categories}
    return {names[row.category_id] for row in data.annotations}


def _coco_layout(root: Path, names: Sequence[str]) -> GroundTruth:
    """``root/annotations/instances_NAME.json`` with its images in ``root/NAME``; one split a set."""
    if len(names) != 1:
        raise SettingsError(f"expected one split of a COCO folder, got {list(names)}; name one")
    file = Path(root) / "annotations" / f"instances_{names[0]}.json"
    return read_user_coco(file, Path(root) / str(names[0]), keep_crowd=True)
