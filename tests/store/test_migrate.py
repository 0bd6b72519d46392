"""The schema: made by steps, the same as the tables in code, also for databases from before the steps."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from setuptools import find_packages
from sqlalchemy import JSON, Column, DateTime, MetaData, create_engine, inspect, text

import ppal_backend.store
from ppal_backend.errors import StateError
from ppal_backend.store import Database, ModelVersion, Store
from ppal_backend.store.database import FIRST_SCHEMA, SCHEMA_VERSION, _use_write_ahead_log, migrate
from ppal_backend.store.tables import Base

ADDED_SINCE_THE_FIRST_RELEASE = {
    "projects": {
        "paused",
        "edits",
        "options_digest",
        "task_count",
        "hostname",
        "repairs",
        "title",
        "poll_failed",
        "next_poll_at",
        "poll_asked",
        "detector",
    },
    "events": {"attempts"},
    "rounds": {"edits"},
    "annotations": {"changed_at", "corrected"},
    "model_versions": {"wanted"},
}
REMOVED_SINCE_THE_FIRST_RELEASE = {"rounds": (Column("not_before", DateTime(), nullable=False),)}
SINCE_THE_DETECTOR_CHOICE = ("pins", "quotas", "approvals", "approval_batches", "dismissals")
SINCE_THE_DETECTOR_CHOICE_IN = (
    ("projects", "detector"), ("annotations", "changed_at"), ("annotations", "corrected"), ("model_versions", "wanted"),
)  # fmt: skip
NEW_TABLES = {"workers", "notes", "task_sides", *SINCE_THE_DETECTOR_CHOICE}


def revision(url):
    engine = create_engine(url)
    with engine.connect() as connection:
        found = connection.scalar(text("SELECT version_num FROM alembic_version"))
    engine.dispose()
    return found


def made_by_the_first_release(url):
    """A database as ``create_all`` of the first release left it, with a project and an event in it."""
    old = MetaData()
    for table in Base.metadata.sorted_tables:
        if table.name in NEW_TABLES:
            continue
        gone = ADDED_SINCE_THE_FIRST_RELEASE.get(table.name, set())
        copy = table.to_metadata(old)
        for name in gone:
            copy._columns.remove(copy.c[name])
        for column in REMOVED_SINCE_THE_FIRST_RELEASE.get(table.name, ()):
            copy.append_column(column._copy())
    engine = create_engine(url)
    old.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO projects (id, key, label_config, url, options, connected_at, polled_until, next_round, "
                "problems) VALUES (4, '4.1', '<View/>', 'http://ls', '{}', '2026-01-01 00:00:00', '', 3, '{}')"
            )
        )
        connection.execute(
            text(
                "INSERT INTO events (project_id, action, body, received_at, state, reason) "
                "VALUES (4, 'START_TRAINING', '{}', '2026-01-01 00:00:00', 'pending', '')"
            )
        )
    engine.dispose()


def other_default(_context, _found, column, found, _wanted, wanted):
    """Whether a column's default differs; None leaves it to alembic, whose question PostgreSQL refuses for JSON."""
    plain = [str(default).split("::")[0].strip("'") for default in (found, wanted)]
    return plain[0] != plain[1] if isinstance(column.type, JSON) else None


def test_the_steps_make_the_tables_that_the_code_has(database_url):
    database = Database(database_url)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": other_default})
        assert compare_metadata(context, Base.metadata) == []
        indexes = {i["name"]: i for i in inspect(connection).get_indexes("rounds")}
        assert indexes["one_running_round"]["unique"] and indexes["one_running_round"]["column_names"] == ["project_id"]
        assert context.get_current_revision() == SCHEMA_VERSION
    database.close()


def test_head_and_first_are_the_ends_of_the_steps_on_disk():
    config = Config()
    config.set_main_option("script_location", str(Path(ppal_backend.store.__file__).parent / "migrations"))
    steps = ScriptDirectory.from_config(config)
    assert (steps.get_heads(), steps.get_bases()) == ([SCHEMA_VERSION], [FIRST_SCHEMA])


def test_the_steps_are_packaged():
    root = Path(ppal_backend.store.__file__).parent.parent.parent
    packaged = set(find_packages(str(root), include=["ppal_backend*"]))
    for folder in (root / "ppal_backend" / "store" / "migrations", *steps_on_disk()):
        name = ".".join(folder.relative_to(root).parts)
        assert name in packaged, f"{name} would be missing from an installed package"


def steps_on_disk():
    """The folders that hold steps."""
    return {path.parent for path in (Path(ppal_backend.store.__file__).parent / "migrations").rglob("s0*.py")}


def test_a_database_from_before_the_steps_is_taken_over_with_its_content(tmp_path):
    url = f"sqlite:///{tmp_path}/old.db"
    made_by_the_first_release(url)
    store = Store(Database(url))
    assert store.projects.get(4).key == "4.1" and not store.projects.get(4).paused
    assert [e.action for e in store.events.pending(4)] == ["START_TRAINING"]
    assert store.rounds.request(4, "train", "x").number == 3
    with store.database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    store.close()
    assert revision(url) == SCHEMA_VERSION


def test_projects_that_have_trained_keep_their_detector_and_others_get_one_chosen(database_url):
    """The default was `retinanet_tiny`: an upgrade must not change what a project trains."""
    database = Database(database_url)
    store = Store(database)
    for project_id, options in ((1, {"budget": 5}), (2, {"detector": "fcos_r50"}), (3, {})):
        store.projects.connect(project_id, f"{project_id}.1", "<View/>", "http://ls", options)
    for project_id, detector, checkpoint in (
        (1, "fcos_tiny", "a.pth"), (1, "retinanet_tiny", "b.pth"), (1, "", ""), (2, "fcos_r50", "c.pth"), (3, "", ""),
    ):  # fmt: skip
        version = f"{project_id}-{checkpoint or detector or 'random'}"
        store.versions.activate(ModelVersion(project_id, version, 1, detector, checkpoint, (), None, {}))
    with database.transaction() as session:
        for table, column in SINCE_THE_DETECTOR_CHOICE_IN:
            session.execute(text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        for table in ("projects", "rounds"):
            session.execute(text(f"ALTER TABLE {table} ADD COLUMN changes INTEGER NOT NULL DEFAULT 0"))
        session.execute(text("ALTER TABLE rounds ADD COLUMN not_before TIMESTAMP"))
        for name in SINCE_THE_DETECTOR_CHOICE:
            session.execute(text(f"DROP TABLE {name}"))
        session.execute(text("UPDATE alembic_version SET version_num = '0006'"))
    migrate(database.engine)
    choices = {record.id: record.choice for record in store.projects.all()}
    assert (choices[1].detector, choices[1].by, choices[2], choices[3]) == ("retinanet_tiny", "upgrade", None, None)
    assert "from before detectors were chosen" in choices[1].reason
    store.close()


def test_opening_twice_changes_nothing_and_needs_no_alembic(tmp_path):
    url = f"sqlite:///{tmp_path}/ppal.db"
    Database(url).close()
    code = (
        "import sys; from ppal_backend.store import Database; Database(sys.argv[1]).close(); "
        "sys.exit(any(name.split('.')[0] == 'alembic' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code, url], check=False).returncode == 0


def test_a_database_of_a_newer_release_is_left_alone(tmp_path):
    url = f"sqlite:///{tmp_path}/ppal.db"
    database = Database(url)
    with database.transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(StateError, match="got 9999: a newer release") as refused:
        Database(url)
    assert refused.value and [path.name for path in tmp_path.iterdir()] == ["ppal.db"], "its connection is closed"
    assert revision(url) == "9999"


def test_a_step_that_fails_leaves_the_database_as_it_was(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/old.db"
    made_by_the_first_release(url)
    engine = create_engine(url)
    with engine.begin() as connection:  # the second column of the second step is there already: that step fails
        connection.execute(text("ALTER TABLE events ADD COLUMN attempts INTEGER"))
    with pytest.raises(Exception, match="duplicate column"):
        Database(url)
    with engine.connect() as connection:
        assert "paused" not in {c["name"] for c in inspect(connection).get_columns("projects")}
        assert not inspect(connection).has_table("alembic_version")
    engine.dispose()


def test_processes_that_start_together_make_one_database(tmp_path):
    url = f"sqlite:///{tmp_path}/ppal.db"
    code = "import sys; from ppal_backend.store import Database; sys.stdin.read(1); Database(sys.argv[1]).close()"
    children = [
        subprocess.Popen([sys.executable, "-c", code, url], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    for child in children:
        child.stdin.write(b"x")
        child.stdin.flush()
    errors = [child.communicate()[1].decode()[-300:] for child in children]
    assert [child.returncode for child in children] == [0] * 4, errors
    assert revision(url) == SCHEMA_VERSION


class Cursor:
    """Refuses a statement a few times, as SQLite does while another process switches the same database over."""

    def __init__(self, refusals, text="database is locked"):
        self.refusals, self.text, self.tried = refusals, text, 0

    def execute(self, statement):
        self.tried += 1
        if self.tried <= self.refusals:
            raise sqlite3.OperationalError(self.text)


def test_a_switch_to_the_write_ahead_log_that_is_refused_is_tried_again(monkeypatch):
    """SQLite does not wait for it: of processes that started together one now and then died (1 of 72)."""
    cursor = Cursor(refusals=3)
    _use_write_ahead_log(cursor)
    assert cursor.tried == 4
    with pytest.raises(sqlite3.OperationalError, match="disk"):
        _use_write_ahead_log(broken := Cursor(refusals=1, text="disk I/O error"))
    assert broken.tried == 1
    monkeypatch.setattr("ppal_backend.store.database.BUSY_TIMEOUT_S", 0.05)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        _use_write_ahead_log(Cursor(refusals=1000))


def test_sqlite_keeps_a_write_ahead_log(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/ppal.db")
    with database.reading() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
    database.close()
