"""The data of a simulation: a pool with true boxes, a test set, and groups of near-duplicates."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ppal_backend.datasets.coco import CocoDataset
from ppal_backend.errors import DatasetError
from ppal_backend.files import read_json, write_json

logger = logging.getLogger(__name__)

POOL, TEST, FACTS = "pool.json", "test.json", "facts.json"


@dataclass(frozen=True)
class Benchmark:
    """Data with all boxes known.

    Args:
        pool: Images to label, with their boxes; file names are absolute.
        test: Images to evaluate on.
        groups: Group of near-duplicates by image id of the pool, for images that name one.
        source: Where it comes from, for people.

    Raises:
        DatasetError: The pool has no images or boxes, the test set has none, or it has classes that the pool lacks.
    """

    pool: CocoDataset
    test: CocoDataset
    groups: Mapping[int, int] = field(default_factory=dict)
    source: str = ""

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
                f"expected the classes of the test set among those of the pool, got {unknown[:5]} besides; use one list"
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
        }

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
        return cls(pool, test, {int(i): int(g) for i, g in facts["groups"]}, facts["source"])
