"""What people ask of a project's queue, kept until they take it back or it is done."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from sqlalchemy import delete, func, select

from ppal_backend.errors import StateError
from ppal_backend.store.database import Database, repeat_on_conflict
from ppal_backend.store.tables import PinRow, ProjectRow, QuotaRow
from ppal_backend.structures.steering import Quota, Steering

Place = Literal["first", "last"]
MOST_PINS, MOST_QUOTAS = 2000, 20


class SteeringStore:
    """Pins and quotas of every project."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of_project(self, project_id: int) -> Steering:
        """Pins in the order in which they were set, and quotas."""
        pins = select(PinRow).where(PinRow.project_id == project_id).order_by(PinRow.number)
        quotas = select(QuotaRow).where(QuotaRow.project_id == project_id).order_by(QuotaRow.id)
        with self._database.reading() as session:
            rows = session.scalars(pins).all()
            return Steering(
                tuple(row.task_id for row in rows if row.place == "first"),
                tuple(row.task_id for row in rows if row.place == "last"),
                tuple(_quota(row) for row in session.scalars(quotas)),
                {row.task_id: row.pinned_at.isoformat() for row in rows},
            )

    @repeat_on_conflict
    def pin(self, project_id: int, task_ids: Sequence[int], place: Place) -> None:
        """Put tasks in front, behind those that are there already, or at the end; one that was pinned moves.

        Raises:
            StateError: The project is not connected, or has too many pins.
        """
        with self._database.transaction() as session:
            if session.get(ProjectRow, project_id, with_for_update=True) is None:
                raise StateError(f"project {project_id} is not connected to this backend")
            self.unpin(project_id, task_ids)
            mine = PinRow.project_id == project_id
            highest, count = session.execute(select(func.max(PinRow.number), func.count()).where(mine)).one()
            if count + len(task_ids) > MOST_PINS:
                raise StateError(
                    f"expected at most {MOST_PINS} pinned tasks, got {count + len(task_ids)}; take some pins back"
                )
            session.add_all(
                PinRow(project_id=project_id, task_id=task_id, place=place, number=(highest or 0) + k)
                for k, task_id in enumerate(task_ids, start=1)
            )

    def unpin(self, project_id: int, task_ids: Collection[int]) -> int:
        """Take pins back; how many there were."""
        ids, removed = list(task_ids), 0
        with self._database.transaction() as session:
            for start in range(0, len(ids), 500):
                chosen = PinRow.project_id == project_id, PinRow.task_id.in_(ids[start : start + 500])
                removed += session.execute(delete(PinRow).where(*chosen)).rowcount  # type: ignore[attr-defined]
        return removed

    def drop_pins(self, project_id: int, pins: Mapping[int, str]) -> None:
        """Forget these pins (task id -> when it was set), but for those that were set anew since."""
        with self._database.transaction() as session:
            session.get(ProjectRow, project_id, with_for_update=True)  # nobody pins meanwhile
            now = self.of_project(project_id).pinned_at
            self.unpin(project_id, [task_id for task_id, at in pins.items() if now.get(task_id) == at])

    def add_quota(self, project_id: int, quota: Quota) -> Quota:
        """Keep a quota; one on the same takes its place.

        Raises:
            StateError: The project is not connected, or has too many quotas.
        """
        with self._database.transaction() as session:
            if session.get(ProjectRow, project_id, with_for_update=True) is None:
                raise StateError(f"project {project_id} is not connected to this backend")
            mine = list(session.scalars(select(QuotaRow).where(QuotaRow.project_id == project_id)))
            same = (quota.kind, quota.field, quota.value)
            row = next((r for r in mine if (r.kind, r.field, r.value) == same), None)
            if row is None:
                if len(mine) >= MOST_QUOTAS:
                    raise StateError(f"expected at most {MOST_QUOTAS} quotas, got one more; take one back")
                row = QuotaRow(project_id=project_id, kind=quota.kind, field=quota.field, value=quota.value)
                session.add(row)
            row.share = quota.share
            session.flush()
            return _quota(row)

    def remove_quota(self, project_id: int, quota_id: int) -> bool:
        """Take a quota back; whether there was one of that id."""
        chosen = QuotaRow.project_id == project_id, QuotaRow.id == quota_id
        with self._database.transaction() as session:
            return bool(session.execute(delete(QuotaRow).where(*chosen)).rowcount)  # type: ignore[attr-defined]


class ProjectSteering:
    """What people ask of one project's queue, for a round of it (``rounds.ports.QueueSteering``)."""

    def __init__(self, store: SteeringStore, project_id: int) -> None:
        self._store, self._project_id = store, project_id

    def read(self) -> Steering:
        """As it is now."""
        return self._store.of_project(self._project_id)

    def drop(self, pins: Mapping[int, str]) -> None:
        """Forget pins of tasks that need none any more, but for those that were set anew since."""
        self._store.drop_pins(self._project_id, pins)


def _quota(row: QuotaRow) -> Quota:
    return Quota(row.kind, row.value, row.share, row.field, row.id)  # type: ignore[arg-type]
