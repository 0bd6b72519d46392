"""Which annotations have been seen, and which of them no round has used yet.

Webhooks and polls write the same rows, so a lost webhook, a duplicate one and a poll of what a webhook
already told all end in the same state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from ppal_backend.store.database import Database, repeat_on_conflict
from ppal_backend.store.tables import AnnotationRow


@dataclass(frozen=True)
class SeenAnnotation:
    """An annotation as an event or a poll showed it; ``usable`` is false for skipped or deleted ones, ``changed_at`` is
    Label Studio's time of its last change (UTC, without a zone), None where that was not told."""

    annotation_id: int
    task_id: int | None
    usable: bool = True
    changed_at: datetime | None = None


class AnnotationLedger:
    """The annotations of each project."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def see_tasks(self, project_id: int, tasks: Mapping[int, Sequence[SeenAnnotation]]) -> None:
        """Take in whole tasks: their annotations as they are now; others that were seen on them are gone."""
        self.see(project_id, [a for annotations in tasks.values() for a in annotations])
        with self._database.transaction() as session:
            for chunk in _chunks(list(tasks), 200):
                now_there = [a.annotation_id for task_id in chunk for a in tasks[task_id]]
                gone = AnnotationRow.task_id.in_(chunk), AnnotationRow.annotation_id.not_in(now_there)
                _take_back(session, project_id, *gone)

    def tasks_deleted(self, project_id: int, task_ids: Iterable[int]) -> None:
        """These tasks are gone, and their annotations with them."""
        with self._database.transaction() as session:
            for chunk in _chunks(sorted(set(task_ids)), 500):
                _take_back(session, project_id, AnnotationRow.task_id.in_(chunk))

    def deleted(self, project_id: int, annotation_ids: Iterable[int], corrects: bool = True) -> None:
        """These annotations are gone, whatever an event or the lack of one says. Without ``corrects`` the newest
        training knew that."""
        with self._database.transaction() as session:
            for chunk in _chunks(sorted(set(annotation_ids)), 500):
                _take_back(session, project_id, AnnotationRow.annotation_id.in_(chunk), corrects=corrects)

    def usable(self, project_id: int) -> dict[int, int | None]:
        """The annotations that are there as far as anybody told, and their tasks."""
        query = select(AnnotationRow.annotation_id, AnnotationRow.task_id).where(*_usable(project_id))
        with self._database.reading() as session:
            return dict(session.execute(query).tuples().all())

    def labelled_tasks(self, project_id: int) -> set[int]:
        """Tasks with a usable annotation, as far as they are known."""
        query = select(AnnotationRow.task_id).distinct().where(*_usable(project_id))
        with self._database.reading() as session:
            return {task_id for task_id in session.scalars(query) if task_id is not None}

    def task_count(self, project_id: int) -> int:
        """Tasks with a usable annotation, as far as they are known."""
        query = select(func.count(AnnotationRow.task_id.distinct())).where(*_usable(project_id))
        with self._database.reading() as session:
            return session.scalar(query) or 0

    def count(self, project_id: int) -> int:
        """Usable annotations whose task is known."""
        query = select(func.count(AnnotationRow.task_id)).where(*_usable(project_id))
        with self._database.reading() as session:
            return session.scalar(query) or 0

    def see(self, project_id: int, annotations: Iterable[SeenAnnotation]) -> None:
        """Insert or update annotations, the last word about one counts; seeing one twice changes nothing."""
        seen: dict[int, SeenAnnotation] = {}
        for item in annotations:
            earlier = seen.get(item.annotation_id)
            if item.task_id is None and earlier is not None:  # a deletion does not tell the task
                item = replace(item, task_id=earlier.task_id)
            seen[item.annotation_id] = item
        if seen:
            self._see(project_id, seen)

    @repeat_on_conflict
    def _see(self, project_id: int, seen: Mapping[int, SeenAnnotation]) -> None:
        with self._database.transaction() as session:
            for chunk in _chunks(sorted(seen), 500):  # the same order everywhere, or workers could wait in a circle
                known = session.scalars(
                    select(AnnotationRow).where(
                        AnnotationRow.project_id == project_id, AnnotationRow.annotation_id.in_(chunk)
                    )
                )
                rows = {row.annotation_id: row for row in known}
                for annotation_id in chunk:
                    item = seen[annotation_id]
                    row = rows.get(annotation_id)
                    if row is None:
                        session.add(
                            AnnotationRow(
                                project_id=project_id,
                                annotation_id=annotation_id,
                                task_id=item.task_id,
                                usable=item.usable,
                                changed_at=item.changed_at,
                            )
                        )
                    else:
                        row.corrected = row.corrected or _corrects(row, item)
                        row.changed_at = max(filter(None, (row.changed_at, item.changed_at)), default=None)
                        row.usable = item.usable
                        row.task_id = row.task_id if item.task_id is None else item.task_id

    def used_by(self, project_id: int, round_number: int, annotation_ids: Iterable[int]) -> None:
        """Note that a round exported these annotations: they no longer count as new."""
        self._use(project_id, round_number, list(annotation_ids))

    @repeat_on_conflict
    def _use(self, project_id: int, round_number: int, ids: list[int]) -> None:
        with self._database.transaction() as session:
            for chunk in _chunks(ids, 500):
                known = select(AnnotationRow.annotation_id).where(
                    AnnotationRow.project_id == project_id, AnnotationRow.annotation_id.in_(chunk)
                )
                unknown = sorted(set(chunk) - set(session.scalars(known)))
                session.add_all(AnnotationRow(project_id=project_id, annotation_id=i) for i in unknown)
                session.flush()
                session.execute(
                    update(AnnotationRow)
                    .where(
                        AnnotationRow.project_id == project_id,
                        AnnotationRow.annotation_id.in_(chunk),
                        AnnotationRow.round_number.is_(None),
                    )
                    .values(round_number=round_number)
                )

    def postpone(self, project_id: int, round_number: int) -> None:
        """This training was cancelled: the annotations that asked for it, new or corrected, do not ask again. Every
        round's export holds all annotations, so the next training uses them all the same."""
        with self._database.transaction() as session:
            postpone(session, project_id, round_number)

    def corrections_read(self, project_id: int) -> None:
        """A training begins to export annotations as they are now: what was corrected so far asks for no other one."""
        with self._database.transaction() as session:
            _settle_corrections(session, project_id)

    def first_annotated(self, project_id: int, since: datetime, count: int) -> list[int]:
        """The first tasks, at most ``count``, whose first usable annotation was seen at or after a time (UTC)."""
        seen = func.min(AnnotationRow.first_seen_at)
        query = (
            select(AnnotationRow.task_id)
            .where(*_usable(project_id), AnnotationRow.task_id.is_not(None))
            .group_by(AnnotationRow.task_id)
            .having(seen >= since)
            .order_by(seen, AnnotationRow.task_id)
            .limit(count)
        )
        with self._database.reading() as session:
            return [task_id for task_id in session.scalars(query) if task_id is not None]

    def tasks_after(self, project_id: int, round_number: int) -> list[int]:
        """Tasks with a usable annotation that this round had not exported yet."""
        later = or_(AnnotationRow.round_number.is_(None), AnnotationRow.round_number > round_number)
        query = select(AnnotationRow.task_id).where(*_usable(project_id), AnnotationRow.task_id.is_not(None), later)
        with self._database.reading() as session:
            return sorted(set(session.scalars(query)))

    def new_count(self, project_id: int) -> int:
        """Usable annotations that have asked for no training yet: none has exported or postponed them."""
        query = select(func.count()).where(*_usable(project_id), AnnotationRow.round_number.is_(None))
        with self._database.reading() as session:
            return session.scalar(query) or 0

    def corrected(self, project_id: int) -> int:
        """Annotations that have asked for a training and were changed or deleted since the newest one began to export:
        those that did not ask yet are new."""
        query = select(func.count()).where(*_corrected(project_id), AnnotationRow.round_number.is_not(None))
        with self._database.reading() as session:
            return session.scalar(query) or 0


def postpone(session: Session, project_id: int, round_number: int) -> None:
    """As :meth:`AnnotationLedger.postpone`, within a transaction."""
    waiting = AnnotationRow.project_id == project_id, AnnotationRow.round_number.is_(None)
    session.execute(update(AnnotationRow).where(*waiting).values(round_number=round_number))
    _settle_corrections(session, project_id)


def _settle_corrections(session: Session, project_id: int) -> None:
    session.execute(update(AnnotationRow).where(*_corrected(project_id)).values(corrected=False))


def _corrects(row: AnnotationRow, item: SeenAnnotation) -> bool:
    """Whether an annotation has changed since it was last seen. Without both times it has not, as far as is known."""
    is_later = bool(row.changed_at and item.changed_at and item.changed_at > row.changed_at)
    return row.usable != item.usable or (item.usable and is_later)


def _corrected(project_id: int) -> tuple[ColumnElement[bool], ...]:
    return AnnotationRow.project_id == project_id, AnnotationRow.corrected.is_(True)


def _usable(project_id: int) -> tuple[ColumnElement[bool], ...]:
    """Of a project's annotations those that are there and not skipped, as far as anybody told."""
    return AnnotationRow.project_id == project_id, AnnotationRow.usable.is_(True)


def _take_back(session: Session, project_id: int, *which: ColumnElement[bool], corrects: bool = True) -> None:
    """Annotations that are no longer there do not count, whether or not a round has used them."""
    mine = update(AnnotationRow).where(*_usable(project_id), *which)
    session.execute(mine.values(usable=False, corrected=corrects))


def _chunks(values: list[int], size: int) -> Iterable[list[int]]:
    return (values[i : i + size] for i in range(0, len(values), size))
