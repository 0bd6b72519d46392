"""What people decided about boxes: annotations approved in bulk, with the batch they belong to, and doubts dismissed.

A task is claimed before its annotation is created in Label Studio, so two people who approve the same page make one
annotation; a claim whose annotation never came is taken over after :data:`CLAIM_S`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, func, select, update

from ppal_backend.errors import StateError
from ppal_backend.store.database import Database, repeat_on_conflict
from ppal_backend.store.tables import ApprovalBatchRow, ApprovalRow, DismissalRow, ProjectRow, now

CLAIM_S = 120.0


@dataclass(frozen=True)
class Approval:
    """An approved task; ``annotation_id`` is None where the answer to its creation never came."""

    task_id: int
    batch_id: int
    annotation_id: int | None
    digest: str


@dataclass(frozen=True)
class ApprovalBatch:
    """What was approved at once: of which version, above which confidence, in whose name ("" for the model's); ``left``
    are the approvals of it that still stand."""

    id: int
    project_id: int
    version: str
    threshold: float
    annotator: str
    tasks: int
    made_at: datetime
    undone_at: datetime | None
    left: int = 0


class ApprovalStore:
    """Approvals of every project."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, project_id: int, version: str, threshold: float, annotator: str) -> int:
        """Open a batch; its id."""
        with self._database.transaction() as session:
            row = ApprovalBatchRow(
                project_id=project_id, version=version, threshold=threshold, annotator=annotator, tasks=0
            )
            session.add(row)
            session.flush()
            return row.id

    def claim(self, project_id: int, batch_id: int, task_id: int, digest: str) -> bool:
        """Take a task for a batch; False where it is approved, or somebody is about to.

        Args:
            project_id: Project.
            batch_id: The batch.
            task_id: The task.
            digest: Tells its annotation from one that somebody changed.
        """
        with self._database.transaction() as session:
            session.get(ProjectRow, project_id, with_for_update=True)
            row = session.get(ApprovalRow, (project_id, task_id))
            if row is not None and (row.annotation_id is not None or now() - row.begun_at < timedelta(seconds=CLAIM_S)):
                return False
            if row is None:
                row = ApprovalRow(project_id=project_id, task_id=task_id)
                session.add(row)
            row.batch_id, row.digest, row.begun_at = batch_id, digest, now()
            return True

    def created(self, project_id: int, task_id: int, annotation_id: int) -> None:
        """A claimed task's annotation is there."""
        with self._database.transaction() as session:
            row = session.get(ApprovalRow, (project_id, task_id))
            if row is not None:
                row.annotation_id = annotation_id
                batch = session.get(ApprovalBatchRow, row.batch_id)
                if batch is not None:
                    batch.tasks += 1

    def forget(self, project_id: int, task_id: int) -> None:
        """A task is not approved (any more)."""
        chosen = ApprovalRow.project_id == project_id, ApprovalRow.task_id == task_id
        with self._database.transaction() as session:
            session.execute(delete(ApprovalRow).where(*chosen))

    def of_batch(self, project_id: int, batch_id: int) -> tuple[ApprovalBatch, list[Approval]]:
        """A batch and the approvals of it that still stand.

        Raises:
            StateError: The project has no such batch.
        """
        query = select(ApprovalRow).where(ApprovalRow.batch_id == batch_id).order_by(ApprovalRow.task_id)
        with self._database.reading() as session:
            row = session.get(ApprovalBatchRow, batch_id)
            if row is None or row.project_id != project_id:
                raise StateError(f"project {project_id} has no batch {batch_id} of approvals; see its page Approve")
            rows = [Approval(r.task_id, r.batch_id, r.annotation_id, r.digest) for r in session.scalars(query)]
            return _batch(row, len(rows)), rows

    def batches(self, project_id: int, most: int = 20) -> list[ApprovalBatch]:
        """The newest batches, the last one first."""
        mine = select(ApprovalBatchRow).where(ApprovalBatchRow.project_id == project_id)
        counts = select(ApprovalRow.batch_id, func.count()).where(ApprovalRow.project_id == project_id)
        with self._database.reading() as session:
            left = dict(session.execute(counts.group_by(ApprovalRow.batch_id)).tuples().all())
            rows = session.scalars(mine.order_by(ApprovalBatchRow.id.desc()).limit(most))
            return [_batch(row, left.get(row.id, 0)) for row in rows]

    def undone(self, batch_id: int) -> None:
        """A batch was taken back."""
        with self._database.transaction() as session:
            session.execute(update(ApprovalBatchRow).where(ApprovalBatchRow.id == batch_id).values(undone_at=now()))

    def annotations(self, project_id: int) -> Mapping[int, int]:
        """Approved annotations by task."""
        query = select(ApprovalRow.task_id, ApprovalRow.annotation_id).where(
            ApprovalRow.project_id == project_id, ApprovalRow.annotation_id.is_not(None)
        )
        with self._database.reading() as session:
            return {task_id: int(i) for task_id, i in session.execute(query).tuples() if i is not None}


def _batch(row: ApprovalBatchRow, left: int) -> ApprovalBatch:
    return ApprovalBatch(
        row.id, row.project_id, row.version, row.threshold, row.annotator, row.tasks, row.made_at, row.undone_at, left
    )


class DismissalStore:
    """Doubts about annotations that people have looked at and found to be none. It holds for the boxes that they saw:
    once these change, the task is doubted anew."""

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
