"""Labelled images worth a second look, and how much of what was proposed people could keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from ppal_backend.service.dashboard.drawing import ShownBox, place_labels, shown_box
from ppal_backend.service.dashboard.project import Project

PAGE = 12


@dataclass(frozen=True)
class Agreement:
    """What became of a version's pre-annotations: tasks, and boxes by what people did to them."""

    version: str
    tasks: int
    kept: int
    moved: int
    relabelled: int
    removed: int
    added: int

    @property
    def proposed(self) -> int:
        """Boxes that people were shown."""
        return self.kept + self.moved + self.relabelled + self.removed

    @property
    def saved(self) -> float | None:
        """Share in [0, 1] of all boxes, shown or added, that needed no hand; None without any."""
        boxes = self.proposed + self.added
        return self.kept / boxes if boxes else None


@dataclass(frozen=True)
class Doubtful:
    """A task to look at again. ``round_number`` is the round that has its image, None where that is not on disk."""

    place: int
    task_id: int
    round_number: int | None
    width: int
    height: int
    boxes: Sequence[ShownBox]
    reasons: Sequence[str]
    digest: str = ""
    annotator: int | None = None


def agreement_rows(counts: Mapping[str, Mapping[str, int]], versions: Sequence[str]) -> list[Agreement]:
    """A row for every version that proposed boxes, in the order of ``versions``, those it does not name in front."""
    place = {version: number for number, version in enumerate(versions)}
    rows = [Agreement(version=version, **count) for version, count in counts.items()]
    return sorted((r for r in rows if r.proposed), key=lambda r: (place.get(r.version, -1), r.version))


def total_of(rows: Sequence[Agreement]) -> Agreement:
    """All versions together."""
    names = ("tasks", "kept", "moved", "relabelled", "removed", "added")
    return Agreement("all", **{name: sum(getattr(row, name) for row in rows) for name in names})


@dataclass(frozen=True)
class Doubts:
    """Which tasks are listed: of a label that a doubt is about, of an annotator, those that were dismissed."""

    label: str = ""
    annotator: int | None = None
    dismissed: bool = False

    @classmethod
    def of(cls, words: Mapping[str, str]) -> Doubts:
        """From an address; what cannot be is as if it were not there."""
        who = words.get("annotator", "")
        number = int(who) if who.isdecimal() and len(who) < 12 else None
        return cls(words.get("label", ""), number, words.get("dismissed") == "1")

    def fits(self, task: Mapping[str, Any], dismissed: Mapping[int, str]) -> bool:
        """Whether a task is to be listed."""
        is_dismissed = dismissed.get(task["task_id"]) == digest_of(task)
        return (
            is_dismissed == self.dismissed
            and (self.annotator is None or task.get("annotator") == self.annotator)
            and (not self.label or self.label in _labels_of(task))
        )

    def address(self, **changes: Any) -> str:
        """The query of the page with these."""
        values = {"label": self.label, "annotator": self.annotator, "dismissed": int(self.dismissed) or "", **changes}
        return urlencode({name: value for name, value in values.items() if value not in (None, "")})


def digest_of(task: Mapping[str, Any]) -> str:
    """Tells a task's annotated boxes from others."""
    return hashlib.sha256(json.dumps(task["annotated"], sort_keys=True).encode()).hexdigest()[:16]


def _labels_of(task: Mapping[str, Any]) -> set[str]:
    """Labels that the doubts about a task are about, seen or annotated."""
    doubted = {d["annotated"] for d in task["disputes"] if d["annotated"] is not None}
    return {d["label"] for d in task["disputes"]} | {task["annotated"][row]["label"] for row in doubted}


def pages_of(review: Mapping[str, Any]) -> int:
    """How many pages the list has, at least one."""
    return max(1, -(-len(review["tasks"]) // PAGE))


def doubtful_on(review: Mapping[str, Any], page: int, rounds_on_disk: Sequence[int]) -> list[Doubtful]:
    """The tasks on a page, 1 the first.

    Args:
        review: what the round left in its folder.
        page: 1 the first.
        rounds_on_disk: rounds whose images can be shown.
    """
    start = (page - 1) * PAGE
    return [
        Doubtful(
            place=place,
            task_id=task["task_id"],
            round_number=task["round"] if task["round"] in rounds_on_disk else None,
            width=task["width"],
            height=task["height"],
            boxes=_boxes(task),
            reasons=[_reason(task, dispute) for dispute in task["disputes"]],
            digest=digest_of(task),
            annotator=task.get("annotator"),
        )
        for place, task in enumerate(review["tasks"][start : start + PAGE], start=start + 1)
    ]


def _boxes(task: Mapping[str, Any]) -> list[ShownBox]:
    doubted = {dispute["annotated"] for dispute in task["disputes"]}
    people = [
        shown_box(box["box_xyxy"], "people doubted" if row in doubted else "people", f"annotated: {box['label']}")
        for row, box in enumerate(task["annotated"])
    ]
    texts = [f"{d['label']} {d['confidence']:.2f}" for d in task["disputes"]]
    places = place_labels([d["box_xyxy"] for d in task["disputes"]], texts, task["width"], task["height"])
    model = [
        replace(shown_box(dispute["box_xyxy"], "model", text), label_at=place)
        for dispute, text, place in zip(task["disputes"], texts, places, strict=True)
    ]
    return people + model


def _reason(task: Mapping[str, Any], dispute: Mapping[str, Any]) -> str:
    seen = f"{dispute['label']} ({dispute['confidence']:.2f})"
    if dispute["kind"] == "overlooked":
        return f"Overlooked? The model sees {seen} where no box is."
    said = task["annotated"][dispute["annotated"]]["label"]
    if dispute["kind"] == "swapped":
        return f"Another label? A box says {said} where the model sees {seen}."
    return f"Out of place? The model sees {seen} beside the box that says so."


@dataclass(frozen=True)
class Between:
    """How far people agree on something, ``what``: counts of boxes, see ``datasets.consensus.disagreement_of``."""

    what: str
    same: int
    other_label: int
    alone: int
    tasks: int = 0

    @property
    def share(self) -> float | None:
        """Share in [0, 1] of the boxes that both drew under one label; None without any."""
        boxes = self.same + self.other_label + self.alone
        return self.same / boxes if boxes else None


def people_shown(found: Mapping[str, Any], evaluation: Collection[int]) -> dict[str, Any] | None:
    """Where people differ who annotated the same tasks; None where no task has annotations of several.

    Args:
        found: what the snapshot noted.
        evaluation: tasks that measure the detector.
    """
    if not found:
        return None
    measuring = [share for task_id, share in found["by_task"] if task_id in evaluation]
    pairs = [
        Between(
            " and ".join(f"person {who}" for who in pair["people"]), **{k: v for k, v in pair.items() if k != "people"}
        )
        for pair in found["pairs"]
    ]
    return {
        "tasks": found["tasks"],
        "worst": [row for row in found["worst"] if row["agreement"] < 1][:PAGE],
        "classes": sorted((Between(label, **counts) for label, counts in found["classes"].items()), key=_least_first),
        "pairs": sorted(pairs, key=_least_first),
        "measuring": len(measuring),
        "measured": sum(measuring) / len(measuring) if measuring else None,
    }


def _least_first(row: Between) -> tuple[float, str]:
    return (1.0 if row.share is None else row.share), row.what


def quality_page(project: Project, page: int, words: Mapping[str, str]) -> dict[str, Any]:
    """What the newest snapshot of the annotations tells."""
    if project.snapshot is None:
        return {"number": None, "rows": [], "review": None}
    number, facts = project.snapshot
    files = project.files(number)
    versions = [v.version for v in project.versions]
    rows = agreement_rows(facts.get("agreement") or {}, versions)
    learned = {name: count for name, count in facts.get("conversion", {}).items() if count}
    shown: dict[str, Any] = {"number": number, "rows": rows, "total": total_of(rows), "learned": learned}
    sides = project.runtime.store.sides.of_project(project.id) if facts.get("people") else {}
    evaluation = {task_id for task_id, side in sides.items() if side == "evaluation"}
    shown["people"] = people_shown(facts.get("people") or {}, evaluation)
    shown["approved"] = facts.get("approved_images", 0)
    review = files.review()
    if review is None:
        return {**shown, "review": None}
    chosen, dismissed = Doubts.of(words), project.runtime.store.dismissals.of_project(project.id)
    fitting = {**review, "tasks": [task for task in review["tasks"] if chosen.fits(task, dismissed)]}
    pages = pages_of(fitting)
    page = min(max(1, page), pages)
    on_disk = [n for n in {task["round"] for task in review["tasks"]} if project.files(n).has_images()]
    return {
        **shown, "review": review, "items": doubtful_on(fitting, page, on_disk), "page": page, "pages": pages,
        "chosen": chosen, "fitting": len(fitting["tasks"]), "least_ap": review.get("least_ap"),
        "dismissed": sum(dismissed.get(task["task_id"]) == digest_of(task) for task in review["tasks"]),
        "labels": sorted(set[str]().union(*map(_labels_of, review["tasks"]))),
        "annotators": sorted({who for task in review["tasks"] if (who := task.get("annotator")) is not None}),
        "left_out": review.get("left_out", ()),
    }  # fmt: skip
