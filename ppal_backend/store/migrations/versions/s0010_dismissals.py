"""Doubts about annotations that people have looked at and found to be none."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "dismissals",
        sa.Column("project_id", sa.Integer(), sa.ForeignKey("projects.id"), primary_key=True),
        sa.Column("task_id", sa.BigInteger(), primary_key=True),
        sa.Column("boxes", sa.String(), nullable=False),
        sa.Column("dismissed_at", sa.DateTime(), nullable=False),
    )
