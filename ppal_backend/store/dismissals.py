"""Doubts about annotations that people have looked at and found to be none."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import delete, select

from ppal_backend.errors import StateError
from ppal_backend.store.database import Database, repeat_on_conflict
from ppal_backend.store.tables import DismissalRow, ProjectRow


class DismissalStore:
    """What every project's people have dismissed. It holds for the boxes that they saw: once these change, the task is
    doubted anew."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of_project(self, project_id: int) -> Mapping[int, str]:
        """Digest of the boxes that were found to be right, by task id."""
        query = select(DismissalRow.task_id, DismissalRow.boxes).where(DismissalRow.project_id == project_id)
        with self._database.reading() as session:
            return dict(session.execute(query).tuples().all())

    @repeat_on_conflict
    def add(self, project_id: int, task_id: int, boxes: str) -> None:
        """Dismiss the doubts about a task.

        Raises:
            StateError: The project is not connected.
        """
        with self._database.transaction() as session:
            if session.get(ProjectRow, project_id) is None:
                raise StateError(f"project {project_id} is not connected to this backend")
            row = session.get(DismissalRow, (project_id, task_id))
            if row is None:
                session.add(DismissalRow(project_id=project_id, task_id=task_id, boxes=boxes))
            else:
                row.boxes = boxes

    def take_back(self, project_id: int, task_id: int) -> None:
        """Doubt a task again; nothing happens where it was not dismissed."""
        mine = DismissalRow.project_id == project_id, DismissalRow.task_id == task_id
        with self._database.transaction() as session:
            session.execute(delete(DismissalRow).where(*mine))
