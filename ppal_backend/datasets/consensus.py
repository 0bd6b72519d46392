"""What several people drew on one task: the boxes that most of them mean, and where they differ.

*One person, one vote.* Of each person the annotation changed last counts. Ground truths go before all other votes.

*Who means the same.* Boxes of different people are joined pair by pair, those of one label first, then the greatest
overlap, where every box of one group overlaps every box of the other by at least :data:`SAME_OBJECT` and no person has
a box in both. So a group holds one box a person at most.

*What counts.* A group that at least half of the people are in. Its label is the one most of them gave (a tie goes to
the label of the annotation changed last), its corners are the medians of the boxes with that label. With two people a
box that one of them drew counts too: nothing says who is right, and a box left out teaches that there is nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np

from ppal_backend.structures.detections import pairwise_iou

SAME_OBJECT = 0.5
MOST_TASKS = 50
"""Tasks that the report lists, those with the least agreement."""

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Vote:
    """A box of one person: corners in pixels and its label. ``rank`` is higher for an annotation changed later."""

    person: int
    box_xyxy: Corners
    label: str
    rank: int = 0


def groups_of(votes: Sequence[Vote]) -> list[list[Vote]]:
    """Boxes that mean one object, at most one a person in each group; none are lost, the order is that of the votes."""
    if not votes:
        return []
    overlap = pairwise_iou(*[np.array([vote.box_xyxy for vote in votes], float)] * 2)
    pairs = [
        (votes[i].label != votes[j].label, -float(overlap[i, j]), i, j)
        for i, j in combinations(range(len(votes)), 2)
        if votes[i].person != votes[j].person and overlap[i, j] >= SAME_OBJECT
    ]
    group: list[list[int]] = [[i] for i in range(len(votes))]
    for _, _, i, j in sorted(pairs):
        ours, theirs = group[i], group[j]
        if ours is theirs or {votes[k].person for k in ours} & {votes[k].person for k in theirs}:
            continue
        if overlap[np.ix_(ours, theirs)].min() < SAME_OBJECT:
            continue
        ours.extend(theirs)
        for k in theirs:
            group[k] = ours
    distinct = {id(members): sorted(members) for members in group}
    return [[votes[k] for k in members] for members in sorted(distinct.values())]


def consensus_of(votes: Sequence[Vote], people: int) -> list[tuple[str, Corners]]:
    """Label and corners of every box that at least half of ``people`` drew."""
    found = []
    for members in groups_of(votes):
        if 2 * len(members) >= people:
            counts, latest = Counter(vote.label for vote in members), {v.label: v.rank for v in _by_rank(members)}
            label = max(counts, key=lambda name: (counts[name], latest[name]))
            boxes = [vote.box_xyxy for vote in members if vote.label == label]
            x1, y1, x2, y2 = (float(median(side)) for side in zip(*boxes, strict=True))
            found.append((label, (x1, y1, x2, y2)))
    return found


def _by_rank(votes: Sequence[Vote]) -> list[Vote]:
    return sorted(votes, key=lambda vote: vote.rank)


def disagreement_of(tasks: Iterable[tuple[int, Sequence[int], Sequence[Vote]]]) -> dict[str, Any]:
    """How far people agree on tasks that several of them annotated.

    Of two people on a task: boxes that both drew under one label are ``same``, under two labels ``other_label``, those
    of one person alone ``alone``. Their agreement is the share of all boxes, of both, that is ``same``; 1 without any.

    Args:
        tasks: Task id, people who annotated it (two or more), and their boxes.

    Returns:
        ``tasks`` (how many), ``worst`` (rows of id, agreement and people, the least agreement first), ``by_task``
        (id and agreement), ``classes`` (by label the counts of boxes), ``pairs`` (rows of two people, their tasks and
        counts). No tasks give ``{}``.
    """
    classes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    pairs: defaultdict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    rows = []
    for task_id, people, votes in tasks:
        shares = []
        for two in combinations(sorted(people), 2):
            counts: Counter[str] = Counter(tasks=1)
            for members in groups_of([vote for vote in votes if vote.person in two]):
                kind = (
                    "alone" if len(members) == 1 else "same" if members[0].label == members[1].label else "other_label"
                )
                counts[kind] += len(members)
                for vote in members:
                    classes[vote.label][kind] += 1
            boxes = counts["same"] + counts["other_label"] + counts["alone"]
            shares.append(counts["same"] / boxes if boxes else 1.0)
            pairs[two].update(counts)
        rows.append({"task": task_id, "agreement": round(sum(shares) / len(shares), 4), "people": sorted(people)})
    if not rows:
        return {}
    kinds = ("same", "other_label", "alone")
    return {
        "tasks": len(rows),
        "worst": sorted(rows, key=lambda row: (row["agreement"], row["task"]))[:MOST_TASKS],
        "by_task": [[row["task"], row["agreement"]] for row in rows],
        "classes": {label: {kind: counts[kind] for kind in kinds} for label, counts in sorted(classes.items())},
        "pairs": [
            {"people": list(two), **{kind: counts[kind] for kind in ("tasks", *kinds)}}
            for two, counts in sorted(pairs.items())
        ],
    }


def annotator_of(annotation: Mapping[str, Any]) -> Any:
    """Label Studio's id of who made an annotation, which exports write in two ways; None where it is not told."""
    who = annotation.get("completed_by")
    return who.get("id") if isinstance(who, Mapping) else who


def latest_by_person(annotations: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Each person's last annotation, of annotations in the order of their change; those of nobody count as one's."""
    found: dict[int, Mapping[str, Any]] = {}
    for annotation in annotations:
        who = annotator_of(annotation)
        found[who if isinstance(who, int) else 0] = annotation
    return found
