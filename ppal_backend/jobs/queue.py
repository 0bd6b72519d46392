"""The job queue: two huey queues in one SQLite file, one for quick work and one for rounds.

Jobs carry a project id and nothing else. What is to be done stands in the store, so a job that is lost,
doubled or late changes nothing: the worker's tick finds what is due.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huey import SqliteHuey
from huey.consumer import Consumer

POLL_DELAY_S = 0.2
Handler = Callable[[int], None]


class JobQueue:
    """Enqueues jobs and, in the worker, runs them.

    Args:
        path: the queue's SQLite file; made when missing.
        on_sync: handles a project's events and decides on a round (worker only).
        on_round: runs the project's next round (worker only).
    """

    def __init__(self, path: Path, on_sync: Handler | None = None, on_round: Handler | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._light = SqliteHuey("light", filename=str(path), results=False, timeout=30)
        self._rounds = SqliteHuey("rounds", filename=str(path), results=False, timeout=30)
        self.sync: Callable[[int], object] = self._light.task(name="sync")(_named(on_sync, "sync"))
        self._round: Callable[[int], object] = self._rounds.task(name="run_round")(_named(on_round, "run_round"))

    def run_round(self, project_id: int) -> None:
        """Enqueue the project's next round, unless rounds are waiting anyway (the tick comes back)."""
        if self._rounds.pending_count() < 100:
            self._round(project_id)

    def pending(self) -> int:
        """Jobs that wait."""
        return int(self._light.pending_count() + self._rounds.pending_count())

    def consumers(self, parallel_rounds: int = 1) -> list[Consumer]:
        """Consumers to ``start()`` in the worker: quick work never waits behind a round."""
        return [
            self._consumer(self._light, 1),
            self._consumer(self._rounds, parallel_rounds),
        ]

    @staticmethod
    def _consumer(huey: SqliteHuey, workers: int) -> Consumer:
        return huey.create_consumer(
            workers=workers, periodic=False, initial_delay=POLL_DELAY_S, max_delay=POLL_DELAY_S, backoff=1.0
        )


def _named(handler: Handler | None, name: str) -> Handler:
    def run(project_id: int) -> None:
        if handler is None:
            raise RuntimeError(f"job {name!r} was taken by a process that only enqueues; start a worker")
        handler(project_id)

    run.__name__ = name
    return run
