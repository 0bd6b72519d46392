"""What Label Studio told us, kept before anything is done about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, or_, select, update

from ppal_backend.store.database import Database
from ppal_backend.store.tables import EventRow, now


@dataclass(frozen=True)
class EventRecord:
    """One webhook delivery: its action and the few fields of it that are used."""

    id: int
    project_id: int | None
    action: str
    body: dict[str, Any]


class EventStore:
    """An inbox: events come in as pending and leave as done, or parked with the reason."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, project_id: int | None, action: str, body: dict[str, Any]) -> int:
        """Keep an event; it is on disk when this returns."""
        with self._database.transaction() as session:
            row = EventRow(project_id=project_id, action=action, body=body)
            session.add(row)
            session.flush()
            return row.id

    def pending(self, project_id: int) -> list[EventRecord]:
        """Events of a project that nobody has handled, oldest first."""
        query = (
            select(EventRow).where(EventRow.project_id == project_id, EventRow.state == "pending").order_by(EventRow.id)
        )
        with self._database.reading() as session:
            return [EventRecord(r.id, r.project_id, r.action, dict(r.body)) for r in session.scalars(query)]

    def begin(self, event_id: int) -> int:
        """Note that an event's handling begins; how often it has begun by now. More than once tells that an
        earlier handling ended neither well nor with a reason."""
        with self._database.transaction() as session:
            row = session.get(EventRow, event_id)
            if row is None:
                return 1
            row.attempts += 1
            return row.attempts

    @contextmanager
    def handling(self, event_id: int) -> Iterator[bool]:
        """A transaction in which an event's effects are stored together with its being done, by one worker only.

        Yields:
            Whether the event is ours; False when another worker has handled it. While another one is at it this waits,
            so a project's events take effect in their order. When the block raises, the event is pending as before.
        """
        mine = update(EventRow).where(EventRow.id == event_id, EventRow.state == "pending")
        with self._database.transaction() as session:
            taken = session.execute(mine.values(state="done", reason="").returning(EventRow.id)).first()
            yield taken is not None

    def waiting(self, longer_than_s: float) -> list[int]:
        """Projects with an event that has been pending for a while: the job that told of it was lost."""
        time = now()
        late = or_(EventRow.received_at <= time - timedelta(seconds=longer_than_s), EventRow.received_at > time)
        query = select(EventRow.project_id).where(EventRow.state == "pending", late).distinct()
        with self._database.reading() as session:
            return sorted(p for p in session.scalars(query) if p is not None)

    def settle(self, event_id: int, reason: str = "") -> None:
        """Mark an event done or, with a reason, parked."""
        with self._database.transaction() as session:
            row = session.get(EventRow, event_id)
            if row is not None:
                row.state, row.reason = ("parked" if reason else "done"), reason

    def counts(self) -> dict[str, int]:
        """Events by state."""
        query = select(EventRow.state, func.count()).group_by(EventRow.state)
        with self._database.reading() as session:
            return Counter(dict(session.execute(query).tuples().all()))
