"""PostgreSQL and Redis of the system as child processes: started, waited for, stopped, gone with their parent."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ppal_backend.errors import SettingsError, StateError
from ppal_backend.launcher import dies_with_parent

START_S = 60.0
STOP_S = 30.0


class Server:
    """A server process. ``start`` after ``stop`` or ``kill`` brings it back on the same port and data.

    Args:
        name: for messages.
        command: its command line.
        log: file for what it prints, appended to.
        ready: whether it answers.
        user: runs as this user and group; as ours without.
        stop_with: the signal that ends it in good order.
        config: what it reads from standard input.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        ready: Callable[[], bool],
        *,
        user: str | None = None,
        stop_with: signal.Signals = signal.SIGTERM,
        config: str = "",
    ) -> None:
        self._name, self._command, self._log, self._ready = name, list(command), log, ready
        self._user, self._stop_with, self._config = user, stop_with, config
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            StateError: it ended or did not answer in time; the text ends with its log.
        """
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd="/", user=self._user,
                group=self._user, extra_groups=[] if self._user else None, start_new_session=True,
                preexec_fn=dies_with_parent(self._stop_with),
            )  # fmt: skip
        assert self.process.stdin is not None
        with self.process.stdin as stdin:
            stdin.write(self._config.encode())
        end = time.monotonic() + START_S
        while not self._ready():
            if self.process.poll() is not None:
                raise StateError(f"expected {self._name} to run, got an end of it\n{self._tail()}")
            if time.monotonic() > end:
                raise StateError(f"expected {self._name} within {START_S:.0f} s, got no answer\n{self._tail()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """End it in good order; does nothing when it is not running."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(self._stop_with)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-10:])


ADMIN = "admin"
_SYSTEM_USER = "postgres"  # PostgreSQL refuses to run as root


class PostgresServer(Server):
    """PostgreSQL on the loopback address, with a password for everybody.

    Args:
        folder: for its data, made when missing; the system user ``postgres`` must be able to reach it when we are root.
        port: to listen on.
        password: of its superuser ``admin``.
        log: file for what it prints.
        durable: False for tests: a crash of the machine may lose data, and it is faster.

    Raises:
        SettingsError: it is not installed.
    """

    def __init__(self, folder: Path, port: int, password: str, log: Path, durable: bool = True) -> None:
        self._folder, self._port, self._password, self._initdb = folder, port, password, find_initdb()
        self._owner = _SYSTEM_USER if os.geteuid() == 0 else None
        command = [str(self._initdb.with_name("postgres")), "-D", str(folder / "data"), "-p", str(port),
                   "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=",
                   *(() if durable else ("-c", "fsync=off"))]  # fmt: skip
        super().__init__("PostgreSQL", command, log, self._answers, user=self._owner, stop_with=signal.SIGINT)

    def start(self) -> None:
        """Make the data folder unless there is one, start, and wait until it answers.

        Raises:
            StateError: it cannot be set up or started; the text has its own words.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._owner is not None:
            user = pwd.getpwnam(self._owner)
            os.chown(self._folder, user.pw_uid, user.pw_gid)
        if not (self._folder / "data" / "PG_VERSION").is_file():
            self._make()
        super().start()

    def url(self, database: str, user: str = ADMIN, password: str | None = None) -> str:
        """Address of a database, with credentials."""
        return f"postgresql://{user}:{password or self._password}@127.0.0.1:{self._port}/{database}"

    def ensure_database(self, name: str, user: str, password: str) -> str:
        """The address of a database and its owner, made where they are missing."""
        import psycopg
        from psycopg import sql

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            owner, database = sql.Identifier(user), sql.Identifier(name)
            if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (user,)).fetchone():
                connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(owner))
            connection.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(owner, sql.Literal(password)))
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone():
                connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(database, owner))
        return self.url(name, user, password)

    def _make(self) -> None:
        """Run initdb beside the place and move the result there, so that a half-made one is never taken for whole."""
        data, password = self._folder / "data", self._folder / "password"
        fresh = self._folder / "data.part"
        shutil.rmtree(fresh, ignore_errors=True)
        password.touch(mode=0o600)
        password.write_text(self._password)
        if self._owner is not None:
            os.chown(password, pwd.getpwnam(self._owner).pw_uid, -1)
        options = ["-A", "scram-sha-256", "-U", ADMIN, "--pwfile", str(password), "--no-sync", "-E", "UTF8",
                   "--locale=C.UTF-8"]  # fmt: skip
        done = subprocess.run(
            [str(self._initdb), "-D", str(fresh), *options], capture_output=True, text=True, check=False, cwd="/",
            user=self._owner, group=self._owner, extra_groups=[] if self._owner else None,
        )  # fmt: skip
        password.unlink()
        if done.returncode:
            raise StateError(
                f"expected initdb to make {data}, got: {done.stderr.strip()[-500:]}; the user "
                f"{self._owner or 'running this'} must be able to reach that folder, so choose another one"
            )
        fresh.rename(data)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


def find_initdb() -> Path:
    """PostgreSQL's ``initdb`` of the newest installed version.

    Raises:
        SettingsError: it is not installed.
    """
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = str(versions[-1]) if versions else shutil.which("initdb")
    if found is None:
        raise SettingsError("expected PostgreSQL, got none; install it (Debian: apt-get install postgresql)")
    return Path(found)


class RedisServer(Server):
    """Redis on the loopback address, with a password.

    Args:
        folder: for its data, made when missing.
        port: to listen on.
        password: for everybody.
        log: file for what it prints.
        durable: False for tests: nothing is written to disk.

    Raises:
        SettingsError: it is not installed.
    """

    def __init__(self, folder: Path, port: int, password: str, log: Path, durable: bool = True) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            raise SettingsError("expected Redis, got none; install it (Debian: apt-get install redis-server)")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.url = f"redis://:{password}@127.0.0.1:{port}/0"
        lines = ("bind 127.0.0.1", f"port {port}", f"requirepass {password}", f'dir "{folder}"', 'save ""',
                 f"appendonly {'yes' if durable else 'no'}")  # fmt: skip
        super().__init__("Redis", [binary, "-"], log, self._answers, config="\n".join(lines) + "\n")

    def _answers(self) -> bool:
        import redis

        client = redis.Redis.from_url(self.url, socket_connect_timeout=5)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()
