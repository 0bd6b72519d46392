"""The map of the pool: what each point is, as the page's script and its list need it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppal_backend.service.dashboard.queue import RANDOM, reason_of
from ppal_backend.service.dashboard.round_files import Query

LISTED = 100
LABELLED, SINCE, PICK, CANDIDATE, REST = "l", "s", "p", "c", "r"
_DECIMALS = 3


@dataclass(frozen=True)
class Layer:
    """One kind of points: its letter, its name, how many there are."""

    kind: str
    name: str
    count: int


@dataclass(frozen=True)
class Listed:
    """A chosen task in the list beside the map."""

    place: int
    task_id: int
    reason: str
    is_labelled: bool


@dataclass(frozen=True)
class Summary:
    """What the page tells of the map. ``explained`` is the share of variance in [0, 1] that the map holds; of the
    ``labelled_images`` there are, ``drawn_labelled`` are on it."""

    explained: tuple[float, float]
    layers: Sequence[Layer]
    labelled_images: int
    drawn_labelled: int
    listed: Sequence[Listed]


def kinds_of(query: Query, drawn: Mapping[str, Any], since: Collection[int]) -> str:
    """A letter for every point, first those of the pool, then those that were labelled before the round.

    Args:
        query: the round's queue.
        drawn: the round's map.
        since: tasks labelled since the round.
    """
    chosen, candidates, done = set(query.image_ids), set(query.candidate_ids), set(since)
    letters = [
        SINCE if i in done else PICK if i in chosen else CANDIDATE if i in candidates else REST for i in drawn["ids"]
    ]
    return "".join(letters) + LABELLED * len(drawn["labelled"])


def summary_of(query: Query, drawn: Mapping[str, Any], since: Collection[int], labels: Sequence[str]) -> Summary:
    """What stands beside the map; ``labels`` are those of the model that ranked."""
    kinds, done = kinds_of(query, drawn, since), set(since)
    names = {
        PICK: "query set",
        CANDIDATE: "candidates",
        REST: "the rest",
        LABELLED: "labelled before",
        SINCE: "labelled since",
    }
    first, second = drawn["explained"]
    return Summary(
        explained=(first, second),
        layers=[Layer(kind, name, kinds.count(kind)) for kind, name in names.items()],
        labelled_images=drawn["labelled_images"],
        drawn_labelled=len(drawn["labelled"]),
        listed=[
            Listed(place, task_id, reason_of(query, task_id, labels), task_id in done)
            for place, task_id in enumerate(query.image_ids[:LISTED], start=1)
        ],
    )


def points_of(query: Query, drawn: Mapping[str, Any], since: Collection[int], labels: Sequence[str]) -> dict[str, Any]:
    """The points for the script: equally long lists, and texts.

    ``place`` is 1 for the task to label first and 0 for one that was labelled before; ``utility`` is None where
    nothing measured it. ``reasons`` are those of single tasks, ``said`` is what goes for all others of a kind.
    """
    labelled, kinds = drawn["labelled"], kinds_of(query, drawn, since)
    place = {task_id: number for number, task_id in enumerate(query.queue, start=1)}
    utilities = {} if query.strategy == RANDOM else query.utilities
    said = {LABELLED: "Labelled before this round.", SINCE: "Labelled since this round."}
    for task_id, kind in zip(drawn["ids"], kinds, strict=False):
        if kind in (CANDIDATE, REST) and kind not in said:
            said[kind] = reason_of(query, task_id, labels)
    return {
        "ids": [*drawn["ids"], *(entry["image_id"] for entry in labelled)],
        "x": [*drawn["x"], *(entry["x"] for entry in labelled)],
        "y": [*drawn["y"], *(entry["y"] for entry in labelled)],
        "kinds": kinds,
        "place": [place.get(i, 0) for i in drawn["ids"]] + [0] * len(labelled),
        "utility": [_rounded(utilities.get(i)) for i in drawn["ids"]] + [None] * len(labelled),
        "reasons": {str(i): reason_of(query, i, labels) for i in query.image_ids},
        "said": said,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DECIMALS)
