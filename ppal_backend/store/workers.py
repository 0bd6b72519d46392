"""Signs of life of the workers, where every machine sees them."""

from __future__ import annotations

import logging
import time
from datetime import timedelta

from sqlalchemy import delete, select

from ppal_backend.errors import StoreUnavailable
from ppal_backend.store.database import Database
from ppal_backend.store.lease import Lease
from ppal_backend.store.tables import WorkerRow

log = logging.getLogger(__name__)

BEAT_EVERY_S = 5.0
ALIVE_WITHIN_S = 30.0
FORGET_AFTER_S = 86_400.0


class WorkerStore:
    """When each worker was last heard of, by the clock that leases run by."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def beat(self, name: str) -> None:
        """A worker lives. One that is new here makes those forgotten that have been silent for a day."""
        with self._database.transaction() as session:
            now = self._database.now(session)
            row = session.get(WorkerRow, name)
            if row is None:
                silent = now - timedelta(seconds=FORGET_AFTER_S)
                session.execute(delete(WorkerRow).where(WorkerRow.beat_at < silent))
                row = WorkerRow(name=name)
                session.add(row)
            row.beat_at = now

    def leave(self, name: str) -> None:
        """A worker ends as it should."""
        with self._database.transaction() as session:
            session.execute(delete(WorkerRow).where(WorkerRow.name == name))

    def ages_s(self) -> dict[str, float]:
        """Seconds since each worker's last sign of life.

        A time in the future, after a clock was set back, counts as that far off: a living worker sets it right in
        seconds.
        """
        with self._database.reading() as session:
            now = self._database.now(session)
            return {row.name: abs((now - row.beat_at).total_seconds()) for row in session.scalars(select(WorkerRow))}

    def age_s(self) -> float | None:
        """Seconds since any worker's last sign of life; None when there is none."""
        return min(self.ages_s().values(), default=None)


class Heartbeat:
    """One worker's sign of life; how old it is says whether the worker lives."""

    def __init__(self, workers: WorkerStore) -> None:
        self._workers, self._name = workers, str(Lease.mine())
        self._next = 0.0

    def beat(self) -> None:
        """Still here; said every few seconds, however often it is called. A database that is away is logged, the
        worker goes on."""
        if time.monotonic() < self._next:
            return
        try:
            self._workers.beat(self._name)
        except StoreUnavailable as error:
            log.warning("the worker's sign of life could not be stored: %s", error)
        else:
            self._next = time.monotonic() + BEAT_EVERY_S

    def end(self) -> None:
        """Leaving."""
        try:
            self._workers.leave(self._name)
        except StoreUnavailable as error:
            log.warning("the worker leaves without a word: %s", error)
