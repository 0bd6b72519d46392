"""Workers show that they live in the database: machines need not share a folder for that."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("beat_at", sa.DateTime(), nullable=False),
    )
