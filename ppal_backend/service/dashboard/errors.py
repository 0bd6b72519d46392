"""The page Model errors: what the detector gets right and wrong on the evaluation set, image by image."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

import numpy as np

from ppal_backend.datasets.coco import CocoDataset, CocoImage, read_prediction_arrays
from ppal_backend.errors import DatasetError, StateError
from ppal_backend.rounds.labelled import Truth, truth_by_image
from ppal_backend.rounds.model_errors import Judged, Judgement, judge
from ppal_backend.service.dashboard.drawing import ShownBox, place_labels, shown_box
from ppal_backend.service.dashboard.project import Project, identity
from ppal_backend.structures.quality import count

PAGE = 12
MOST_CLASSES = 20
MOST_REASONS = 6
SCORES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SIZES = {"small": "small, below 32 × 32 px", "medium": "medium", "large": "large, from 96 × 96 px on"}
KINDS = {
    "mistakes": "all mistakes",
    "wrong": "wrong detections",
    "missed": "missed objects",
    "right": "right detections",
    "all": "everything",
}
NONE = -1
"""In an address: no detection (missed), or no annotated box (nothing there)."""


@dataclass(frozen=True)
class Filter:
    """What of the boxes is shown; None or "" for no limit.

    Args:
        show: One of ``KINDS``.
        label: Class index that was detected or labelled.
        size: One of ``SIZES``.
        score: Least score of a detection instead of those that annotators see.
        detected: Class index of a cell of the matrix, ``NONE`` for missed.
        labelled: Its other class index, ``NONE`` for nothing.
    """

    show: str = "mistakes"
    label: int | None = None
    size: str = ""
    score: float | None = None
    detected: int | None = None
    labelled: int | None = None

    @classmethod
    def of(cls, words: Mapping[str, str], num_classes: int) -> Filter:
        """From an address; what cannot be is as if it were not there."""
        score = words.get("score", "")
        classes = {name: _index(words.get(name, ""), num_classes) for name in ("label", "detected", "labelled")}
        if classes["detected"] is None or classes["labelled"] is None:
            classes["detected"] = classes["labelled"] = None
        return cls(
            words["show"] if words.get("show") in KINDS else "mistakes",
            size=words["size"] if words.get("size") in SIZES else "",
            score=float(score) if score in map(str, SCORES) else None,
            **{**classes, "label": None if classes["label"] == NONE else classes["label"]},
        )

    def fits(self, item: Judged) -> bool:
        """Whether a box is to be shown."""
        if self.size and item.size != self.size:
            return False
        if self.label is not None and self.label not in (item.detected, item.labelled):
            return False
        if self.detected is not None:
            return (_or_none(item.detected), _or_none(item.labelled)) == (self.detected, self.labelled)
        is_missed = item.kind == "missed" or item.why == "another label"
        return {"mistakes": item.kind != "right", "missed": is_missed, "all": True}.get(
            self.show, item.kind == self.show
        )

    def address(self, **changes: Any) -> str:
        """The query of the page with this filter."""
        values = {**vars(self), **changes}
        return urlencode({name: value for name, value in values.items() if value not in (None, "")})


def _index(text: str, num_classes: int) -> int | None:
    value = int(text) if text.removeprefix("-").isdecimal() and len(text) < 9 else num_classes
    return value if NONE <= value < num_classes else None


def _or_none(index: int | None) -> int:
    return NONE if index is None else index


@dataclass(frozen=True)
class Card:
    """An image with the boxes that fit the filter. ``more`` are those that are drawn without a reason in words."""

    task_id: int
    width: int
    height: int
    boxes: Sequence[ShownBox]
    reasons: Sequence[str]
    more: int


@dataclass(frozen=True)
class Cell:
    """A count of the matrix; ``address`` shows its boxes, "" for none."""

    count: int
    address: str
    style: Literal["", "right", "mistake"]


@dataclass(frozen=True)
class Matrix:
    """Detected class by labelled class. ``left_out`` are classes that it does not show, with fewer mistakes."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    left_out: int


def matrix_of(judgement: Judgement, labels: Sequence[str], chosen: Filter) -> Matrix:
    """The confusion matrix; of more than ``MOST_CLASSES`` those with the most mistakes."""
    counts = judgement.confusion(len(labels))
    mistakes = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    worst = np.argsort(-mistakes[:-1], kind="stable")[:MOST_CLASSES]
    shown = [*sorted(worst.tolist()), len(labels)]

    def cell(row: int, column: int) -> Cell:
        number = int(counts[row, column])
        d, a = (NONE if i == len(labels) else i for i in (row, column))
        base = Filter(score=chosen.score)
        style: Literal["", "right", "mistake"] = "" if not number else "right" if row == column else "mistake"
        return Cell(number, base.address(detected=d, labelled=a) if number else "", style)

    def name(index: int, other: str) -> str:
        return labels[index] if index < len(labels) else other

    rows = [(name(row, "missed"), [cell(row, column) for column in shown]) for row in shown]
    return Matrix([name(column, "nothing there") for column in shown], rows, len(labels) - len(worst))


def cards_of(items: Sequence[Judged], images: Mapping[int, CocoImage], truth: Mapping[int, Truth],
             labels: Sequence[str], page: int) -> tuple[list[Card], int]:  # fmt: skip
    """The images of a page, 1 the first, those with the most boxes that fit in front; and how many pages there are."""
    by_image: dict[int, list[Judged]] = defaultdict(list)
    for item in items:
        by_image[item.image_id].append(item)
    order = sorted(by_image, key=lambda i: (-len(by_image[i]), i))
    pages = max(1, -(-len(order) // PAGE))
    page = min(page, pages)
    return [
        _card(images[i], truth[i], by_image[i], labels) for i in order[(page - 1) * PAGE : page * PAGE]
    ], pages  # fmt: skip


def _card(image: CocoImage, truth: Truth, items: Sequence[Judged], labels: Sequence[str]) -> Card:
    concerned = {item.annotated for item in items if item.kind != "right"}
    people = [
        shown_box(box, "people doubted" if row in concerned else "people", f"labelled: {labels[c]}")
        for row, (box, c) in enumerate(zip(truth[0].tolist(), truth[1].tolist(), strict=True))
        if c >= 0
    ]
    found = [item for item in items if item.detected is not None and item.score is not None]
    texts = [f"{labels[item.detected or 0]} {item.score:.2f}" for item in found]
    places = place_labels([item.box_xyxy for item in found], texts, image.width, image.height)
    detected = [
        replace(shown_box(item.box_xyxy, "model fine" if item.kind == "right" else "model", text), label_at=place)
        for item, text, place in zip(found, texts, places, strict=True)
    ]
    said = Counter(reason_of(item, labels) for item in items)
    reasons = [text if times == 1 else f"{text[:-1]} ({times} times)." for text, times in said.items()][:MOST_REASONS]
    more = len(items) - sum(list(said.values())[:MOST_REASONS])
    return Card(image.id, image.width, image.height, [*people, *detected], reasons, more)


def reason_of(item: Judged, labels: Sequence[str]) -> str:
    """What is right or wrong with a box, in words."""
    if item.kind == "missed":
        return f"Missed: {labels[item.labelled or 0]}, {item.size}."
    seen = f"{labels[item.detected or 0]} ({item.score:.2f})"
    if item.kind == "right":
        return f"Right: {seen}."
    if item.why == "another label":
        return f"Another label: {seen} where {labels[item.labelled or 0]} is labelled."
    said = {
        "found already": "found already",
        "out of place": "out of place",
        "nothing there": "nothing is labelled there",
    }
    return f"Wrong: {seen}, {said[item.why]}."


@lru_cache(maxsize=4)
def _judged(
    truth_file: tuple[Path, int, int],
    kept_file: tuple[Path, int, int],
    labels: tuple[str, ...],
    least: tuple[float, ...],
) -> tuple[CocoDataset, Mapping[int, Truth], Judgement]:
    """Files of a round do not change, so they are compared once."""
    try:
        evaluation = CocoDataset.read(truth_file[0])
    except DatasetError as error:
        raise StateError(f"the evaluation set cannot be read: {error}; run another round") from None
    predictions = read_prediction_arrays(kept_file[0], labels)
    return evaluation, truth_by_image(evaluation, labels), judge(evaluation, predictions, labels, least)


def measured_in(project: Project) -> tuple[int, Path, Path] | None:
    """The newest round that keeps what the detector in force predicted on the evaluation set: its number, the file of
    the set and that of the predictions. None where there is none on disk."""
    version = project.trained
    if version is None:
        return None
    for record in reversed(project.rounds):
        folder = project.files(record.number).folder
        truth, kept = folder / "dataset" / "val.json", folder / "evaluation" / f"{version.round_number}.npz"
        if record.number >= version.round_number and truth.is_file() and kept.is_file():
            return record.number, truth, kept
    return None


def errors_page(project: Project, words: Mapping[str, str], page: int) -> dict[str, Any]:
    """What the detector in force gets right and wrong."""
    version, found = project.trained, measured_in(project)
    if version is None or found is None:
        return {"version": version, "matrix": None, "why_none": _why_none(project)}
    number, truth_file, kept_file = found
    labels = version.labels
    chosen = Filter.of(words, len(labels))
    shown_from = project.shown_from(labels)
    least = shown_from if chosen.score is None else [chosen.score] * len(labels)
    evaluation, truth, judgement = _judged(identity(truth_file), identity(kept_file), labels, tuple(least))
    if not judgement.items and not judgement.weaker:
        return {"version": version, "matrix": None, "why_none": _why_empty(len(evaluation.images), judgement)}
    items = [item for item in judgement.items if chosen.fits(item)]
    page = max(1, page)
    cards, pages = cards_of(items, {image.id: image for image in evaluation.images}, truth, labels, page)
    images = project.files(number).evaluated()
    return {
        "version": version, "number": number, "images": len(evaluation.images), "judgement": judgement,
        "confused": sum(item.why == "another label" for item in judgement.items), "fitting": len(items),
        "matrix": matrix_of(judgement, labels, chosen), "chosen": chosen, "cards": cards, "labels": labels,
        "cell": _cell_words(chosen, labels), "page": min(page, pages), "pages": pages, "kinds": KINDS, "sizes": SIZES,
        "scores": SCORES, "on_disk": {c.task_id for c in cards if project.cached(images[c.task_id]) is not None},
        "shown_from": _range_of(shown_from),
    }  # fmt: skip


def _range_of(scores: Sequence[float]) -> str:
    finite = [score for score in scores if score < math.inf]
    return " to ".join(f"{score:.2f}" for score in sorted({min(finite), max(finite)})) if finite else "none"


def _cell_words(chosen: Filter, labels: Sequence[str]) -> str:
    if chosen.detected is None or chosen.labelled is None:
        return ""
    detected = "missed" if chosen.detected == NONE else f"detected as {labels[chosen.detected]}"
    labelled = "nothing labelled there" if chosen.labelled == NONE else f"labelled {labels[chosen.labelled]}"
    return f"{detected}, {labelled}"


def _why_none(project: Project) -> str:
    version = project.trained
    if version is None:
        return "Nothing to tell before the first training."
    if version.metrics.get("trained_on_everything"):
        return "This version was trained on the evaluation set too, so its errors there tell nothing."
    return (
        f"No round on disk keeps what version {version.version} predicted on the evaluation set: it had no images yet, "
        "or the files were removed. The next training keeps it."
    )


def _why_empty(images: int, judgement: Judgement) -> str:
    if judgement.unseen:
        return (
            f"What was predicted on the {count(images, 'image')} of the evaluation set is damaged; run another round."
        )
    return f"Nothing is labelled on the {count(images, 'image')} of the evaluation set, and nothing was detected there."
