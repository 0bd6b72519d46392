"""Real PostgreSQL and Redis servers for tests, on free ports, from the system's packages."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import time
from pathlib import Path

import pytest

from ppal_backend.errors import SettingsError
from ppal_backend.rig.servers import PostgresServer, RedisServer

START_S = 180.0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, what="the condition holds", timeout_s=START_S, every_s=0.05):
    """Until ``condition()`` holds; exceptions it raises count as not yet, and the last is told if it never does."""
    end = time.monotonic() + timeout_s
    while True:
        error = None
        try:
            if condition():
                return
        except Exception as raised:  # noqa: BLE001
            error = raised
        if time.monotonic() >= end:
            raise AssertionError(f"waited {timeout_s:.0f} s in vain: {what}") from error
        time.sleep(every_s)


@contextlib.contextmanager
def postgresql():
    """The URL of an empty PostgreSQL server; skips the test where it is not installed."""
    folder = Path(tempfile.mkdtemp(prefix="ppal-pg-"))
    log = folder.with_suffix(".log")
    try:
        folder.chmod(0o755)
        server = _installed(lambda: PostgresServer(folder / "pg", free_port(), "test", log, durable=False))
        server.start()
        try:
            yield server.url("").rstrip("/")
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink(missing_ok=True)


def new_database(dsn, name, options=""):
    """The URL of a fresh database on the server."""
    import psycopg

    with psycopg.connect(f"{dsn}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" {options}')
    return f"{dsn}/{name}"


@contextlib.contextmanager
def redis_server():
    """A Redis without persistence as ``(url, Server)``; skips the test where it is not installed."""
    with tempfile.TemporaryDirectory(prefix="ppal-redis-") as name:
        folder = Path(name)
        server = _installed(lambda: RedisServer(folder, free_port(), "test", folder / "log", durable=False))
        server.start()
        try:
            yield server.url, server
        finally:
            server.stop()


def _installed(make):
    try:
        return make()
    except SettingsError as missing:
        pytest.skip(str(missing))
