"""Which labelled tasks measure the detector and which train it: written once a task, never changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sqlalchemy import func, select

from ppal_backend.store.database import Database, repeat_on_conflict
from ppal_backend.store.ledger import AnnotationLedger
from ppal_backend.store.tables import RoundRow, TaskSideRow

_AT_ONCE = 500


class SideStore:
    """The sides of every project's tasks."""

    def __init__(self, database: Database, ledger: AnnotationLedger) -> None:
        self._database, self._ledger = database, ledger

    def of_project(self, project_id: int) -> dict[int, str]:
        """``evaluation`` or ``training`` by task id, of every task that has been labelled in a round."""
        query = select(TaskSideRow.task_id, TaskSideRow.side).where(TaskSideRow.project_id == project_id)
        with self._database.reading() as session:
            return dict(session.execute(query).tuples().all())

    @repeat_on_conflict
    def add(self, project_id: int, round_number: int, sides: Mapping[int, str]) -> None:
        """Keep the sides of tasks that have none yet; those of others stay as they are."""
        ids = sorted(sides)
        with self._database.transaction() as session:
            for start in range(0, len(ids), _AT_ONCE):
                chunk = ids[start : start + _AT_ONCE]
                mine = TaskSideRow.project_id == project_id, TaskSideRow.task_id.in_(chunk)
                known = set(session.scalars(select(TaskSideRow.task_id).where(*mine)))
                session.add_all(
                    TaskSideRow(project_id=project_id, task_id=i, side=sides[i], round_number=round_number)
                    for i in chunk
                    if i not in known
                )

    def trained_before(self, project_id: int, labelled: Collection[int]) -> set[int]:
        """The labelled tasks that the last finished training had, from before sides were kept; none without one."""
        query = select(func.max(RoundRow.number)).where(
            RoundRow.project_id == project_id, RoundRow.kind == "train", RoundRow.state == "done"
        )
        with self._database.reading() as session:
            last = session.scalar(query)
        return set() if last is None else set(labelled) - set(self._ledger.tasks_after(project_id, last))


class ProjectSides:
    """The sides of one project's tasks, for a round of it (``rounds.evaluation_set.Assignments``)."""

    def __init__(self, store: SideStore, project_id: int, round_number: int) -> None:
        self._store, self._project_id, self._round_number = store, project_id, round_number

    def all(self) -> Mapping[int, str]:
        """``evaluation`` or ``training`` by task id."""
        return self._store.of_project(self._project_id)

    def add(self, assigned: Mapping[int, str]) -> None:
        """Keep assignments of tasks that have none yet."""
        self._store.add(self._project_id, self._round_number, assigned)

    def trained_before(self, labelled: Collection[int]) -> Collection[int]:
        """Those of the labelled tasks that a training may have seen before sides were kept."""
        return self._store.trained_before(self._project_id, labelled)
