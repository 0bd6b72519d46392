"""Projects can be paused, and events know how often their handling was begun."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("projects", sa.Column("paused", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("events", sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"))
