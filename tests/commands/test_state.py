"""Commands in a folder without state, beside a backend that runs elsewhere, and where they may not write."""

import json
import os
import shlex
import sqlite3

import pytest
from sqlalchemy import create_engine, inspect

from ppal_backend.settings import load_settings
from ppal_backend.store import Lease, announce, open_store
from ppal_backend.store.database import SCHEMA_VERSION
from tests.store.test_migrate import made_by_the_first_release, revision

OF_A_PROJECT = ["status 8", "versions 8", "export 8 --out x", "export-model 8 --out x", "settings 8", "prune 8",
                "prune 8 --dry-run", "round 8", "rollback 8 v", "cancel 8", "pause 8", "resume 8"]  # fmt: skip
OF_ALL = ["status", "prune", "backup b.tar", "worker --alive"]
WITHOUT_STATE = ["settings", "zoo list", "zoo show retinanet_tiny", "restore gone.tar"]


@pytest.fixture
def run(run, tmp_path, monkeypatch):
    """A command in the folder ``here``, with the default ``MODEL_DIR``."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("MODEL_DIR", raising=False)
    return lambda words: run(*shlex.split(words))


def backend_in(folder):
    """A backend runs with this data folder: this very process."""
    settings = load_settings(MODEL_DIR=folder)
    store = open_store(settings)
    store.projects.connect(8, "8.1", "<View/>", "http://ls.test", {})
    announce(settings, "up")
    return store


@pytest.mark.parametrize("words", [*OF_A_PROJECT, *OF_ALL, *WITHOUT_STATE, "doctor"])
def test_no_command_makes_state_where_there_is_none(run, tmp_path, words):
    done = run(words)
    assert list((tmp_path / "here").iterdir()) == []
    assert "Traceback" not in done.output and not isinstance(done.exception, OSError)


@pytest.mark.parametrize("words", [*OF_A_PROJECT, *OF_ALL])
def test_the_folder_that_was_looked_in_is_told(run, tmp_path, words):
    done = run(words)
    whom = "project 8 is not connected" if " 8" in words else "no project is connected"
    assert done.exit_code == 1 and done.stdout == ""
    assert whom in done.stderr and str(tmp_path / "here" / "ppal-data") in done.stderr
    assert "MODEL_DIR" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("words", ["status 8", "settings 8", "prune", "pause 8"])
def test_the_state_of_the_running_backend_is_told_and_the_advice_works(run, tmp_path, monkeypatch, words):
    store = backend_in(tmp_path / "there")
    told = run(words)
    advice = f"MODEL_DIR={tmp_path / 'there'}"
    assert told.exit_code == 1 and f"set {advice}" in told.stderr
    monkeypatch.setenv(*advice.split("="))
    done = run(words)
    assert done.exit_code == 0 and "MODEL_DIR=" not in done.stderr
    store.close()


def test_doctor_tells_both_too(run, tmp_path):
    store = backend_in(tmp_path / "there")
    findings = {f["check"]: f for f in json.loads(run("doctor --json").stdout)}
    assert findings["state"]["state"] == "failed"
    assert str(tmp_path / "here" / "ppal-data") in findings["state"]["seen"]
    assert f"MODEL_DIR={tmp_path / 'there'}" in findings["state"]["advice"]
    store.close()


def test_an_empty_state_left_behind_does_not_hide_the_running_backend(run, tmp_path):
    open_store(load_settings(MODEL_DIR="ppal-data")).close()
    store = backend_in(tmp_path / "there")
    done = run("status --json")
    assert json.loads(done.stdout) == [] and done.exit_code == 0
    assert str(tmp_path / "here" / "ppal-data") in done.stderr and f"MODEL_DIR={tmp_path / 'there'}" in done.stderr
    store.close()


def test_a_backend_that_has_ended_is_not_told(run, tmp_path):
    settings = load_settings(MODEL_DIR=tmp_path / "there")
    announce(settings, "up", Lease(Lease.mine().host, os.getpid(), 1.0))
    assert "there" not in run("status").stderr


def test_a_cache_that_cannot_be_written_keeps_no_backend_from_starting(run, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    announce(load_settings(MODEL_DIR=tmp_path / "there"), "worker")
    assert run("status").exit_code == 1


@pytest.mark.parametrize("url", ["postgresql://ppal:hidden-word@db.test/ppal",
                                 "postgresql://db.test/ppal?user=ppal&password=hidden-word"])  # fmt: skip
def test_a_password_of_the_database_is_not_announced(run, tmp_path, url):
    announce(load_settings(MODEL_DIR=tmp_path / "there", database_url=url), "up")
    assert "PPAL_DATABASE_URL" in run("status").stderr
    assert "hidden-word" not in "".join(p.read_text() for p in (tmp_path / "cache").rglob("*.json"))


def test_only_migrate_changes_the_schema(run, tmp_path):
    """Its advice is what brings the state up to date."""
    url = f"sqlite:///{tmp_path / 'here' / 'ppal-data' / 'ppal.db'}"
    (tmp_path / "here" / "ppal-data").mkdir()
    made_by_the_first_release(url)
    tables = set(inspect(create_engine(url)).get_table_names())
    done = run("status")
    assert (
        done.exit_code == 1 and "then run ppal migrate" in done.stderr and f"of schema {SCHEMA_VERSION}" in done.stderr
    )
    assert set(inspect(create_engine(url)).get_table_names()) == tables
    assert run("migrate").exit_code == 0 and revision(url) == SCHEMA_VERSION
    assert run("status").exit_code == 0


@pytest.mark.parametrize("words", ["status", "backup b.tar", "migrate", "doctor --json"])
def test_a_damaged_database_is_told_and_restoring_a_backup_helps(run, tmp_path, words):
    backend_in(tmp_path / "here/ppal-data").close()
    assert run("backup good.tar").exit_code == 0
    (tmp_path / "here/ppal-data/ppal.db").write_bytes(b"no database " * 999)
    done = run(words)
    assert done.exit_code == 1 and "ppal restore FILE --force" in done.output
    if "doctor" in words:
        findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
        assert findings["state"]["state"] == "failed" and "ppal restore" in findings["state"]["advice"]
    else:
        assert len(done.stderr.strip().splitlines()) == 1
    restored = run("restore good.tar --force")
    assert restored.exit_code == 0 and "cannot tell whether a round is running" in restored.stderr
    assert run("status 8").exit_code == 0


@pytest.mark.parametrize("words", ["status", "pause 8", "backup b.tar", "migrate", "up", "doctor --json"])
def test_a_database_that_this_user_may_not_use_is_told_with_what_helps(run, tmp_path, monkeypatch, words):
    backend_in("ppal-data").close()
    connect = sqlite3.dbapi2.connect

    def forbidden(database, *arguments, **options):
        if "ppal.db" in str(database):
            raise sqlite3.OperationalError("attempt to write a readonly database")
        return connect(database, *arguments, **options)

    monkeypatch.setattr("sqlite3.dbapi2.connect", forbidden)
    monkeypatch.setattr("ppal_backend.launcher.up", lambda: pytest.fail("started all the same"))
    done = run(words)
    assert done.exit_code == 1 and "let this user write to the file and to its folder" in done.output
    if words.startswith("doctor"):
        findings = {f["check"]: f["state"] for f in json.loads(done.stdout)}
        assert findings["database"] == "failed" and "worker" not in findings
    else:
        assert len(done.stderr.strip().splitlines()) == 1


NO_FOLDER = [
    "backup file/b.tar",
    "demo-data file/set --images 1",
    "simulate --preset smoke --out file/sim",
    "demo --exit --out file/demo",
    "up --profile full --folder file/full",
    "report sim --out file/report",
    "rank --data pool.json --checkpoint x.pth --budget 1 --out file/ranking",
    "export-model --checkpoint x.pth --detector retinanet_tiny --out file/m.onnx",
]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("words", NO_FOLDER)
def test_a_folder_that_cannot_be_made_is_one_line(run, tmp_path, words, as_json):
    (tmp_path / "here" / "file").write_text("no folder")
    backend_in("ppal-data").close()
    json_too = as_json and not words.startswith("up")
    done = run(words + (" --json" if json_too else ""))
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), repr(done.exception)
    if json_too:
        assert set(json.loads(done.stdout)) == {"error", "kind"}
    else:
        assert done.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("words", ["migrate", "worker", "serve", "up", "restore b.tar", "status", "prune"])
def test_a_data_folder_that_cannot_be_made_is_one_line(run, tmp_path, monkeypatch, words):
    backend_in("ppal-data").close()
    assert run("backup b.tar").exit_code == 0
    (tmp_path / "here" / "file").write_text("no folder")
    monkeypatch.setenv("MODEL_DIR", "file/data")
    for name in ("launcher.up", "launcher.serve", "worker.worker.run_worker"):
        monkeypatch.setattr(f"ppal_backend.{name}", lambda *_, **__: pytest.fail("started all the same"))
    done = run(words)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), repr(done.exception)
    told = done.stderr.strip()
    assert told.startswith("error: ") and len(told.splitlines()) == 1 and "file" in told
