"""``ppal up --profile full``: everything on real servers, kept from start to start, and nothing left behind."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest
import requests
from rich.console import Console

from ppal_backend.errors import SettingsError, StateError
from ppal_backend.rig import full, servers
from ppal_backend.rig.full import keep, run_full
from ppal_backend.rig.servers import RedisServer
from tests.servers import postgresql, redis_server, wait_for

START_S = 560
CONFIG = ('<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
          '<Label value="cat"/></RectangleLabels></View>')  # fmt: skip


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_passwords_and_ports_are_chosen_once_and_for_the_owner_alone(tmp_path):
    first = keep(tmp_path)
    assert keep(tmp_path) == first and mode(tmp_path / "topology.json") == 0o600
    values = json.loads((tmp_path / "topology.json").read_text())
    assert len(set(values.values())) == len(values) == 10, "no two are the same"
    assert all(re.fullmatch("[0-9a-f]{32}", v) for k, v in values.items() if "pass" in k)
    (tmp_path / "topology.json").write_text("{}")
    with pytest.raises(StateError, match=r"expected ports and passwords in .*take another folder"):
        keep(tmp_path)


def test_a_folder_serves_one_at_a_time(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with full._alone(tmp_path), pytest.raises(StateError, match="got one in use by another ppal up"):
            run_full(tmp_path, Console(quiet=True))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_missing_servers_are_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SettingsError, match="apt-get install redis-server"):
        RedisServer(tmp_path, 1, "x", tmp_path / "log")
    monkeypatch.setattr(servers, "Path", lambda name: tmp_path)
    with pytest.raises(SettingsError, match="apt-get install postgresql"):
        servers.find_initdb()


@pytest.mark.servers
def test_postgresql_asks_for_the_password_and_makes_a_database_once():
    with postgresql() as dsn:
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(f"{dsn}/postgres".replace(":test@", ":wrong@"))
        host, port = re.search(r"@([\d.]+):(\d+)", dsn).groups()
        server = servers.PostgresServer(Path("/nowhere"), int(port), "test", Path("/dev/null"))
        for password in ("one", "two"):  # a changed password is taken over
            url = server.ensure_database("ppal", "ppal", password)
            assert url == f"postgresql://ppal:{password}@{host}:{port}/ppal"
            with psycopg.connect(url) as connection:
                connection.execute("CREATE TABLE IF NOT EXISTS t (i int)")


@pytest.mark.servers
def test_a_server_that_cannot_start_says_so_in_its_own_words(tmp_path):
    with redis_server() as (url, _):
        taken = int(url.rsplit(":", 1)[1].split("/")[0])
        second = RedisServer(tmp_path / "redis", taken, "other", tmp_path / "log")
        with pytest.raises(StateError, match=r"(?s)expected Redis to run, got an end of it.*Address already in use"):
            second.start()


@pytest.mark.servers
def test_a_killed_redis_comes_back(tmp_path):
    import redis

    with redis_server() as (url, server):
        with pytest.raises(redis.AuthenticationError):
            redis.Redis.from_url(url.replace(":test@", "")).ping()
        server.kill()
        server.start()
        assert redis.Redis.from_url(url).ping()


@contextmanager
def running(folder):
    """``ppal up --profile full``; its process, when everything answers."""
    with (folder.parent / "up.log").open("ab") as log:
        up = subprocess.Popen(
            [sys.executable, "-m", "ppal_backend.cli", "up", "--profile", "full", "--folder", str(folder)],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: up.poll() is not None or answers(folder, up.pid), "everything answers", START_S)
        assert up.poll() is None, (folder.parent / "up.log").read_text()[-3000:]
        yield up
    finally:
        if up.poll() is None:
            up.kill()
            up.wait()


def variables(folder):
    return dict(line.rstrip("\n").split("=", 1) for line in (folder / "backend.env").open())


def answers(folder, pid):
    workers = [p for p in psutil.Process(pid).children() if p.cmdline()[-1] == "worker"]
    return len(workers) == 2 and requests.get(variables(folder)["PPAL_PUBLIC_URL"] + "/health", timeout=5).ok


def ppal(folder, *words):
    environment = {**os.environ, **variables(folder)}
    done = subprocess.run([sys.executable, "-m", "ppal_backend.cli", *words, "--json"], env=environment, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.servers
def test_the_whole_topology():
    """Starts, connects a project, stops, goes on with the same state, and dies with its parent."""
    root = Path(tempfile.mkdtemp(prefix="ppal-full-"))
    root.chmod(0o755)  # PostgreSQL's own user has to come through
    folder = root / "run"
    try:
        with running(folder) as up:
            env = variables(folder)
            assert mode(folder / "backend.env") == 0o600
            from ppal_backend.rig.session import LabelStudioSession

            session = LabelStudioSession(env["LABEL_STUDIO_URL"], env["LABEL_STUDIO_API_KEY"])
            project = session.post("/api/projects/", json={"title": "kept", "label_config": CONFIG})["id"]
            words = ("connect", env["LABEL_STUDIO_URL"], "--project", str(project))
            first = {row["what"]: row["done"] for row in ppal(folder, *words, "--extra-params", '{"budget": 7}')}
            assert (first["connection"], first["webhook"], first["sampling"]) == ("made", "changed", "changed")
            again = {row["what"]: row["done"] for row in ppal(folder, *words)}
            assert set(again.values()) == {"kept"}, "the second time changes nothing"
            (hook,) = session.get("/api/webhooks/", params={"project": project})
            assert hook["url"] == env["PPAL_PUBLIC_URL"] + "/webhook" and "Authorization" in hook["headers"]
            refused = requests.get(env["PPAL_PUBLIC_URL"] + "/ui", timeout=10)
            assert refused.status_code == 401, "the passwords are asked for"
            with psycopg.connect(env["PPAL_DATABASE_URL"]) as state:
                assert state.execute("SELECT id FROM projects").fetchall() == [(project,)]
            told = {row["name"]: row["value"] for row in ppal(folder, "settings", str(project))["projects"]}
            assert told["budget"] == "7"
            family = psutil.Process(up.pid).children(recursive=True)
            names = {p.name() for p in family}
            assert {"postgres", "redis-server"} <= names and len(family) >= 8
            up.send_signal(signal.SIGINT)
            assert up.wait(120) == 0
            wait_for(lambda: not [p for p in family if p.is_running()], "nothing is left", 10)
        with running(folder) as up:
            now = variables(folder)
            assert {k: v for k, v in now.items() if k != "LABEL_STUDIO_API_KEY"} == {
                k: v for k, v in env.items() if k != "LABEL_STUDIO_API_KEY"
            }
            assert ppal(folder, "status")[0]["project"] == project
            family = psutil.Process(up.pid).children(recursive=True)
            up.kill()
            up.wait()
            wait_for(lambda: not [p for p in family if p.is_running()], "nothing outlives its parent", 90)
    finally:
        shutil.rmtree(root, ignore_errors=True)
