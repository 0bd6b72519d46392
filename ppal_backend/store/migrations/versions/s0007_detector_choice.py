"""Projects keep the detector that was chosen for them; those that have trained keep the one they trained."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

REASON = "it is that of the project's last training, from before detectors were chosen"


def upgrade() -> None:
    op.add_column("projects", sa.Column("detector", sa.JSON(), nullable=False, server_default="{}"))
    projects = sa.table(
        "projects", sa.column("id", sa.Integer), sa.column("options", sa.JSON), sa.column("detector", sa.JSON)
    )
    versions = sa.table("model_versions", *map(sa.column, ("id", "project_id", "detector", "checkpoint")))
    connection = op.get_bind()
    trained = connection.execute(
        sa.select(versions.c.project_id, versions.c.detector).where(versions.c.checkpoint != "").order_by(versions.c.id)
    )
    for project_id, detector in {row[0]: row[1] for row in trained}.items():  # the last of each project
        options = connection.scalar(sa.select(projects.c.options).where(projects.c.id == project_id))
        if "detector" not in (options or {}):
            choice = {"detector": detector, "by": "upgrade", "reason": REASON, "device": ""}
            connection.execute(sa.update(projects).where(projects.c.id == project_id).values(detector=choice))
