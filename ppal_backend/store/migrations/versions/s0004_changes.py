"""Projects count what changes, so that a failed round waits for a change, and know what Label Studio calls itself."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    for name in ("changes", "edits"):
        op.add_column("projects", sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
        op.add_column("rounds", sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
    op.add_column("projects", sa.Column("hostname", sa.String(), nullable=True))
    op.add_column("projects", sa.Column("options_digest", sa.String(), nullable=True))
    op.add_column("projects", sa.Column("task_count", sa.Integer(), nullable=True))
    op.add_column("projects", sa.Column("repairs", sa.JSON(), nullable=False, server_default="{}"))
