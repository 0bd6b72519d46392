"""The job queue: two huey queues, one for quick work and one for rounds, in a SQLite file, on Redis or in PostgreSQL.

Jobs carry a project id and nothing else. What is to be done stands in the store, so a job that is lost,
doubled or late changes nothing: the worker's tick finds what is due. A job for a round says no more than that there is
one to run: the worker takes the one that was asked for first, so that no project waits for the jobs of another.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huey import Huey, PostgresHuey, RedisHuey, SqliteHuey
from huey.consumer import Consumer

from ppal_backend.errors import QueueUnavailable, SettingsError
from ppal_backend.settings import Settings
from ppal_backend.store.database import postgres_options

POLL_DELAY_S = 0.2
SOCKET_TIMEOUT_S = 10.0
REPEAT_ERRORS_S = 30.0
MOST_SYNCS, MOST_ROUNDS = 1000, 100  # beyond, a job adds nothing: what is due stands in the store
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
POSTGRES_SCHEMES = ("postgresql://", "postgres://")
SCHEMA = "ppal_jobs"
_LOCK = 7_705_362  # names our advisory lock in PostgreSQL; any number that nobody else uses there
_EXPECTED = "expected PPAL_QUEUE_URL such as redis://host:6379/0 or postgresql://user:password@host/name"
Handler = Callable[[int], None]


def open_queue(settings: Settings, on_sync: Handler | None = None, on_round: Handler | None = None) -> JobQueue:
    """The job queue that the settings name."""
    return JobQueue(settings.queue_url.get_secret_value() or settings.jobs_file, on_sync, on_round)


class JobQueue:
    """Enqueues jobs and, in the worker, runs them.

    Args:
        place: the queue's SQLite file (made when missing), or a Redis as ``redis://host:port/number``, or a
            PostgreSQL as ``postgresql://user:password@host/name``.
        on_sync: handles a project's events and decides on a round (worker only).
        on_round: runs the next round (worker only).

    Raises:
        SettingsError: ``place`` is another kind of address, or its driver is not installed.
        QueueUnavailable: the file is damaged.
    """

    def __init__(self, place: Path | str, on_sync: Handler | None = None, on_round: Handler | None = None) -> None:
        self._light, self._rounds = _huey("light", place), _huey("rounds", place)
        self._sync: Callable[[int], object] = self._light.task(name="sync")(_named(on_sync, "sync"))
        self._round: Callable[[int], object] = self._rounds.task(name="run_round")(_named(on_round, "run_round"))

    def sync(self, project_id: int, /) -> None:
        """Enqueue: handle the project's events, poll it, decide on a round.

        This and the following ones raise:
            QueueUnavailable: the queue does not answer; nothing is lost, the worker's tick finds what is due.
        """
        with _translate_errors():
            if self._light.pending_count() < MOST_SYNCS:
                self._sync(project_id)

    def run_round(self, project_id: int) -> None:
        """Enqueue the project's next round, unless rounds are waiting anyway (the tick comes back)."""
        with _translate_errors():
            if self._rounds.pending_count() < MOST_ROUNDS:
                self._round(project_id)

    def pending(self) -> int:
        """Jobs that wait."""
        with _translate_errors():
            return int(self._light.pending_count() + self._rounds.pending_count())

    def consumers(self, parallel_rounds: int = 1) -> list[Consumer]:
        """Consumers to ``start()`` in the worker: quick work never waits behind a round."""
        for name in ("huey.consumer.Worker", "huey.consumer.Scheduler"):
            logger = logging.getLogger(name)
            if not any(isinstance(known, _NowAndThen) for known in logger.filters):
                logger.addFilter(_NowAndThen())
        return [
            self._consumer(self._light, 1),
            self._consumer(self._rounds, parallel_rounds),
        ]

    @staticmethod
    def _consumer(huey: Huey, workers: int) -> Consumer:
        return huey.create_consumer(
            workers=workers, periodic=False, initial_delay=POLL_DELAY_S, max_delay=POLL_DELAY_S, backoff=1.0
        )


class _NowAndThen(logging.Filter):
    """Lets "Error reading …" of a consumer through once a while, as one line: while the queue is away each thread meets
    it several times a second."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.startswith("Error reading"):
            return True
        with self._lock:
            if time.monotonic() < self._next.get(message, 0.0):
                return False
            self._next[message] = time.monotonic() + REPEAT_ERRORS_S
        if record.exc_info:
            record.msg, record.args, record.exc_info = f"{message}: {record.exc_info[1]}", (), None
        return True


def _huey(name: str, place: Path | str) -> Huey:
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        with _translate_errors():
            return SqliteHuey(name, filename=str(place), results=False, timeout=30)
    if place.startswith(POSTGRES_SCHEMES):
        return _postgres(name, place)
    if not place.startswith(REDIS_SCHEMES):
        raise SettingsError(f"{_EXPECTED}, got an address of another kind")
    try:
        from redis import ConnectionPool
    except ImportError:
        raise SettingsError("PPAL_QUEUE_URL needs the package redis; install ppal-backend[redis]") from None
    try:
        pool = ConnectionPool.from_url(place, socket_timeout=SOCKET_TIMEOUT_S, socket_connect_timeout=SOCKET_TIMEOUT_S)
    except ValueError as error:
        raise SettingsError(f"{_EXPECTED}: {error}") from None
    return RedisHuey(f"ppal_{name}", connection_pool=pool, results=False)


def _postgres(name: str, url: str) -> Huey:
    """A queue whose tables lie in a schema of their own, so that it may share a database with the state. They are made
    with each new connection where they are missing; processes that do so at the same time wait for each other."""
    try:
        import psycopg
        from psycopg.conninfo import conninfo_to_dict
    except ImportError:
        raise SettingsError("PPAL_QUEUE_URL needs psycopg; install ppal-backend[postgres]") from None

    def connect() -> psycopg.Connection:
        address = "postgresql://" + url.split("://", 1)[1]
        connection = psycopg.connect(
            address,
            autocommit=True,
            options=f"-c search_path={SCHEMA}",
            **postgres_options(conninfo_to_dict(address)),
        )
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
            for statement in huey.storage.ddl:
                connection.execute(statement)
        return connection

    huey = PostgresHuey(name, connection=connect, create_tables=False, results=False)
    return huey


@contextmanager
def _translate_errors() -> Iterator[None]:
    try:
        yield
    except _driver_errors() as error:
        raise QueueUnavailable(
            f"the job queue does not answer ({type(error).__name__}: {error}); check Redis, PostgreSQL or the disk, "
            "or delete a damaged jobs.db: it holds nothing but wake-up calls"
        ) from error


def _driver_errors() -> tuple[type[Exception], ...]:
    kinds: list[type[Exception]] = [sqlite3.Error]
    with suppress(ImportError):
        from redis.exceptions import RedisError

        kinds.append(RedisError)
    with suppress(ImportError):
        from psycopg import Error as PostgresError

        kinds.append(PostgresError)
    return tuple(kinds)


def _named(handler: Handler | None, name: str) -> Handler:
    def run(project_id: int) -> None:
        if handler is None:
            raise RuntimeError(f"job {name!r} was taken by a process that only enqueues; start a worker")
        handler(project_id)

    run.__name__ = name
    return run
