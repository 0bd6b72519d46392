"""Connected projects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import delete, select

from ppal_backend.errors import StateError
from ppal_backend.store.database import Database
from ppal_backend.store.tables import (
    AnnotationRow,
    ApprovalBatchRow,
    ApprovalRow,
    DismissalRow,
    EventRow,
    PinRow,
    ProjectRow,
    QuotaRow,
    RoundRow,
    TaskSideRow,
    VersionRow,
    now,
)
from ppal_backend.structures.round import DetectorChoice

_OF_PROJECTS = (
    AnnotationRow, EventRow, TaskSideRow, PinRow, QuotaRow, ApprovalRow, ApprovalBatchRow, DismissalRow, RoundRow,
    VersionRow,
)  # fmt: skip


@dataclass(frozen=True)
class ProjectRecord:
    """A project as the backend knows it.

    ``options`` are the project's own extra parameters; ``repairs`` is what :mod:`ppal_backend.operations.upkeep` has
    set right in Label Studio, so that it does so once and not against a person who changes it again.
    ``poll_failed`` is ``unavailable``, ``token`` or ``other`` when the last poll failed, else "".
    ``choice`` is the detector that was chosen for a project that names none; None before its first round.
    """

    id: int
    key: str
    label_config: str
    url: str
    options: dict[str, Any]
    polled_until: str
    polled_at: datetime | None
    problems: dict[str, str]
    paused: bool = False
    edits: int = 0
    task_count: int | None = None
    hostname: str = ""
    repairs: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    poll_failed: str = ""
    next_poll_at: datetime | None = None
    poll_asked: bool = False
    choice: DetectorChoice | None = None


class ProjectStore:
    """Projects by their Label Studio id."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connected: set[int] = set()

    def connect(self, project_id: int, key: str, label_config: str, url: str, options: dict[str, Any]) -> bool:
        """Record a project as Label Studio described it; True when it is new here.

        A project that carries a known id but another creation time is another project (Label Studio was
        set up afresh): everything stored about the old one is forgotten.
        """
        with self._database.transaction() as session:
            row = session.get(ProjectRow, project_id)
            if row is not None and row.key != key:
                for table in _OF_PROJECTS:
                    session.execute(delete(table).where(table.project_id == project_id))
                session.delete(row)
                session.flush()
                row = None
            if row is None:
                session.add(ProjectRow(id=project_id, key=key, label_config=label_config, url=url, options=options))
                return True
            if (row.label_config, row.url, row.options) != (label_config, url, options):
                row.edits += 1
            row.label_config, row.url, row.options = label_config, url, options
            return False

    def find(self, project_id: int) -> ProjectRecord | None:
        """The project, or None when it never connected."""
        with self._database.reading() as session:
            row = session.get(ProjectRow, project_id)
            return None if row is None else _record(row)

    def get(self, project_id: int) -> ProjectRecord:
        """The project.

        Raises:
            StateError: it never connected.
        """
        record = self.find(project_id)
        if record is None:
            raise StateError(
                f"project {project_id} is not connected; add this backend under Settings > Model of that project"
            )
        return record

    def need(self, project_id: int) -> None:
        """Every webhook asks this, so the database is asked once: what has connected stays.

        Raises:
            StateError: the project never connected.
        """
        if project_id not in self._connected:
            self.get(project_id)
            self._connected.add(project_id)

    def all(self) -> list[ProjectRecord]:
        """Every connected project, by id."""
        with self._database.reading() as session:
            return [_record(row) for row in session.scalars(select(ProjectRow).order_by(ProjectRow.id))]

    @contextmanager
    def locked(self, project_id: int) -> Iterator[None]:
        """A transaction in which nobody else decides on the project's rounds or claims one."""
        with self._database.transaction() as session:
            session.get(ProjectRow, project_id, with_for_update=True)
            yield

    def set_hostname(self, project_id: int, hostname: str) -> None:
        """Keep what Label Studio calls itself: its tasks may name their images so."""
        self._update(project_id, hostname=hostname)

    def set_label_config(self, project_id: int, label_config: str) -> None:
        """Keep the labeling config that Label Studio reported last."""
        with self._database.transaction() as session:
            row = session.get(ProjectRow, project_id)
            if row is not None and row.label_config != label_config:
                row.label_config, row.edits = label_config, row.edits + 1

    def set_options_digest(self, project_id: int, digest: str) -> None:
        """Keep what tells the options in force from others; the operator may have changed them."""
        with self._database.transaction() as session:
            row = session.get(ProjectRow, project_id)
            if row is not None and row.options_digest != digest:
                row.edits += bool(row.options_digest)
                row.options_digest = digest

    def set_task_count(self, project_id: int, count: int | None) -> bool:
        """Keep how many tasks the project has; whether they are more than were known. None: to be counted anew."""
        with self._database.transaction() as session:
            row = session.get(ProjectRow, project_id)
            if row is None or row.task_count == count:
                return False
            known, row.task_count = row.task_count, count
            return count is not None and known is not None and count > known

    def ask_poll(self, project_id: int) -> None:
        """Somebody wants the project polled at once."""
        self._update(project_id, poll_asked=True)

    def polling(self, project_id: int, next_at: datetime) -> None:
        """A poll begins; when the next one is due (UTC)."""
        self._update(project_id, poll_asked=False, next_poll_at=next_at)

    def poll_ended(self, project_id: int, failed: str = "", title: str | None = None) -> None:
        """How a poll went (see :class:`ProjectRecord`), and the project's title if it told one."""
        self._update(project_id, poll_failed=failed, **({} if title is None else {"title": title}))

    def polled(self, project_id: int, until: str) -> None:
        """Remember up to which ``updated_at`` the project's tasks have been read."""
        self._update(project_id, polled_until=until, polled_at=now())

    def set_problem(self, project_id: int, topic: str, problem: str) -> None:
        """Keep one sentence about what hinders this project, by topic; an empty one takes it back."""
        with self._database.transaction() as session:
            row = session.get(ProjectRow, project_id)
            if row is not None and row.problems.get(topic, "") != problem:
                others = {name: text for name, text in row.problems.items() if name != topic}
                row.problems = {**others, topic: problem} if problem else others

    def set_repairs(self, project_id: int, repairs: dict[str, Any]) -> None:
        """Keep what was set right in Label Studio, in place of what was kept before."""
        self._update(project_id, repairs=repairs)

    def set_choice(self, project_id: int, choice: DetectorChoice | None) -> None:
        """Keep the detector that was chosen for a project that names none; None: the next round chooses anew.

        What a person chooses is an edit: a round that failed before is tried again.
        """
        with self._database.transaction() as session:
            row = session.get(ProjectRow, project_id)
            if row is not None:
                row.detector = {} if choice is None else asdict(choice)
                row.edits += choice is None or choice.by == "person"

    def set_paused(self, project_id: int, paused: bool) -> bool:
        """Hold a project's rounds, or let them go on; whether that changes anything.

        Raises:
            StateError: it never connected.
        """
        if self.get(project_id).paused == paused:
            return False
        self._update(project_id, paused=paused)
        return True

    def _update(self, project_id: int, **values: Any) -> None:
        with self._database.transaction() as session:
            row = session.get(ProjectRow, project_id)
            if row is not None:
                for name, value in values.items():
                    setattr(row, name, value)


def _record(row: ProjectRow) -> ProjectRecord:
    return ProjectRecord(
        row.id,
        row.key,
        row.label_config,
        row.url,
        dict(row.options),
        row.polled_until,
        row.polled_at,
        dict(row.problems),
        row.paused,
        row.edits,
        row.task_count,
        row.hostname or "",
        dict(row.repairs),
        row.title or "",
        row.poll_failed or "",
        row.next_poll_at,
        row.poll_asked,
        DetectorChoice(**row.detector) if row.detector else None,
    )
