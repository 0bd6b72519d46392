"""The ports of a simulated round: an oracle that knows every box, and a recorder in place of a labeling queue."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppal_backend.errors import StateError
from ppal_backend.files import read_json, write_json
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import PoolEntry, PreparedData, QueueEntry
from ppal_backend.simulation.data import Benchmark
from ppal_backend.simulation.folder import RoundPlace, need_whole_look
from ppal_backend.structures.round import ModelRef, OnProgress, Progress, RoundSpec

PROGRESS = "progress.json"
REPORT_EVERY_S = 0.5


class Oracle:
    """Task source: the labelled images with their true boxes, the others as pool, the test set for evaluation.

    Args:
        benchmark: The data.
        labelled: Ids of the labelled images.
        query: Whether there is anything left to choose; without, the pool is empty and inference costs nothing, but
            detectors that learn from unlabelled images still do.
    """

    def __init__(self, benchmark: Benchmark, labelled: Sequence[int], query: bool = True) -> None:
        self._benchmark, self._labelled, self._query = benchmark, list(labelled), query

    def export(self, folder: Path) -> Sequence[int]:
        write_json(folder / "labelled.json", self._labelled)
        chosen = set(self._labelled)
        return [row.id for row in self._benchmark.pool.annotations if row.image_id in chosen]

    def prepare(self, folder: Path, on_progress: OnProgress) -> PreparedData:
        chosen = {int(i) for i in read_json(folder / "labelled.json")}
        dataset = self._benchmark.pool
        others = sorted((i for i in dataset.images if i.id not in chosen), key=lambda i: i.id)
        pool = others if self._query else []
        return PreparedData(
            labelled=dataset.subset(chosen),
            pool=[PoolEntry(image.id, image.file_name, image.width, image.height) for image in pool],
            labels=dataset.labels,
            report={},
            evaluation=self._benchmark.test,
            unlabelled=[] if self._query else [image.file_name for image in others],
        )


class Recorder:
    """Publisher: labels the first images of the queue and notes them as what the next round begins with.

    Args:
        place: The round.
        following: The next round; None when this is the last.
        take: Chooses from the ids of the query set and of the whole queue, both in labeling order.
    """

    def __init__(
        self, place: RoundPlace, following: RoundPlace | None, take: Callable[[list[int], list[int]], list[int]]
    ) -> None:
        self._place, self._following, self._take = place, following, take

    def publish(
        self,
        spec: RoundSpec,
        model: ModelRef | None,
        queue: Sequence[QueueEntry],
        state: dict[str, Any] | None,
        on_state: Callable[[dict[str, Any]], None],
    ) -> str:
        if self._following is not None:
            need_whole_look(RoundFolder(self._place.path))
            query = [int(i) for i in read_json(self._place.path / "query_set.json")["image_ids"]]
            picks = self._take(query, [entry.task_id for entry in queue])
            self._following.write_labelled([*self._place.labelled(), *picks])
        return f"simulated-{spec.number}"


class Discard:
    """Publisher of the shared first model, whose queue nobody labels."""

    def publish(self, *_: Any, **__: Any) -> str:
        return "first-model"


def take_images(budget: int) -> Callable[[list[int], list[int]], list[int]]:
    """Exactly ``budget`` images: the query set, filled up from the queue where it is shorter."""

    def take(query: list[int], queue: list[int]) -> list[int]:
        return queue[:budget]

    return take


def take_query(query: list[int], queue: list[int]) -> list[int]:
    """The whole query set, for budgets that do not count images.

    Raises:
        StateError: Nothing was chosen though there are images.
    """
    if queue and not query:
        raise StateError(
            f"expected a query of at least one image, got none: each of the {len(queue)} left in the pool has more "
            f"predicted boxes than the budget; give the strategy a larger one (budget=…)"
        )
    return query


def take_boxes(wanted: int, boxes: Mapping[int, int]) -> Callable[[list[int], list[int]], list[int]]:
    """Images from the head of the queue whose true boxes together come as near to ``wanted`` as whole images allow."""

    def take(query: list[int], queue: list[int]) -> list[int]:
        picks: list[int] = []
        total = 0
        for image_id in queue:
            if total >= wanted:
                break
            count = boxes[image_id]
            if total + count - wanted > wanted - total:
                break  # further from it with this image than without
            picks.append(image_id)
            total += count
        return picks

    return take


class Reporter:
    """Observer: leaves how far a task has come in a small file, and says when to stop.

    Args:
        path: The file.
        where: What to say about the place, such as the round.
        stop: Polled by the round.
    """

    def __init__(self, path: Path, where: Mapping[str, Any], stop: threading.Event | None = None) -> None:
        self._path, self._where, self._stop = path, dict(where), stop
        self._step, self._last = "", 0.0

    def report_problem(self, topic: str, problem: str) -> None:
        """Nobody to tell."""

    def fence(self) -> None:
        """Nobody else runs this round."""

    def exported(self, annotation_ids: Sequence[int]) -> None:
        """Nothing to remember: the oracle knows everything already."""

    def step_started(self, step: str) -> None:
        self._step = step
        self._write({"step": step, "done": 0, "total": 0})

    def progress(self, progress: Progress) -> None:
        if time.monotonic() - self._last >= REPORT_EVERY_S:
            self._write({"step": self._step, "done": progress.done, "total": progress.total})

    def should_stop(self) -> bool:
        return self._stop is not None and self._stop.is_set()

    def _write(self, progress: dict[str, Any]) -> None:
        """No flush to disk: a lost report harms nobody."""
        self._last = time.monotonic()
        temporary = self._path.with_name(f".{self._path.name}.part")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**self._where, **progress}), encoding="utf-8")
        temporary.replace(self._path)
