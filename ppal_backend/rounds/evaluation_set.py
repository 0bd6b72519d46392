"""Which images measure the detector: a random sample of the project that no training ever sees.

What active learning asks for is harder than the project as a whole, so it cannot measure anything. A hash of project
and task id draws a fixed share of all tasks instead, whether labelled or not, and nobody's choice moves a task to the
other side. Until the set is full, drawn tasks are kept from the strategy and come into the query sets in the order of
their hash, so that what is labelled of them is a random sample at any time.

A task is assigned once, when it is labelled, and for good: to ``evaluation`` or to ``training``. The assignments lie in
the state database (``Assignments``), so that it can be proven.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ppal_backend.datasets.coco import CocoDataset
from ppal_backend.files import numbered_before, read_json

EVALUATION, TRAINING = "evaluation", "training"
SPLIT = "dataset/split.json"
FEWEST_TO_TRAIN = 2
BOXES_OF_A_CLASS = 5
"""Annotated boxes from which a class counts as measured."""
MOST = 3
"""A set that lacks boxes of a rare class grows to so many times its usual size at most."""
CATCHING_UP = 2
"""A query set holds at most so many times the usual share of tasks for the evaluation set."""


class Assignments(Protocol):
    """What tasks were assigned to, for good: the first word about a task counts."""

    def all(self) -> Mapping[int, str]:
        """``evaluation`` or ``training`` by task id."""

    def add(self, assigned: Mapping[int, str]) -> None:
        """Keep assignments of tasks that have none yet; others stay as they are."""

    def trained_before(self, labelled: Collection[int]) -> Collection[int]:
        """Those of the labelled tasks that a training may have seen before assignments were kept."""


class NewAssignments:
    """Assignments of a project that begins: in memory, for rounds without a database."""

    def __init__(self) -> None:
        self._kept: dict[int, str] = {}

    def all(self) -> Mapping[int, str]:
        """``evaluation`` or ``training`` by task id."""
        return dict(self._kept)

    def add(self, assigned: Mapping[int, str]) -> None:
        """Keep assignments of tasks that have none yet."""
        self._kept = {**assigned, **self._kept}

    def trained_before(self, labelled: Collection[int]) -> Collection[int]:
        """None: nothing came before."""
        return ()


def position(project_key: str, task_id: int) -> float:
    """Where a task stands among all tasks of its project, evenly spread over [0, 1): the same in every round."""
    digest = hashlib.sha256(f"{project_key}/{task_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def drawn(project_key: str, task_ids: Iterable[int], share: float) -> list[int]:
    """The tasks that the hash draws for evaluation, in the order of their hash."""
    places = {task_id: position(project_key, task_id) for task_id in task_ids}
    return sorted((i for i, place in places.items() if place < share), key=places.__getitem__)


class _Members:
    """The evaluation set as it grows: how many boxes of each class it holds, against what is labelled in all."""

    def __init__(self, labelled: CocoDataset, ids: Iterable[int], images: int) -> None:
        self._of_image: dict[int, Counter[int]] = defaultdict(Counter)
        for row in labelled.annotations:
            if not row.iscrowd:
                self._of_image[row.image_id][row.category_id] += 1
        self._occurring = {category for counts in self._of_image.values() for category in counts}
        self._boxes: Counter[int] = Counter()
        self._images = images
        self.ids: set[int] = set()
        for image_id in ids:
            self.add(image_id)

    def add(self, image_id: int) -> None:
        self.ids.add(image_id)
        self._boxes.update(self._of_image.get(image_id, {}))

    @property
    def is_full(self) -> bool:
        """Whether it holds its images and, as far as ``MOST`` allows, boxes enough of each class that occurs."""
        if len(self.ids) < self._images:
            return False
        lacking = any(self._boxes[category] < BOXES_OF_A_CLASS for category in self._occurring)
        return not lacking or len(self.ids) >= MOST * self._images


def assign(
    project_key: str, labelled: CocoDataset, assigned: Mapping[int, str], share: float, images: int
) -> dict[int, str]:
    """Assign the labelled tasks that have no side yet.

    Drawn tasks join the evaluation set in the order of their hash until it is full, and as long as half of the
    labelled images, at least two, are left to train on.

    Args:
        project_key: Tells the project from any other.
        labelled: All labelled images.
        assigned: Earlier assignments.
        share: Share of all tasks that is drawn, in [0, 0.5]; 0 keeps no image for evaluation.
        images: From how many images on the set is full.

    Returns:
        The new assignments by task id; together with the earlier ones every labelled task has one.
    """
    ids = set(labelled.image_ids)
    members = _Members(labelled, (i for i in ids if assigned.get(i) == EVALUATION), images)
    most = min(len(ids) // 2, len(ids) - FEWEST_TO_TRAIN)
    new = ids - assigned.keys()
    for task_id in drawn(project_key, new, share):
        if len(members.ids) >= most or members.is_full:
            break
        members.add(task_id)
    return {i: EVALUATION if i in members.ids else TRAINING for i in sorted(new)}


def wanted(members: int, labelled: int, full: bool, budget: int, share: float) -> int:
    """How many tasks of the next query set are for the evaluation set.

    Args:
        members: Images it holds.
        labelled: Labelled images in all.
        full: Whether it is full.
        budget: Images of a query set.
        share: Share of the labelled images that it is to hold.
    """
    if full or share <= 0:
        return 0
    missing = int(share * (labelled + budget)) - members
    return min(max(0, missing), max(1, int(CATCHING_UP * share * budget)))


def spread(chosen: Sequence[int], extra: Sequence[int]) -> tuple[int, ...]:
    """Put ``extra`` among ``chosen`` at even distances, each at the end of its stretch, both in their own order."""
    total = len(chosen) + len(extra)
    places = {math.ceil((k + 1) * total / len(extra)) - 1: task_id for k, task_id in enumerate(extra)}
    others = iter(chosen)
    return tuple(places[i] if i in places else next(others) for i in range(total))


def earlier_sides(folder: Path, labelled: Collection[int], old: Collection[int]) -> dict[int, str]:
    """Sides of tasks that rounds before there were assignments have used.

    Those that a round held out and none trained on stay in the evaluation set. They are labelled images that were held
    out by a hash, so not quite a random sample of the project; what joins them is.

    Args:
        folder: The round's folder; those of earlier rounds lie beside it.
        labelled: The labelled tasks.
        old: Those of them that an earlier round may have trained on; its folder may be gone.
    """
    held_out: set[int] = set()
    trained: set[int] = set()
    for earlier in numbered_before(folder):
        for name, ids in (("held_out.json", held_out), ("train.json", trained)):
            path = earlier / "dataset" / name
            if path.is_file() and (earlier / "steps" / "train.json").is_file():
                ids.update(int(image["id"]) for image in read_json(path)["images"])
    kept = (held_out - trained) & set(labelled)
    return {i: EVALUATION if i in kept else TRAINING for i in sorted((trained | kept | set(old)) & set(labelled))}


def split_facts(
    project_key: str, labelled: CocoDataset, sides: Mapping[int, str], pool: Sequence[int], share: float, images: int
) -> dict[str, Any]:
    """What a round notes of its evaluation set, for JSON.

    Returns:
        ``evaluation`` and ``training``, the labelled tasks of each side; ``reserve``, drawn tasks of the pool in the
        order in which they are to be labelled (none once the set is ``full``); ``images``, its size when full.
    """
    of = {side: sorted(i for i in labelled.image_ids if sides[i] == side) for side in (EVALUATION, TRAINING)}
    full = share <= 0 or _Members(labelled, of[EVALUATION], images).is_full
    return {**of, "reserve": [] if full else drawn(project_key, pool, share), "full": full, "images": images}
