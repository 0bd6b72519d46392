"""Images that hold objects like those of an image, or like one of its boxes: exact, from what a round has left on disk.

Images compare by CCMS (Eq. 6 and 7) on the objects that people see, those of at least the score threshold. A box
compares with every object by the cosine of their embeddings, whatever their classes: a wrong class is a reason to look.
Embeddings are read a shard at a time and of these objects alone, so memory does not grow with the pool. Nothing here
loads torch: the service uses it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppal_backend.errors import StateError
from ppal_backend.rounds.detections_store import ShardObjects, objects_by_shard

MOST_ASKED = 20
"""Images that can be asked for at once."""


@dataclass(frozen=True)
class Similar:
    """An image like those asked for.

    Args:
        image_id: Its id.
        similarity: CCMS, or 1 + cosine of the most similar object: 0 to 2.
        box_index: Row of its most similar object in its ``Detections``.
    """

    image_id: int
    similarity: float
    box_index: int


@dataclass(frozen=True)
class Objects:
    """What is looked for: ``[q, d]`` unit vectors with their classes, scores, and the image that each is of."""

    vectors: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    owners: np.ndarray
    by_class: bool


def objects_of(folder: Path, image_ids: Collection[int], least_score: float, box: int | None = None) -> Objects:
    """The objects of some images, or one box of one image, to look for others like it.

    Args:
        folder: Where the round left its detections.
        image_ids: One to :data:`MOST_ASKED` images; of an image without a sure object its surest one counts.
        least_score: Objects of a lower score do not count.
        box: Row of the box in its image's ``Detections``; None for all.

    Raises:
        StateError: There are too many images, none of them was looked at or holds an object, or the detector describes
            no objects.
    """
    if not 0 < len(set(image_ids)) <= MOST_ASKED or (box is not None and len(set(image_ids)) > 1):
        raise StateError(f"expected 1 to {MOST_ASKED} images, or a box of one, got {len(set(image_ids))}; choose fewer")
    parts = []
    for shard in objects_by_shard(folder, 0.0, image_ids):
        surest = np.zeros(len(shard.image_ids))
        np.maximum.at(surest, shard.owners, shard.scores)
        kept = shard.scores >= np.minimum(least_score, surest)[shard.owners] if box is None else shard.rows == box
        parts.append(
            (shard.embeddings[kept], shard.classes[kept], shard.scores[kept], shard.image_ids[shard.owners[kept]])
        )
    if not parts or not sum(len(part[0]) for part in parts):
        what = "this box" if box is not None else "objects there"
        raise StateError(f"expected {what} among what the last round detected, got none; run a round, or choose others")
    vectors, classes, scores, owners = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not vectors.shape[1]:
        raise StateError("expected embeddings of objects, got none: this detector cannot compare them; choose another")
    return Objects(_unit(vectors), classes, scores, owners, by_class=box is None)


def most_similar(
    folder: Path, looked_for: Objects, least_score: float, count: int, among: Collection[int] | None = None
) -> list[Similar]:
    """The images that hold the most similar objects, the most similar first, ties by lowest id.

    Args:
        folder: Where a round of the same detector left detections.
        looked_for: What to look for; of several images the one that is most like an image counts.
        least_score: Objects of a lower score do not count.
        count: Images at most.
        among: Images to look at; None for all. Those that are looked for are left out.
    """
    found: list[Similar] = []
    own = set(looked_for.owners.tolist())
    for shard in objects_by_shard(folder, least_score, among):
        if not len(shard.rows) or shard.embeddings.shape[1] != looked_for.vectors.shape[1]:
            continue
        found += [one for one in _of_shard(shard, looked_for, count + len(own)) if one.image_id not in own]
        found = _best(found, count)
    return found


def _best(found: Iterable[Similar], count: int) -> list[Similar]:
    return sorted(found, key=lambda one: (-one.similarity, one.image_id))[:count]


def _of_shard(shard: ShardObjects, looked_for: Objects, count: int) -> list[Similar]:
    """The best of one shard."""
    alike = shard.embeddings @ looked_for.vectors.T
    norms = np.sqrt(np.einsum("ij,ij->i", shard.embeddings, shard.embeddings))
    alike /= np.maximum(norms, np.finfo(np.float32).tiny)[:, None]
    alike += 1.0
    if looked_for.by_class:
        alike *= shard.classes[:, None] == looked_for.classes[None, :]
    starts = np.flatnonzero(np.diff(shard.owners, prepend=-1))
    places = shard.owners[starts]
    values = np.zeros(len(places))
    if looked_for.by_class:
        weights = _shares(shard.scores, shard.owners)
        for owner in np.unique(looked_for.owners):
            mine = looked_for.owners == owner
            columns = alike[:, mine]
            theirs = np.add.reduceat(columns.max(axis=1) * weights, starts)
            ours = np.maximum.reduceat(columns, starts, axis=0) @ _shares(looked_for.scores[mine])
            values = np.maximum(values, (theirs + ours) / 2.0)
    else:
        values = np.maximum.reduceat(alike[:, 0], starts)
    best = np.lexsort((shard.image_ids[places], -values))[:count]
    top = alike.max(axis=1)
    ends = np.append(starts[1:], len(top))
    return [
        Similar(
            int(shard.image_ids[places[k]]),
            float(values[k]),
            int(shard.rows[starts[k] + int(top[starts[k] : ends[k]].argmax())]),
        )
        for k in best
    ]


def _shares(scores: np.ndarray, owners: np.ndarray | None = None) -> np.ndarray:
    """Each score's share of the sum of its image."""
    if owners is None:
        return np.asarray(scores / scores.sum(), np.float64)
    sums = np.bincount(owners, weights=scores)
    return np.asarray(scores / sums[owners], np.float64)


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, np.finfo(np.float32).tiny), np.float32)


def nearest_labelled(
    folders: Sequence[tuple[Path, Collection[int] | None]], looked_for: Objects, least_score: float
) -> list[Similar]:
    """The three labelled images that hold the most similar objects.

    Args:
        folders: Where a round left detections of labelled images, with the images of each to look at.
        looked_for: What to look for.
        least_score: Objects of a lower score do not count.
    """
    found = [one for folder, ids in folders for one in most_similar(folder, looked_for, least_score, 3, ids)]
    return _best(found, 3)
