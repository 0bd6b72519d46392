"""Which images a detector looks at first when it has not the time for all, and where the others stay in the queue."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ppal_backend.files import numbered_before
from ppal_backend.rounds.detections_store import StoredDetections
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.pool_map import FEATURE
from ppal_backend.rounds.ports import PoolEntry

log = logging.getLogger(__name__)

TURN = ("uncertain", "new", "uncertain", "near", "new", "uncertain", "near", "random")
"""Where the next image comes from, over and over: one in eight at random, so that nothing is out of sight for good."""
_BLOCK = 4096


@dataclass(frozen=True)
class LastRound:
    """What the newest earlier round left: its queue, utilities by image id, and what was detected."""

    queue: Sequence[int] = ()
    utilities: Mapping[int, float] = field(default_factory=dict)
    detections: StoredDetections | None = None


def last_round(folder: RoundFolder) -> LastRound:
    """The newest round before that of ``folder`` whose query set can be read; nothing where there is none."""
    for earlier in map(RoundFolder, numbered_before(folder.path)):
        if not earlier.is_done("query"):
            continue
        try:
            stored = earlier.read("query_set.json")
            utilities = {int(i): float(u) for i, u in stored["utilities"]}
            seen = StoredDetections(earlier / "detections", embeddings=False)
        except (ValueError, KeyError, OSError) as error:
            log.warning("%s cannot be read (%s); places of its queue are not kept", earlier.path, error)
            continue
        return LastRound([int(i) for i in stored["queue"]], utilities, seen)
    return LastRound()


def order_of_looking(
    entries: Sequence[PoolEntry], labelled: Collection[int], last: LastRound, seed: int
) -> list[PoolEntry]:
    """All entries, those first that are most likely to matter.

    In turns (:data:`TURN`): the most uncertain of the last round, images that it did not know, those most like the
    images that were labelled since, and random ones.

    Args:
        entries: Images to look at.
        labelled: Ids of labelled images.
        last: The round before.
        seed: Of the random ones.
    """
    by_id = {entry.image_id: entry for entry in entries}
    known = set(last.queue)
    ids = list(by_id)
    sources = {
        "uncertain": sorted((i for i in ids if i in last.utilities), key=lambda i: (-last.utilities[i], i)),
        "new": [i for i in ids if i not in known],
        "near": _nearest(ids, labelled, last.detections),
        "random": [ids[k] for k in np.random.default_rng([seed, 41]).permutation(len(ids))],
    }
    return [by_id[i] for i in _round_robin({name: iter(found) for name, found in sources.items()}, len(ids))]


def _round_robin(sources: Mapping[str, Iterator[int]], count: int) -> list[int]:
    taken: dict[int, None] = {}
    while len(taken) < count:
        for name in TURN:
            fresh = next((i for i in sources[name] if i not in taken), None)
            if fresh is not None:
                taken[fresh] = None
    return list(taken)


def _nearest(ids: Sequence[int], labelled: Collection[int], seen: StoredDetections | None) -> list[int]:
    """The images most like any that was in the last round's pool and is labelled now, by cosine of their features."""
    features = None if seen is None else seen.features(FEATURE)
    if seen is None or features is None:
        return []
    row = {image_id: k for k, image_id in enumerate(seen.image_ids)}
    since = [row[i] for i in labelled if i in row]
    there = [i for i in ids if i in row]
    if not since or not there:
        return []
    targets = _unit(features[since])
    likeness = [
        (_unit(features[[row[i] for i in there[k : k + _BLOCK]]]) @ targets.T).max(axis=1)
        for k in range(0, len(there), _BLOCK)
    ]
    return [there[k] for k in np.argsort(-np.concatenate(likeness), kind="stable")]


def _unit(rows: np.ndarray) -> np.ndarray:
    values = np.asarray(rows, np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def keep_places(ranked: Sequence[int], older: Sequence[int], last_queue: Sequence[int], first: int) -> list[int]:
    """Put images that were not looked at where they stood in the queue before.

    Args:
        ranked: Images that were ranked, in order.
        older: Those that were not looked at.
        last_queue: The queue before. Places are counted without what has left the pool since.
        first: So many ranked images stay in front: the query set.

    Returns:
        All of both; at the end what has no place to keep.
    """
    left = {*ranked, *older}
    place = {image_id: k for k, image_id in enumerate(i for i in last_queue if i in left)}
    kept = sorted((max(first, place[i]), place[i], i) for i in older if i in place)
    made: list[int] = []
    waiting = iter(kept)
    following = next(waiting, None)
    for image_id in ranked:
        while following is not None and following[0] <= len(made):
            made.append(following[2])
            following = next(waiting, None)
        made.append(image_id)
    made += [following[2]] if following is not None else []
    made += [image_id for _, _, image_id in waiting]
    return made + [i for i in older if i not in place]
