"""What Label Studio told us, kept before anything is done about it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, insert, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from ppal_backend.errors import StoreUnavailable
from ppal_backend.store.database import Database
from ppal_backend.store.tables import EventRow, now

_INSERT = insert(EventRow).returning(EventRow.id, sort_by_parameter_order=True)


@dataclass(frozen=True)
class EventRecord:
    """One webhook delivery: its action, the few fields of it that are used, and how often its handling was begun."""

    id: int
    project_id: int | None
    action: str
    body: dict[str, Any]
    attempts: int


@dataclass
class _Arrival:
    """An event on its way to the disk, where it gets a number, or an error."""

    row: dict[str, Any]
    number: int | None = None
    error: Exception | None = None


class EventStore:
    """An inbox: events come in as pending and leave as done, or parked with the reason."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._arrived: list[_Arrival] = []
        self._arriving, self._writing = threading.Lock(), threading.Lock()

    def add(self, project_id: int | None, action: str, body: dict[str, Any]) -> int:
        """Keep an event; it is on disk when this returns. Not to be called within a transaction.

        Threads that come while another one writes share the next transaction: under load hundreds of events a second
        are a few dozen transactions, and threads do not fight for the database's one write lock.
        """
        mine = _Arrival({"project_id": project_id, "action": action, "body": body})
        with self._arriving:
            self._arrived.append(mine)
        with self._writing:
            # Unless another thread took it along: whoever has the turn writes all that have come.
            if mine.number is None and mine.error is None:
                with self._arriving:
                    batch, self._arrived = self._arrived, []
                self._write(batch)
        if mine.number is None:
            raise mine.error or StoreUnavailable("the event was not stored: its writing was interrupted; send it again")
        return mine.number

    def _write(self, batch: Sequence[_Arrival]) -> None:
        try:
            with self._database.writing() as connection:
                numbers = connection.scalars(_INSERT, [arrival.row for arrival in batch]).all()
        except StoreUnavailable as error:
            for arrival in batch:
                arrival.error = error
        except (SQLAlchemyError, TypeError, ValueError) as error:
            if len(batch) == 1:
                batch[0].error = error
            else:  # one that cannot be stored must not take the others with it
                for arrival in batch:
                    self._write([arrival])
        else:
            for arrival, number in zip(batch, numbers, strict=True):
                arrival.number = number

    def pending(self, project_id: int) -> list[EventRecord]:
        """Events of a project that nobody has handled, oldest first."""
        query = (
            select(EventRow.id, EventRow.project_id, EventRow.action, EventRow.body, EventRow.attempts)
            .where(EventRow.project_id == project_id, EventRow.state == "pending")
            .order_by(EventRow.id)
        )
        with self._database.reading() as session:
            return [EventRecord(*row) for row in session.execute(query)]

    def begin(self, event_ids: Sequence[int]) -> None:
        """Note that the handling of events begins. An event whose handling has begun before, and which is pending all
        the same, tells that it ended neither well nor with a reason."""
        with self._database.transaction() as session:
            session.execute(update(EventRow).where(EventRow.id.in_(event_ids)).values(attempts=EventRow.attempts + 1))

    @contextmanager
    def handling(self, event_ids: Sequence[int]) -> Iterator[frozenset[int]]:
        """A transaction in which events' effects are stored together with their being done, by one worker only.

        Yields:
            Which of the events are ours; another worker has handled the rest. While another one is at them this waits,
            so a project's events take effect in their order. When the block raises, they are pending as before.
        """
        mine = update(EventRow).where(EventRow.id.in_(event_ids), EventRow.state == "pending")
        with self._database.transaction() as session:
            yield frozenset(session.scalars(mine.values(state="done", reason="").returning(EventRow.id)))

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

    def forget(self, older_than_s: float, at_most: int = 10_000) -> int:
        """Delete events that were settled and came longer ago; how many. Few at a time: webhooks wait meanwhile."""
        old = (
            select(EventRow.id)
            .where(EventRow.state != "pending", EventRow.received_at < now() - timedelta(seconds=older_than_s))
            .order_by(EventRow.id)
            .limit(at_most)
        )
        with self._database.transaction() as session:
            ids = list(session.scalars(old))
            for start in range(0, len(ids), 500):
                session.execute(delete(EventRow).where(EventRow.id.in_(ids[start : start + 500])))
        return len(ids)

    def counts(self) -> dict[str, int]:
        """Events by state."""
        query = select(EventRow.state, func.count()).group_by(EventRow.state)
        with self._database.reading() as session:
            return Counter(dict(session.execute(query).tuples().all()))
