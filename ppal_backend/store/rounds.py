"""Rounds: asked for, claimed under a lease, finished. At most one pending and one running per project."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import psutil
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from ppal_backend.errors import StateError
from ppal_backend.store.database import Database
from ppal_backend.store.tables import ProjectRow, RoundRow, now

LEASE_S = 60.0
KINDS = ("train", "rank")
OPEN_STATES = ("pending", "running")


@dataclass(frozen=True)
class Lease:
    """Who holds a round: host, process and its start time, so that a reused process id is told apart."""

    host: str
    pid: int
    started: float

    @classmethod
    def mine(cls) -> Lease:
        """The lease of the calling process."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}:{self.started:.2f}"

    @classmethod
    def parse(cls, text: str) -> Lease:
        host, pid, started = text.rsplit(":", 2)
        return cls(host, int(pid), float(started))

    def is_dead_here(self) -> bool:
        """True when it belongs to a process of this host that has ended; False when nobody can tell."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 0.1
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class RoundRecord:
    """A round as stored. ``kind`` is ``train`` (all steps) or ``rank`` (order the pool, no training)."""

    id: int
    project_id: int
    number: int
    kind: str
    state: str
    reason: str
    attempts: int
    crashes: int
    error: str
    step: str
    progress: dict[str, Any]
    metrics: dict[str, Any]
    cancel_asked: bool
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class RoundStore:
    """The rounds of every project."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def request(self, project_id: int, kind: str, reason: str) -> RoundRecord:
        """Ask for a round. While one is pending, requests join it (a ``train`` request turns a pending
        ``rank`` into ``train``).

        Raises:
            StateError: the project is unknown.
        """
        if kind not in KINDS:
            raise ValueError(f"expected kind to be one of {KINDS}, got {kind!r}")
        try:
            return self._request(project_id, kind, reason)
        except IntegrityError:  # two processes asked at once: join the one that was first
            return self._request(project_id, kind, reason)

    def _request(self, project_id: int, kind: str, reason: str) -> RoundRecord:
        with self._database.transaction() as session:
            row = session.scalar(_of(project_id, "pending"))
            if row is not None:
                if kind == "train" and row.kind == "rank":
                    row.kind, row.reason = kind, reason
                return _record(row)
            project = session.get(ProjectRow, project_id)
            if project is None:
                raise StateError(f"project {project_id} is not connected to this backend")
            row = RoundRow(project_id=project_id, number=project.next_round, kind=kind, reason=reason)
            project.next_round += 1
            session.add(row)
            session.flush()
            return _record(row)

    def claim(self, project_id: int, lease: Lease, lease_s: float = LEASE_S) -> RoundRecord | None:
        """Take the project's next round: an interrupted one first, else the pending one that is due.

        Returns None when there is nothing to do or another live process holds the running round.
        """
        with self._database.transaction() as session:
            row = session.scalar(_of(project_id, "running"))
            if row is not None and not _is_free(row):
                return None
            if row is None:
                row = session.scalar(_of(project_id, "pending").where(RoundRow.not_before <= now()))
            if row is None:
                return None
            row.state, row.attempts = "running", row.attempts + 1
            row.started_at = row.started_at or now()
            row.lease_owner, row.lease_until = str(lease), now() + timedelta(seconds=lease_s)
            session.flush()
            return _record(row)

    def renew(self, round_id: int, lease: Lease, lease_s: float = LEASE_S) -> bool:
        """Prolong the lease. False when it is no longer ours, or somebody asked to cancel."""
        with self._database.transaction() as session:
            row = session.get(RoundRow, round_id)
            if row is None or row.lease_owner != str(lease) or row.state != "running" or row.cancel_asked:
                return False
            row.lease_until = now() + timedelta(seconds=lease_s)
            return True

    def report(self, round_id: int, step: str, progress: dict[str, Any]) -> None:
        """Keep where the round is, for people to see."""
        self._update(round_id, step=step, progress=progress)

    def finish(self, round_id: int, metrics: dict[str, Any]) -> None:
        """The round is complete."""
        self._update(round_id, state="done", metrics=metrics, finished_at=now(), **_NO_LEASE)

    def fail(self, round_id: int, error: str) -> None:
        """The round cannot be completed; ``error`` tells people why."""
        self._update(round_id, state="failed", error=error, finished_at=now(), **_NO_LEASE)

    def cancel(self, round_id: int, reason: str) -> None:
        """Somebody stopped the round for good."""
        self._update(round_id, state="cancelled", error=reason, finished_at=now(), **_NO_LEASE)

    def release(self, round_id: int, retry_after_s: float = 0.0, error: str = "") -> None:
        """Let go of a running round so that it is resumed later, by anybody."""
        later = now() + timedelta(seconds=retry_after_s)
        self._update(round_id, error=error, lease_owner="", lease_until=later)

    def crashed(self, round_id: int, error: str, limit: int, retry_after_s: float) -> bool:
        """The process running the round died. True when the round will be tried again, False when it has
        died ``limit`` times and is given up as failed."""
        with self._database.transaction() as session:
            row = session.get(RoundRow, round_id)
            if row is None or row.state != "running":
                return False
            row.crashes, row.error, row.lease_owner = row.crashes + 1, error, ""
            row.lease_until = now() + timedelta(seconds=retry_after_s)
            if row.crashes < limit:
                return True
            row.state, row.finished_at, row.lease_until = "failed", now(), None
            return False

    def running(self, project_id: int) -> RoundRecord | None:
        """The running round of a project."""
        with self._database.reading() as session:
            row = session.scalar(_of(project_id, "running"))
            return None if row is None else _record(row)

    def ask_cancel(self, round_id: int) -> None:
        """Ask the process that runs a round to stop it; a pending round is cancelled at once."""
        with self._database.transaction() as session:
            row = session.get(RoundRow, round_id)
            if row is None or row.state not in OPEN_STATES:
                raise StateError(f"round {round_id} is not pending or running")
            row.cancel_asked = True
            if row.state == "pending":
                row.state, row.finished_at, row.error = "cancelled", now(), "cancelled before it started"

    def claimable_projects(self) -> list[int]:
        """Projects with a round that could be claimed now."""
        with self._database.reading() as session:
            rows = session.scalars(select(RoundRow).where(RoundRow.state.in_(OPEN_STATES)))
            running: dict[int, bool] = {}
            due: set[int] = set()
            for row in rows:
                if row.state == "running":
                    running[row.project_id] = _is_free(row)
                elif row.not_before <= now():
                    due.add(row.project_id)
        return sorted(p for p in due | set(running) if running.get(p, True))

    def get(self, round_id: int) -> RoundRecord:
        """A round by its id.

        Raises:
            StateError: there is none.
        """
        with self._database.reading() as session:
            row = session.get(RoundRow, round_id)
            if row is None:
                raise StateError(f"there is no round {round_id}")
            return _record(row)

    def of_project(self, project_id: int) -> list[RoundRecord]:
        """A project's rounds, oldest first."""
        query = select(RoundRow).where(RoundRow.project_id == project_id).order_by(RoundRow.number)
        with self._database.reading() as session:
            return [_record(row) for row in session.scalars(query)]

    def is_open(self, project_id: int) -> bool:
        """Whether a round is pending or running."""
        query = select(func.count()).where(RoundRow.project_id == project_id, RoundRow.state.in_(OPEN_STATES))
        with self._database.reading() as session:
            return bool(session.scalar(query))

    def counts(self) -> dict[str, int]:
        """Rounds by state."""
        query = select(RoundRow.state, func.count()).group_by(RoundRow.state)
        with self._database.reading() as session:
            return dict(session.execute(query).tuples().all())

    def _update(self, round_id: int, **values: Any) -> None:
        with self._database.transaction() as session:
            row: RoundRow | None = session.get(RoundRow, round_id)
            if row is None:
                raise StateError(f"there is no round {round_id}")
            for name, value in values.items():
                setattr(row, name, value)


_NO_LEASE: dict[str, Any] = {"lease_owner": "", "lease_until": None}


def _of(project_id: int, state: str) -> Any:
    return select(RoundRow).where(RoundRow.project_id == project_id, RoundRow.state == state)


def _is_free(row: RoundRow) -> bool:
    """Whether the lease on a running round has ended: run out, let go, or its process died on this host."""
    if row.lease_until is None or row.lease_until <= now():
        return True
    return bool(row.lease_owner) and Lease.parse(row.lease_owner).is_dead_here()


def _record(row: RoundRow) -> RoundRecord:
    names = RoundRecord.__dataclass_fields__
    record = RoundRecord(**{name: getattr(row, name) for name in names})
    return replace(record, progress=dict(record.progress), metrics=dict(record.metrics))
