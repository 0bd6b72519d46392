"""A round that was asked for is due: its time was the asker's, and compared with the database's."""

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.drop_column("rounds", "not_before")
