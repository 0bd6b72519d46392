"""Pre-annotations that people approved in bulk."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "approval_batches",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("project_id", sa.Integer(), sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("threshold", sa.Float(), nullable=False),
        sa.Column("annotator", sa.String(), nullable=False),
        sa.Column("tasks", sa.Integer(), nullable=False),
        sa.Column("made_at", sa.DateTime(), nullable=False),
        sa.Column("undone_at", sa.DateTime()),
    )
    op.create_index("ix_approval_batches_project_id", "approval_batches", ["project_id"])
    op.create_table(
        "approvals",
        sa.Column("project_id", sa.Integer(), sa.ForeignKey("projects.id"), primary_key=True),
        sa.Column("task_id", sa.BigInteger(), primary_key=True),
        sa.Column("batch_id", sa.Integer(), sa.ForeignKey("approval_batches.id"), nullable=False),
        sa.Column("annotation_id", sa.BigInteger()),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("begun_at", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_approvals_batch_id", "approvals", ["batch_id"])
