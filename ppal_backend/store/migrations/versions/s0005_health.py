"""Projects know their title and how their last poll went; notes about the installation as a whole."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("projects", sa.Column("title", sa.String(), nullable=True))
    op.add_column("projects", sa.Column("poll_failed", sa.String(), nullable=True))
    op.add_column("projects", sa.Column("next_poll_at", sa.DateTime(), nullable=True))
    op.add_column("projects", sa.Column("poll_asked", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "notes",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("content", sa.JSON(), nullable=False),
        sa.Column("noted_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
