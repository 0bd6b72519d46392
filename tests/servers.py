"""Real PostgreSQL and Redis servers for tests, on free ports, from the system's packages."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

START_S = 60.0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, what, timeout_s=START_S):
    """Until ``condition()`` holds; exceptions it raises count as not yet."""
    end = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(Exception):
            if condition():
                return
        assert time.monotonic() < end, f"waited {timeout_s:.0f} s in vain: {what}"
        time.sleep(0.05)


class Server:
    """A server process; ``kill`` is kill -9, ``start`` brings it back on the same port and data."""

    def __init__(self, command, user=None, log=None):
        self.command, self.user, self.log, self.process = command, user, log, None

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, user=self.user)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


@contextlib.contextmanager
def postgresql():
    """The URL of an empty PostgreSQL server; skips the test where it is not installed."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = str(binaries[-1]) if binaries else shutil.which("initdb")
    if initdb is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="ppal-pg-"))
    if user:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    port, data = free_port(), folder / "data"
    options = ["-A", "trust", "-U", "ppal", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8"]
    subprocess.run([initdb, "-D", data, *options], check=True, capture_output=True, user=user, cwd="/")
    command = [Path(initdb).with_name("postgres"), "-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1",
               "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]  # fmt: skip
    server = Server(command, user, folder.with_suffix(".log"))
    server.start()
    try:
        import psycopg

        dsn = f"postgresql://ppal@127.0.0.1:{port}"
        wait_for(lambda: psycopg.connect(f"{dsn}/postgres").close() is None, "PostgreSQL accepts connections")
        yield dsn
    finally:
        server.process.send_signal(2)  # fast shutdown
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".log").unlink(missing_ok=True)


def new_database(dsn, name):
    """The URL of a fresh database on the server."""
    import psycopg

    with psycopg.connect(f"{dsn}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"{dsn}/{name}"


@contextlib.contextmanager
def redis_server():
    """A Redis without persistence as ``(url, Server)``; skips the test where it is not installed."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("Redis is not installed (Debian: apt-get install redis-server)")
    import redis

    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ppal-redis-") as folder:
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
                   "--dir", folder]  # fmt: skip
        server = Server(command, log=Path(folder) / "log")
        server.start()
        url = f"redis://127.0.0.1:{port}/0"
        try:
            wait_for(lambda: redis.Redis.from_url(url).ping(), "Redis answers")
            yield url, server
        finally:
            server.stop()
