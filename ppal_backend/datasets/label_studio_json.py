"""Label Studio's JSON export as a data set."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from ppal_backend.datasets.categories import CategoryMap
from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.datasets.consensus import Vote, consensus_of, disagreement_of, latest_by_person
from ppal_backend.datasets.images import ImageInfo

REGION_TYPE = "rectanglelabels"
MIN_BOX_PX = 1.0
HullOf = Callable[[Mapping[str, Any], int, int], tuple[float, float, float, float] | None]
"""Corners in pixels of the box around a region of another shape, of an image of some width and height."""
SHAPES = ("polygonlabels", "ellipselabels", "brushlabels")
_OLDEST = datetime.min.replace(tzinfo=UTC)


class RegionSchema(Protocol):
    """What the conversion needs of a labeling config."""

    @property
    def from_name(self) -> str:
        """Name of the RectangleLabels control."""

    @property
    def to_name(self) -> str:
        """Name of its Image."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels in config order."""

    def label(self, name: str) -> str | None:
        """Label that an annotation's string stands for."""


@dataclass(frozen=True)
class ConversionReport:
    """What became of the annotations; counts of what was left out, and of what was changed.

    Args:
        tasks: Tasks looked at.
        images: Images in the data set.
        boxes: Instances in the data set.
        negatives: Images without any instance (kept: they teach what is no object).
        unannotated: Tasks with only cancelled or no annotations.
        missing_images: Annotated tasks whose image could not be had.
        unknown_labels: Label -> boxes of labels that the config does not have (any more).
        rotated: Turned boxes, in place of which their hulls are learned from (not left out).
        clipped: Boxes cut at the border of their image (not left out).
        degenerate: Boxes less than one pixel wide or high inside the image.
        malformed: Regions without usable numbers or labels.
        other_regions: Region type -> regions of other types or controls.
        hulls: Region type -> polygons, ellipses and masks in place of which the boxes around them are learned.
        agreed: Tasks that several people annotated, of which the boxes that they agree on are learned.
    """

    tasks: int = 0
    images: int = 0
    boxes: int = 0
    negatives: int = 0
    unannotated: int = 0
    missing_images: int = 0
    unknown_labels: Mapping[str, int] = field(default_factory=dict)
    rotated: int = 0
    clipped: int = 0
    degenerate: int = 0
    malformed: int = 0
    other_regions: Mapping[str, int] = field(default_factory=dict)
    agreed: int = 0
    hulls: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return asdict(self)


def choose_annotation(task: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the one annotation of a task to learn from.

    Cancelled (skipped) ones are out, drafts lie elsewhere in a task and are never looked at. A ground truth goes
    before the others; among equals the one changed last (ties: the higher id). None if there is none.
    """
    submitted = [a for a in task.get("annotations") or () if isinstance(a, Mapping) and not a.get("was_cancelled")]
    return max(submitted, key=_preference, default=None)


def votes_of(task: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Of a task's annotations those that are learned from, by person, the one changed last at the end.

    Ground truths stand alone: whoever made them is right. Of an import every annotation is one, so there may be
    several people's. Cancelled ones are out.
    """
    submitted = [a for a in task.get("annotations") or () if isinstance(a, Mapping) and not a.get("was_cancelled")]
    truths = [a for a in submitted if a.get("ground_truth")]
    by_person = latest_by_person(sorted(truths or submitted, key=_preference))
    return dict(sorted(by_person.items(), key=lambda item: _preference(item[1])))


def people_of(
    tasks: Iterable[Mapping[str, Any]],
    schema: RegionSchema,
    images: Mapping[int, ImageInfo],
    hull_of: HullOf | None = None,
) -> dict[str, Any]:
    """Where people differ who annotated the same tasks (``consensus.disagreement_of``); a ground truth is one vote."""

    def several() -> Iterable[tuple[int, list[int], list[Vote]]]:
        categories = CategoryMap(schema.labels)
        for task in tasks:
            task_id = int(task["id"])
            plain = {"annotations": [{**a, "ground_truth": False} for a in task.get("annotations") or ()]}
            votes = votes_of(plain)
            if len(votes) > 1 and task_id in images:
                boxes = _votes(votes, schema, categories, images[task_id], _Counts(hull_of))
                yield task_id, list(votes), boxes

    return disagreement_of(several())


def _votes(
    votes: Mapping[int, Mapping[str, Any]],
    schema: RegionSchema,
    categories: CategoryMap,
    info: ImageInfo,
    counts: _Counts,
) -> list[Vote]:
    return [
        Vote(person, (x, y, x + w, y + h), schema.labels[category - 1], rank)
        for rank, (person, annotation) in enumerate(votes.items())
        for category, (x, y, w, h) in _instances(annotation, schema, categories, info, counts)
    ]


def _agreed(
    votes: Mapping[int, Mapping[str, Any]],
    schema: RegionSchema,
    categories: CategoryMap,
    info: ImageInfo,
    counts: _Counts,
) -> list[tuple[int, tuple[float, float, float, float]]]:
    """Category and box of what a task teaches: its one annotation, or what most people drew."""
    if len(votes) == 1:
        return list(_instances(next(iter(votes.values())), schema, categories, info, counts))
    counts.agreed += 1
    return [
        (categories.category_id(label), (x1, y1, x2 - x1, y2 - y1))
        for label, (x1, y1, x2, y2) in consensus_of(_votes(votes, schema, categories, info, counts), len(votes))
    ]


def annotations_to_coco(
    tasks: Iterable[Mapping[str, Any]],
    schema: RegionSchema,
    images: Mapping[int, ImageInfo],
    hull_of: HullOf | None = None,
) -> tuple[CocoDataset, ConversionReport]:
    """Convert exported tasks; they are read once, one by one. Of a task that several people annotated the boxes
    count that most of them mean (:mod:`ppal_backend.datasets.consensus`), unless one is a ground truth.

    Args:
        tasks: Tasks as exported, with ``annotations``.
        schema: The labeling config (a ``LabelSchema``).
        images: Task id -> cached image; its size is what percent become pixels of.
        hull_of: Makes boxes of polygons, ellipses and brush masks on the same Image whose labels the project has;
            without it these are left out and counted.

    Returns:
        The data set (image id = task id, images by rising id, category ids 1..C in config order) and the report.
        No tasks give a data set without images.
    """
    categories = CategoryMap(schema.labels)
    counts = _Counts(hull_of)
    coco_images: dict[int, CocoImage] = {}
    boxes: dict[int, list[tuple[int, tuple[float, float, float, float]]]] = {}
    for task in tasks:
        counts.tasks += 1
        votes = votes_of(task)
        task_id = int(task["id"])
        if not votes:
            counts.unannotated += 1
        elif task_id not in images:
            counts.missing_images += 1
        else:
            info = images[task_id]
            coco_images[task_id] = CocoImage(task_id, str(info.path), info.width, info.height)
            boxes[task_id] = _agreed(votes, schema, categories, info, counts)
    rows = [
        CocoAnnotation(number, image_id, category_id, box)
        for number, (image_id, category_id, box) in enumerate(
            ((i, category, box) for i in sorted(boxes) for category, box in boxes[i]), start=1
        )
    ]
    dataset = CocoDataset(
        images=tuple(coco_images[i] for i in sorted(coco_images)),
        annotations=tuple(rows),
        categories=tuple(CocoCategory(row["id"], row["name"]) for row in categories.coco_categories()),
    )
    return dataset, counts.report(len(coco_images), len(rows), sum(not found for found in boxes.values()))


def region_to_box(value: Mapping[str, Any], width: int, height: int) -> tuple[float, float, float, float] | None:
    """Return the hull ``(x1, y1, x2, y2)`` in pixels of a region's ``value``, not clipped; None if it has no numbers.

    ``x, y, width, height`` are percent of the image, ``rotation`` degrees clockwise about the top-left corner. The
    corners are turned in pixels, since percent of width and of height differ in length.
    """
    numbers = [value.get(key) for key in ("x", "y", "width", "height")] + [value.get("rotation") or 0]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
        return None
    x, y, w, h, degrees = (float(n) for n in numbers)
    x, w = x / 100 * width, w / 100 * width
    y, h = y / 100 * height, h / 100 * height
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    xs = [x + a * cos - b * sin for a in (0.0, w) for b in (0.0, h)]
    ys = [y + a * sin + b * cos for a in (0.0, w) for b in (0.0, h)]
    return min(xs), min(ys), max(xs), max(ys)


class _Counts:
    """Running counts of one conversion, and what makes boxes of other shapes in it."""

    def __init__(self, hull_of: HullOf | None = None) -> None:
        self.hull_of = hull_of
        self.hulls: Counter[str] = Counter()
        self.tasks = self.unannotated = self.missing_images = self.degenerate = self.malformed = 0
        self.rotated = self.clipped = self.agreed = 0
        self.unknown_labels: Counter[str] = Counter()
        self.other_regions: Counter[str] = Counter()

    def report(self, images: int, boxes: int, negatives: int) -> ConversionReport:
        return ConversionReport(
            tasks=self.tasks,
            images=images,
            boxes=boxes,
            negatives=negatives,
            unannotated=self.unannotated,
            missing_images=self.missing_images,
            unknown_labels=dict(self.unknown_labels),
            rotated=self.rotated,
            clipped=self.clipped,
            degenerate=self.degenerate,
            malformed=self.malformed,
            other_regions=dict(self.other_regions),
            agreed=self.agreed,
            hulls=dict(self.hulls),
        )


def _preference(annotation: Mapping[str, Any]) -> tuple[bool, datetime, int]:
    changed = read_time(annotation.get("updated_at") or annotation.get("created_at")) or _OLDEST
    number = annotation.get("id")
    return bool(annotation.get("ground_truth")), changed, number if isinstance(number, int) else -1


def read_time(text: Any) -> datetime | None:
    """A time as Label Studio writes it, with its zone (UTC where it names none); None for anything else."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _instances(
    annotation: Mapping[str, Any], schema: RegionSchema, categories: CategoryMap, info: ImageInfo, counts: _Counts
) -> Iterable[tuple[int, tuple[float, float, float, float]]]:
    result = annotation.get("result")
    for region in result if isinstance(result, list) else ():
        if not isinstance(region, Mapping):
            counts.malformed += 1
            continue
        kind, value = str(region.get("type")), region.get("value")
        other = counts.hull_of if kind in SHAPES and region.get("to_name") == schema.to_name else None
        if other is None and (kind != REGION_TYPE or region.get("from_name") != schema.from_name):
            counts.other_regions[kind] += 1
            continue
        names = value.get(kind) if isinstance(value, Mapping) else None
        if other is not None:
            hull = other(region, info.width, info.height)
        else:
            hull = region_to_box(value, info.width, info.height) if isinstance(value, Mapping) else None
        if hull is None or not isinstance(names, list) or not names:
            counts.malformed += 1
            continue
        box = _clip(hull, info.width, info.height)
        named = {name: schema.label(name) for name in map(str, names)}
        counts.unknown_labels.update(name for name, label in named.items() if label is None)
        labels = [label for label in named.values() if label is not None]
        if box is None:
            counts.degenerate += len(labels)
        elif labels:
            counts.hulls.update([kind] if other is not None else [])
            counts.rotated += bool(value.get("rotation")) if isinstance(value, Mapping) and other is None else 0
            counts.clipped += _sticks_out(hull, info.width, info.height)
            yield from ((categories.category_id(label), box) for label in labels)


def _sticks_out(hull: tuple[float, float, float, float], width: int, height: int) -> bool:
    """By more than rounding: a border that people drew outside the image."""
    return min(hull[0], hull[1], width - hull[2], height - hull[3]) < -1.0


def _clip(hull: tuple[float, float, float, float], width: int, height: int) -> tuple[float, float, float, float] | None:
    x1, x2 = (min(max(v, 0.0), float(width)) for v in (hull[0], hull[2]))
    y1, y2 = (min(max(v, 0.0), float(height)) for v in (hull[1], hull[3]))
    if x2 - x1 < MIN_BOX_PX or y2 - y1 < MIN_BOX_PX:
        return None
    return x1, y1, x2 - x1, y2 - y1
