"""Published model versions; exactly one per project is active."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select, update

from ppal_backend.errors import StateError
from ppal_backend.store.database import Database
from ppal_backend.store.tables import VersionRow
from ppal_backend.structures.round import AS_IS


@dataclass(frozen=True)
class ModelVersion:
    """A version as published: ``labels`` in class order, ``checkpoint`` relative to MODEL_DIR ("" = no model)."""

    project_id: int
    version: str
    round_number: int
    detector: str
    checkpoint: str
    labels: tuple[str, ...]
    difficulty: tuple[float, ...] | None
    metrics: dict[str, Any]
    created_at: datetime | None = None
    active: bool = True
    wanted: bool = False
    """Whether somebody is going back to it."""

    @property
    def is_trained(self) -> bool:
        """Whether its model is one that a training made, not the zoo's detector as it is."""
        return bool(self.checkpoint) and not self.checkpoint.endswith(f"/{AS_IS}")


class VersionStore:
    """The versions of every project."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def activate(self, version: ModelVersion) -> None:
        """Record a version and make it the active one; doing it twice changes nothing."""
        with self._database.transaction() as session:
            session.execute(update(VersionRow).where(VersionRow.project_id == version.project_id).values(active=False))
            row = session.scalar(select(VersionRow).where(VersionRow.version == version.version))
            if row is None:
                row = VersionRow(project_id=version.project_id, version=version.version)
                session.add(row)
            row.round_number, row.detector = version.round_number, version.detector
            row.checkpoint, row.labels = version.checkpoint, list(version.labels)
            row.difficulty = None if version.difficulty is None else list(version.difficulty)
            row.metrics, row.active = version.metrics, True

    @contextmanager
    def going_back(self, version: ModelVersion) -> Iterator[None]:
        """Somebody goes back to a version within the block: retention leaves its files, which rounds that end meanwhile
        would make too old. After a kill they stay until somebody goes back to it again."""
        self._want(version, True)
        try:
            yield
        finally:
            self._want(version, False)

    def _want(self, version: ModelVersion, wanted: bool) -> None:
        with self._database.transaction() as session:
            session.execute(update(VersionRow).where(VersionRow.version == version.version).values(wanted=wanted))

    def active(self, project_id: int, with_model: bool = False) -> ModelVersion | None:
        """The active version; with ``with_model`` None where it has no checkpoint: whoever went back to an order
        without a model left the models of all other versions."""
        query = select(VersionRow).where(VersionRow.project_id == project_id, VersionRow.active)
        with self._database.reading() as session:
            row = session.scalar(query)
            return None if row is None or (with_model and not row.checkpoint) else _record(row)

    def get(self, project_id: int, version: str) -> ModelVersion:
        """A version of a project by its name.

        Raises:
            StateError: the project has no such version; the text names those it has.
        """
        versions = self.of_project(project_id)
        for found in versions:
            if found.version == version:
                return found
        known = ", ".join(v.version for v in versions[-10:]) or "none yet"
        raise StateError(f"expected a version of project {project_id}, got {version!r}; it has: {known}")

    def of_project(self, project_id: int) -> list[ModelVersion]:
        """A project's versions, oldest first."""
        query = select(VersionRow).where(VersionRow.project_id == project_id).order_by(VersionRow.id)
        with self._database.reading() as session:
            return [_record(row) for row in session.scalars(query)]

    def names(self) -> list[str]:
        """Every version name, newest first."""
        with self._database.reading() as session:
            return list(session.scalars(select(VersionRow.version).order_by(VersionRow.id.desc())))


def _record(row: VersionRow) -> ModelVersion:
    return ModelVersion(
        row.project_id,
        row.version,
        row.round_number,
        row.detector,
        row.checkpoint,
        tuple(row.labels),
        None if row.difficulty is None else tuple(row.difficulty),
        dict(row.metrics),
        row.created_at,
        row.active,
        row.wanted,
    )
