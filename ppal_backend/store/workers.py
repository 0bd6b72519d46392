"""Signs of life of the workers, where every machine sees them."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import delete, select

from ppal_backend.store.database import Database
from ppal_backend.store.tables import WorkerRow

ALIVE_WITHIN_S = 30.0
FORGET_AFTER_S = 86_400.0


class WorkerStore:
    """When each worker was last heard of, by the clock that leases run by."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def beat(self, name: str) -> None:
        """A worker lives. One that is new here makes those forgotten that have been silent for a day."""
        with self._database.transaction() as session:
            time = self._database.now(session)
            row = session.get(WorkerRow, name)
            if row is None:
                silent = time - timedelta(seconds=FORGET_AFTER_S)
                session.execute(delete(WorkerRow).where(WorkerRow.beat_at < silent))
                row = WorkerRow(name=name)
                session.add(row)
            row.beat_at = time

    def leave(self, name: str) -> None:
        """A worker ends as it should."""
        with self._database.transaction() as session:
            session.execute(delete(WorkerRow).where(WorkerRow.name == name))

    def ages_s(self) -> dict[str, float]:
        """Seconds since each worker's last sign of life.

        A time in the future, after a clock was set back, counts as that far off: a living worker mends it in seconds.
        """
        with self._database.reading() as session:
            time = self._database.now(session)
            return {row.name: abs((time - row.beat_at).total_seconds()) for row in session.scalars(select(WorkerRow))}
