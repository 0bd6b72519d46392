"""The labeling queue as published: every task's place, and why it has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppal_backend.rounds.boxes import Box
from ppal_backend.service.dashboard.round_files import PoolImage, Query

PAGE = 12
ALIKE = 2.0  # CCMS similarity of an image with itself
RANDOM = "random"
PARTS = ("query set", "candidates", "the rest")


@dataclass(frozen=True)
class DrawnBox:
    """A box over an image, in its pixels; ``counts`` where it adds to the image's utility most."""

    x: float
    y: float
    width: float
    height: float
    label: str
    score: float
    counts: bool


@dataclass(frozen=True)
class Item:
    """One place of the queue. ``place`` is 1 for the task to label first; ``utility`` is None where nothing measured
    it."""

    place: int
    task_id: int
    part: str
    utility: float | None
    cluster_size: int | None
    nearest: int | None
    reason: str
    image: PoolImage | None
    boxes: Sequence[DrawnBox]


@dataclass(frozen=True)
class Part:
    """A stretch of the queue: from place to place, both included, and the page it begins on."""

    name: str
    first: int
    last: int
    page: int


def parts_of(query: Query) -> list[Part]:
    """Query set, candidates and the rest, as far as there are any."""
    chosen = len(query.image_ids)
    candidates = len(set(query.candidate_ids) - set(query.image_ids))
    ends = (chosen, chosen + candidates, len(query.queue))
    starts = (0, *ends)
    return [
        Part(name, start + 1, end, start // PAGE + 1)
        for name, start, end in zip(PARTS, starts, ends, strict=False)
        if end > start
    ]


def pages_of(query: Query) -> int:
    """How many pages the queue has, at least one."""
    return max(1, -(-len(query.queue) // PAGE))


def ids_on(query: Query, page: int) -> tuple[int, ...]:
    """Tasks on a page, 1 the first."""
    return query.queue[(page - 1) * PAGE : page * PAGE]


def items_on(
    query: Query,
    page: int,
    labels: Sequence[str],
    pool: Mapping[int, PoolImage],
    boxes: Mapping[int, Sequence[Box]],
    least_score: float,
) -> list[Item]:
    """The places on a page.

    Args:
        query: the round's queue.
        page: 1 the first.
        labels: of the model that ranked, by class index.
        pool: the pool's images by task id.
        boxes: what the model saw on them.
        least_score: boxes below are drawn only where they count towards the utility.
    """
    made, parts = [], parts_of(query)
    for place, task_id in enumerate(ids_on(query, page), start=(page - 1) * PAGE + 1):
        why = query.explanations.get(task_id)
        made.append(
            Item(
                place=place,
                task_id=task_id,
                part=next(p.name for p in parts if place <= p.last),
                utility=None if query.strategy == RANDOM else query.utilities.get(task_id),
                cluster_size=why.get("cluster_size") if why else None,
                nearest=why.get("nearest_chosen") if why else None,
                reason=reason_of(query, task_id, labels),
                image=pool.get(task_id),
                boxes=_drawn(boxes.get(task_id, ()), why, labels, least_score),
            )
        )
    return made


def reason_of(query: Query, task_id: int, labels: Sequence[str]) -> str:
    """Why a task stands where it does, in words."""
    why = query.explanations.get(task_id)
    if query.strategy == RANDOM:
        return "Drawn at random: there was no model yet." if not labels else "Drawn at random."
    if why is None:
        return _unchosen(query, task_id)
    seen = [f"{labels[c['class_index']]} ({_boxes(c['boxes'])}, {c['contribution']:.2f})" for c in why["classes"][:3]]
    parts = [f"Unsure about {_and(seen)}." if seen else "No box that the model is unsure about."]
    parts.append(f"Number {why['utility_rank'] + 1} of {len(query.utilities)} by uncertainty.")
    others = (why.get("cluster_size") or 1) - 1
    if others:
        parts.append(f"Stands for {others} similar candidate{'s' if others > 1 else ''}.")
    if why.get("nearest_chosen") is not None:
        alike = why.get("nearest_similarity")
        share = "" if alike is None else f" ({alike / ALIKE:.0%} alike)"
        which = f"task {why['nearest_chosen']}" if why["nearest_chosen"] >= 0 else "an image that is labelled"
        parts.append(f"Of those before it, {which} is nearest{share}.")
    return " ".join(parts)


def _unchosen(query: Query, task_id: int) -> str:
    if task_id not in query.utilities:
        return "Not ranked: its image could not be read."
    if task_id in query.candidate_ids:
        return "Uncertain enough to be a candidate, but like others that were chosen."
    return "Less uncertain than the candidates."


def _drawn(
    boxes: Sequence[Box], why: Mapping[str, Any] | None, labels: Sequence[str], least_score: float
) -> list[DrawnBox]:
    counting = {box["box_index"] for box in why["boxes"]} if why else set()
    drawn = []
    for index, box in enumerate(boxes):
        if index not in counting and box.score < least_score:
            continue
        x1, y1, x2, y2 = box.box_xyxy
        label = labels[box.class_index] if box.class_index < len(labels) else "?"
        drawn.append(DrawnBox(x1, y1, x2 - x1, y2 - y1, label, box.score, index in counting))
    return drawn


def _boxes(count: int) -> str:
    return f"{count} box{'es' if count != 1 else ''}"


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
