"""The tables. Rows leave this room only as frozen records, never as live ORM objects."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Float, ForeignKey, Index, Text, false, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


def now() -> datetime:
    """Now, in UTC, without a zone: SQLite keeps none, so every stored time is UTC."""
    return datetime.now(UTC).replace(tzinfo=None)


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, datetime: DateTime}  # noqa: RUF012


class ProjectRow(Base):
    __tablename__ = "projects"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    key: Mapped[str]  # "id.created": tells a project from another one that got the same id later
    label_config: Mapped[str] = mapped_column(Text)
    url: Mapped[str]
    options: Mapped[dict[str, Any]]
    connected_at: Mapped[datetime] = mapped_column(default=now)
    polled_until: Mapped[str] = mapped_column(default="")
    polled_at: Mapped[datetime | None]
    next_round: Mapped[int] = mapped_column(default=1)
    problems: Mapped[dict[str, Any]] = mapped_column(default=dict)
    paused: Mapped[bool] = mapped_column(default=False, server_default=false())
    edits: Mapped[int] = mapped_column(default=0, server_default="0")  # how often config or options changed
    options_digest: Mapped[str | None]  # of the options in force
    hostname: Mapped[str | None]  # what Label Studio calls itself
    task_count: Mapped[int | None]  # tasks that the last poll saw; None: not known
    repairs: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")  # see operations.upkeep
    title: Mapped[str | None]  # as the last poll saw it
    poll_failed: Mapped[str | None]  # "" | unavailable | token | other
    next_poll_at: Mapped[datetime | None]
    poll_asked: Mapped[bool] = mapped_column(default=False, server_default=false())  # somebody wants one at once
    detector: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")  # a DetectorChoice; empty: none


class EventRow(Base):
    __tablename__ = "events"
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int | None] = mapped_column(index=True)
    action: Mapped[str]
    body: Mapped[dict[str, Any]]
    received_at: Mapped[datetime] = mapped_column(default=now)
    state: Mapped[str] = mapped_column(default="pending", index=True)  # pending | done | parked
    reason: Mapped[str] = mapped_column(Text, default="")
    attempts: Mapped[int] = mapped_column(default=0, server_default="0")  # how often its handling was begun


class AnnotationRow(Base):
    __tablename__ = "annotations"
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    annotation_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    task_id: Mapped[int | None] = mapped_column(BigInteger)
    usable: Mapped[bool] = mapped_column(default=True)  # false: skipped, or deleted
    round_number: Mapped[int | None]  # the training that it asked for: see AnnotationLedger.used_by and postpone
    first_seen_at: Mapped[datetime] = mapped_column(default=now)
    changed_at: Mapped[datetime | None]  # its last change by Label Studio's clock, as far as anybody told
    corrected: Mapped[bool] = mapped_column(default=False, server_default=false())  # see AnnotationLedger.corrected


class TaskSideRow(Base):
    __tablename__ = "task_sides"
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    task_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    side: Mapped[str]  # evaluation | training: never changed, see rounds.evaluation_set
    round_number: Mapped[int]  # the round that gave it
    assigned_at: Mapped[datetime] = mapped_column(default=now)


class PinRow(Base):
    __tablename__ = "pins"
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    task_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    place: Mapped[str]  # first | last
    number: Mapped[int]  # their order
    pinned_at: Mapped[datetime] = mapped_column(default=now)


class QuotaRow(Base):
    __tablename__ = "quotas"
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), index=True)
    kind: Mapped[str]  # label | data | storage, see structures.steering
    field: Mapped[str]
    value: Mapped[str]
    share: Mapped[float] = mapped_column(Float)


class ApprovalBatchRow(Base):
    __tablename__ = "approval_batches"
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), index=True)
    version: Mapped[str]
    threshold: Mapped[float] = mapped_column(Float)
    annotator: Mapped[str]  # an email; empty: the model's own
    tasks: Mapped[int]  # annotations that it made
    made_at: Mapped[datetime] = mapped_column(default=now)
    undone_at: Mapped[datetime | None]


class ApprovalRow(Base):
    __tablename__ = "approvals"
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    task_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    batch_id: Mapped[int] = mapped_column(ForeignKey("approval_batches.id"), index=True)
    annotation_id: Mapped[int | None] = mapped_column(BigInteger)  # None until it is there
    digest: Mapped[str]
    begun_at: Mapped[datetime]


class DismissalRow(Base):
    __tablename__ = "dismissals"
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    task_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    boxes: Mapped[str]  # digest of the annotated boxes that somebody found to be right
    dismissed_at: Mapped[datetime] = mapped_column(default=now)


class RoundRow(Base):
    __tablename__ = "rounds"
    __table_args__ = (
        Index("one_pending_round", "project_id", unique=True, sqlite_where=text("state = 'pending'"),
              postgresql_where=text("state = 'pending'")),
        Index("one_running_round", "project_id", unique=True, sqlite_where=text("state = 'running'"),
              postgresql_where=text("state = 'running'")),
        Index("round_numbers", "project_id", "number", unique=True),
    )  # fmt: skip
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    number: Mapped[int]
    kind: Mapped[str]  # train | rank
    state: Mapped[str] = mapped_column(default="pending")  # pending | running | done | failed | cancelled
    reason: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    attempts: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)
    error: Mapped[str] = mapped_column(Text, default="")
    step: Mapped[str] = mapped_column(default="")
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    cancel_asked: Mapped[bool] = mapped_column(default=False)
    edits: Mapped[int] = mapped_column(default=0, server_default="0")  # those of its project when it was asked for
    lease_owner: Mapped[str] = mapped_column(default="")
    lease_until: Mapped[datetime | None]


class WorkerRow(Base):
    __tablename__ = "workers"
    name: Mapped[str] = mapped_column(primary_key=True)  # a Lease: host, process and its start
    beat_at: Mapped[datetime]


class NoteRow(Base):
    __tablename__ = "notes"
    name: Mapped[str] = mapped_column(primary_key=True)
    content: Mapped[dict[str, Any]]
    noted_at: Mapped[datetime] = mapped_column(default=now)


class VersionRow(Base):
    __tablename__ = "model_versions"
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), index=True)
    version: Mapped[str] = mapped_column(unique=True)
    round_number: Mapped[int]
    detector: Mapped[str]
    checkpoint: Mapped[str]  # relative to MODEL_DIR; empty for a random order without a model
    labels: Mapped[list[str]] = mapped_column(JSON)
    difficulty: Mapped[list[float] | None] = mapped_column(JSON)
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)
    active: Mapped[bool] = mapped_column(default=False)
    wanted: Mapped[bool] = mapped_column(default=False, server_default=false())  # somebody is going back to it
