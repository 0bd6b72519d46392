"""Corrections let a failed training be tried again, and what somebody is going back to is kept meanwhile."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.add_column("annotations", sa.Column("changed_at", sa.DateTime(), nullable=True))
    for table, name in (("annotations", "corrected"), ("model_versions", "wanted")):
        op.add_column(table, sa.Column(name, sa.Boolean(), nullable=False, server_default=sa.false()))
