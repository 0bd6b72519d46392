"""Brings a state database to the schema of this release, once, under a lock, all steps or none."""

from __future__ import annotations

import logging
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from ppal_backend.errors import NoState, StateError

log = logging.getLogger(__name__)

HEAD = "0004"
"""The newest step; a test holds it against the files in ``migrations/versions``."""

FIRST = "0001"
_MIGRATIONS = Path(__file__).parent / "migrations"
_TOO_NEW = (
    "expected a state database of schema {} or older, got {}: a newer release of ppal-backend has used it; install "
    "that release again, or restore a backup made by this one"
)
_LOCK = 7_705_361  # names our advisory lock in PostgreSQL; any number that nobody else uses there


def migrate(engine: Engine) -> None:
    """Make the tables of a new database, or take the missing steps in an older one.

    A database that a release without migrations made is taken for the first release's. Processes that start at
    the same time wait for each other. Alembic is only imported when there is something to do.

    Raises:
        StateError: a newer release has been at work on this database.
    """
    with engine.connect() as connection:
        connection = connection.execution_options(readonly=True)
        if _revision(connection) == HEAD:
            return
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        found = _revision(connection)
        if found != HEAD:
            _upgrade(connection, found)


def check_schema(engine: Engine) -> None:
    """See that a database is at the schema of this release, and change nothing.

    Raises:
        NoState: it holds no tables.
        StateError: it is at another schema.
    """
    with engine.connect() as connection:
        found = _revision(connection.execution_options(readonly=True))
    if found is None:
        raise NoState("expected the state of a backend in the database, got no tables")
    if found < HEAD:
        raise StateError(
            f"expected a state database of schema {HEAD}, got {found} of an older release; stop that release's service "
            "and worker, then run ppal migrate"
        )
    if found != HEAD:
        raise StateError(_TOO_NEW.format(HEAD, found))


def _revision(connection: Connection) -> str | None:
    """The step a database is at; None for a new one."""
    tables = set(inspect(connection).get_table_names())
    if "alembic_version" in tables:
        return connection.scalar(text("SELECT version_num FROM alembic_version"))
    return FIRST if "projects" in tables else None


def _upgrade(connection: Connection, found: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    known = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise StateError(_TOO_NEW.format(HEAD, found))
    if found is not None and not inspect(connection).has_table("alembic_version"):
        command.stamp(config, found)
    log.info("state database: schema %s is brought to %s", found or "(new)", HEAD)
    command.upgrade(config, "head")
