"""Rounds: asked for, claimed under a lease, finished. At most one pending and one running per project."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import takewhile
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session, load_only

from ppal_backend.errors import StateError
from ppal_backend.store.database import Database, IntegrityError, repeat_on_conflict
from ppal_backend.store.ledger import postpone
from ppal_backend.store.tables import ProjectRow, RoundRow, now
from ppal_backend.store.workers import Lease

log = logging.getLogger(__name__)

LEASE_S = 60.0
CRASH_LIMIT = 4
FARTHEST_S = 900.0  # nothing is put off for longer: a time beyond it was written before the clock was set back
KINDS = ("train", "rank")
OPEN_STATES = ("pending", "running")
BEFORE_EXPORT_ENDS = ("", "export")


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
    edits: int = 0
    next_try_at: datetime | None = None

    @property
    def identity(self) -> str:
        """What tells it from others of its number: those of a database that is gone, or was restored since."""
        return f"{self.id}.{self.created_at.isoformat()}"

    @property
    def is_waiting(self) -> bool:
        """Whether it has begun and waits for what hinders it (``error``) to go away, until ``next_try_at`` (UTC)."""
        return self.next_try_at is not None and bool(self.error)


class RoundStore:
    """The rounds of every project."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @repeat_on_conflict
    def request(self, project_id: int, kind: str, reason: str, as_is: bool = False) -> RoundRecord:
        """Ask for a round. While one is pending, requests join it (a ``train`` request turns a pending
        ``rank`` into ``train``).

        Args:
            project_id: the project.
            kind: ``train`` or ``rank``.
            reason: for people.
            as_is: the zoo's detector as it is orders the pool: the project's first round is round 0 then.

        Raises:
            StateError: the project is unknown.
        """
        if kind not in KINDS:
            raise ValueError(f"expected kind to be one of {KINDS}, got {kind!r}")
        with self._database.transaction() as session:
            project = session.get(ProjectRow, project_id, with_for_update=True)
            if project is None:
                raise StateError(f"project {project_id} is not connected to this backend")
            row = session.scalar(_of(project_id, "pending").with_for_update())
            if row is None:
                first = session.scalar(select(RoundRow.id).where(RoundRow.project_id == project_id).limit(1)) is None
                number = 0 if as_is and first and kind == "rank" else _next_number(project)
                row = RoundRow(project_id=project_id, number=number, kind=kind, reason=reason)
                session.add(row)
            elif kind == "train" and row.kind == "rank":
                row.kind, row.reason = kind, reason
                row.number = row.number or _next_number(project)  # a training is never round 0
            row.edits = project.edits
            session.flush()
            return _record(row)

    def claim(
        self, project_id: int, lease: Lease, lease_s: float = LEASE_S, crash_limit: int = CRASH_LIMIT
    ) -> RoundRecord | None:
        """Take the project's next round: an interrupted one first, else the pending one that is due.

        Taking a round from a process that died without a word counts as a crash of the round; one that has crashed
        ``crash_limit`` times in the same step is given up as failed.

        Returns None when there is nothing to do, the project is paused, or another live process holds the round.
        """
        try:
            return self._claim(project_id, lease, lease_s, crash_limit)
        except IntegrityError:  # another worker was first
            return None

    def _claim(self, project_id: int, lease: Lease, lease_s: float, crash_limit: int) -> RoundRecord | None:
        with self._database.transaction() as session:
            project = session.get(ProjectRow, project_id, with_for_update=True)
            if project is None or project.paused:
                return None
            row = session.scalar(_of(project_id, "running").with_for_update())
            time = self._database.now(session)
            if row is not None and not _is_free(row, time):
                return None
            if (
                row is not None
                and row.lease_owner
                and _gave_up(session, row, f"its process {row.lease_owner} died", crash_limit)
            ):
                return None
            if row is None:
                row = session.scalar(_of(project_id, "pending").with_for_update())
            if row is None:
                return None
            if row.started_at is None:  # it takes the settings as they are now
                row.edits = project.edits
            row.state, row.attempts = "running", row.attempts + 1
            row.started_at = row.started_at or now()
            row.lease_owner, row.lease_until = str(lease), time + timedelta(seconds=lease_s)
            session.flush()
            return _record(row)

    def renew(self, round_id: int, lease: Lease, lease_s: float = LEASE_S) -> bool:
        """Prolong the lease. False when the round is to be left: the lease is no longer ours, or somebody asked to
        cancel the round or to pause its project."""
        with self._database.transaction() as session:
            row = session.get(RoundRow, round_id)
            if row is None or not _holds(row, lease) or row.cancel_asked:
                return False
            project = session.get(ProjectRow, row.project_id)
            if project is None or project.paused:
                return False
            row.lease_until = self._database.now(session) + timedelta(seconds=lease_s)
            return True

    def prolong(self, round_id: int, lease: Lease, lease_s: float = LEASE_S) -> bool:
        """Prolong the lease whatever anybody asked for; False when it is no longer ours. Before an effect that cannot
        be a part of a transaction: for ``lease_s`` from now on nobody on another host takes the round."""
        with self._database.transaction() as session:
            row = session.get(RoundRow, round_id, with_for_update=True)
            if row is None or not _holds(row, lease):
                return False
            row.lease_until = self._database.now(session) + timedelta(seconds=lease_s)
            return True

    def holds(self, round_id: int, lease: Lease) -> bool:
        """Whether a running round is (still) held under this lease."""
        with self._database.reading() as session:
            row = session.get(RoundRow, round_id)
            return row is not None and _holds(row, lease)

    def is_taken(self, round_id: int, lease: Lease) -> bool:
        """Whether a running round is held under another lease by now, or is forgotten with its project."""
        with self._database.reading() as session:
            row = session.get(RoundRow, round_id)
            return row is None or (row.state == "running" and row.lease_owner not in ("", str(lease)))

    def report(self, round_id: int, step: str, progress: dict[str, Any], lease: Lease | None = None) -> bool:
        """Keep where the round is, for people to see. A new step forgets the crashes of the one before.

        This and the following ones do nothing and say False when a ``lease`` is given that the round is no longer
        held under: whoever lost a round changes nothing of it any more.
        """
        with self._database.transaction() as session:
            row = session.get(RoundRow, round_id)
            if row is None or (lease is not None and not _holds(row, lease)):
                return False
            if row.step != step:
                row.crashes = 0
            row.step, row.progress = step, progress
            return True

    def finish(self, round_id: int, metrics: dict[str, Any], lease: Lease | None = None) -> bool:
        """The round is complete."""
        return self._end(round_id, lease, state="done", metrics=metrics, error="")

    def fail(self, round_id: int, error: str, lease: Lease | None = None) -> bool:
        """The round cannot be completed; ``error`` tells people why."""
        return self._end(round_id, lease, state="failed", error=error)

    def cancel(self, round_id: int, reason: str, lease: Lease | None = None) -> bool:
        """Somebody stopped the round for good."""
        return self._end(round_id, lease, state="cancelled", error=reason)

    def release(self, round_id: int, retry_after_s: float = 0.0, error: str = "", lease: Lease | None = None) -> bool:
        """Let go of a running round so that it is resumed later, by anybody."""
        with self._database.transaction() as session:
            row = session.get(RoundRow, round_id)
            if row is None or (lease is not None and not _holds(row, lease)):
                return False
            row.error, row.lease_owner = error, ""
            row.lease_until = self._database.now(session) + timedelta(seconds=retry_after_s)
            return True

    def try_now(self, project_id: int) -> RoundRecord | None:
        """Let the project's waiting round go on without waiting any longer; None when none waits."""
        with self._database.transaction() as session:
            row = session.scalar(_of(project_id, "running").with_for_update())
            if row is None or row.lease_owner or not row.error:
                return None
            row.lease_until = self._database.now(session)
            return _record(row)

    def crashed(self, round_id: int, error: str, limit: int, retry_after_s: float, lease: Lease | None = None) -> bool:
        """The process running the round died. True when the round will be tried again, False when it has
        died ``limit`` times in one step and is given up as failed, or is not running under ``lease``."""
        with self._database.transaction() as session:
            row = session.get(RoundRow, round_id)
            if row is None or row.state != "running" or (lease is not None and not _holds(row, lease)):
                return False
            row.lease_until = self._database.now(session) + timedelta(seconds=retry_after_s)
            return not _gave_up(session, row, error, limit)

    def running(self, project_id: int) -> RoundRecord | None:
        """The running round of a project."""
        with self._database.reading() as session:
            row = session.scalar(_of(project_id, "running"))
            return None if row is None else _record(row)

    def held_projects(self) -> list[int]:
        """Projects of which a live process runs a round; asks only for columns that every release's table has."""
        columns = load_only(RoundRow.project_id, RoundRow.lease_owner, RoundRow.lease_until)
        query = select(RoundRow).where(RoundRow.state == "running").order_by(RoundRow.project_id).options(columns)
        with self._database.reading() as session:
            time = self._database.now(session)
            return [row.project_id for row in session.scalars(query) if row.lease_owner and not _is_free(row, time)]

    def ask_cancel(self, round_id: int) -> None:
        """Ask the process that runs a round to stop it; a round that no process runs is cancelled at once.

        Raises:
            StateError: the round has ended.
        """
        with self._database.transaction() as session:
            row = session.get(RoundRow, round_id)
            if row is None or row.state not in OPEN_STATES:
                raise StateError(f"round {round_id} is not pending or running")
            row.cancel_asked = True
            nobody = row.state == "pending" or not row.lease_owner or _is_free(row, self._database.now(session))
            if nobody:
                when = "before it started" if row.state == "pending" else f"in step {row.step or 'start'!r}"
                row.state, row.error = "cancelled", f"cancelled {when}"
                row.finished_at, row.lease_owner, row.lease_until = now(), "", None

    def claimable_projects(self) -> list[int]:
        """Projects with a round that could be claimed now, the one that was asked for first in front."""
        query = select(RoundRow).join(ProjectRow).where(RoundRow.state.in_(OPEN_STATES), ProjectRow.paused.is_(False))
        with self._database.reading() as session:
            time = self._database.now(session)
            held: set[int] = set()
            asked: dict[int, int] = {}  # id of the first round that could be claimed, by project
            for row in session.scalars(query.order_by(RoundRow.id)):
                if row.state == "running" and not _is_free(row, time):
                    held.add(row.project_id)
                else:
                    asked.setdefault(row.project_id, row.id)
        return sorted(asked.keys() - held, key=asked.__getitem__)

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

    def last(self, project_id: int) -> RoundRecord | None:
        """The project's newest round, whatever became of it."""
        query = select(RoundRow).where(RoundRow.project_id == project_id).order_by(RoundRow.number.desc()).limit(1)
        with self._database.reading() as session:
            row = session.scalar(query)
            return None if row is None else _record(row)

    def failure(self, project_id: int) -> RoundRecord | None:
        """The failed round that none has made good or tried again since; a ranking makes no training good."""
        last = self.last(project_id)
        return last if last is not None and last.state == "failed" else self.failed_training(project_id)

    def failed_training(self, project_id: int) -> RoundRecord | None:
        """The newest training, if it failed."""
        newest = _of_kind(project_id, "train").order_by(RoundRow.number.desc()).limit(1)
        with self._database.reading() as session:
            row = session.scalar(newest)
            return _record(row) if row is not None and row.state == "failed" else None

    def failed_trainings(self, project_id: int) -> int:
        """How many trainings have failed one after the other with the same settings, up to now."""
        ended = _of_kind(project_id, "train").where(RoundRow.state.in_(("done", "failed")))
        with self._database.reading() as session:
            rows = session.execute(
                ended.with_only_columns(RoundRow.state, RoundRow.edits).order_by(RoundRow.number.desc())
            ).all()
        return sum(1 for _ in takewhile(lambda row: tuple(row) == ("failed", rows[0].edits), rows))

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

    def _end(self, round_id: int, lease: Lease | None, **values: Any) -> bool:
        with self._database.transaction() as session:
            row = session.get(RoundRow, round_id)
            if row is None and lease is None:
                raise StateError(f"there is no round {round_id}")
            if row is None or (lease is not None and not _holds(row, lease)):
                return False
            for name, value in {**values, "finished_at": now(), "lease_owner": "", "lease_until": None}.items():
                setattr(row, name, value)
            if row.state == "failed":
                _has_failed(session, row)
            return True


def _of(project_id: int, state: str) -> Any:
    return select(RoundRow).where(RoundRow.project_id == project_id, RoundRow.state == state)


def _of_kind(project_id: int, kind: str) -> Any:
    return select(RoundRow).where(RoundRow.project_id == project_id, RoundRow.kind == kind)


def _next_number(project: ProjectRow) -> int:
    number = project.next_round
    project.next_round += 1
    return number


def _holds(row: RoundRow, lease: Lease) -> bool:
    return row.state == "running" and row.lease_owner == str(lease)


def _is_free(row: RoundRow, time: datetime) -> bool:
    """Whether the lease on a running round has ended. On this host the process table tells, whatever the clock
    says; of another host's process only that it has not prolonged its lease."""
    owner = Lease.parse(row.lease_owner) if row.lease_owner else None
    if owner is not None and owner.is_here:
        return owner.is_dead_here()
    return row.lease_until is None or _is_due(row.lease_until, time)


def _is_due(when: datetime, time: datetime) -> bool:
    return when <= time or when > time + timedelta(seconds=FARTHEST_S)


def _has_failed(session: Session, failed: RoundRow) -> None:
    """What a training that failed was to learn from asks for no other one, though it was not exported. One that was to
    be cancelled is."""
    if failed.cancel_asked:
        failed.state = "cancelled"
    if failed.kind == "train" and failed.step in BEFORE_EXPORT_ENDS:
        postpone(session, failed.project_id, failed.number)


def _gave_up(session: Session, row: RoundRow, error: str, limit: int) -> bool:
    """Count a crash; whether it was one too many."""
    row.crashes, row.error, row.lease_owner = row.crashes + 1, error, ""
    if row.crashes < limit:
        return False
    row.state, row.finished_at, row.lease_until = "failed", now(), None
    row.error = f"{error}; given up after {row.crashes} times in step {row.step or 'start'!r}"
    log.error("round %d of project %d: %s", row.number, row.project_id, row.error)
    _has_failed(session, row)
    return True


def _record(row: RoundRow) -> RoundRecord:
    names = set(RoundRecord.__dataclass_fields__) - {"next_try_at"}
    record = RoundRecord(**{name: getattr(row, name) for name in names})
    next_try_at = row.lease_until if row.state == "running" and not row.lease_owner else None
    return replace(record, progress=dict(record.progress), metrics=dict(record.metrics), next_try_at=next_try_at)
