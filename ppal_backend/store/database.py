"""The state database, brought to the schema of this release once: one engine, short transactions; SQLite in WAL mode so
that readers never wait for a writer."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, StaticPool, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as NoConnectionLeft
from sqlalchemy.orm import Session, sessionmaker

from ppal_backend.errors import NoState, SettingsError, StateError, StoreUnavailable
from ppal_backend.settings import is_password
from ppal_backend.store.tables import now

__all__ = ["Database", "IntegrityError", "postgres_options", "repeat_on_conflict"]

log = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 30.0
POSTGRES_WAIT_S = 10
SCHEMA_VERSION = "0013"
"""The newest step; a test holds it against the files in ``migrations/versions``."""

FIRST_SCHEMA = "0001"
_MIGRATIONS = Path(__file__).parent / "migrations"
_TOO_NEW = (
    "expected a state database of schema {} or older, got {}: a newer release of ppal-backend has used it; install "
    "that release again, or restore a backup made by this one"
)
_MIGRATION_LOCK = 7_705_361  # names our advisory lock in PostgreSQL; any number that nobody else uses there
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_FORBIDDEN = ("readonly database", "unable to open database file")
_ALLOW = (
    f"let this user write to the file and to its folder (one mounted into a container: chown -R {os.geteuid()} it, on "
    "the host), or run as the user whose backend it is"
)
_WAIT = "it is tried again, check that it is up and that its disk is not full"


class Database:
    """The state database behind a SQLAlchemy URL, at the schema of this release.

    Args:
        url: ``sqlite:///FILE``, ``sqlite://`` (in memory, for one process) or ``postgresql://…``.
        busy_timeout_s: how long a writer waits for another one under SQLite.
        create: make the database, or bring it to this release's schema; else it must be there and of this schema.
        any_schema: without ``create``, it may be of another one: for what every release's tables have.

    Raises:
        SettingsError: the URL is none, or its driver is not installed.
        StoreUnavailable: the database does not answer, or is locked.
        StateError: it is damaged, a newer release has used it, or without ``create`` an older one.
        NoState: without ``create``, there is none.
    """

    def __init__(
        self, url: str, busy_timeout_s: float = BUSY_TIMEOUT_S, create: bool = True, *, any_schema: bool = False
    ) -> None:
        parsed = _parsed(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self.name = shown_address(parsed)
        in_memory = self.is_sqlite and parsed.database in (None, "", ":memory:")
        if self.is_sqlite and not in_memory:
            file = Path(str(parsed.database))
            if create:
                file.parent.mkdir(parents=True, exist_ok=True)
            elif not file.is_file():
                raise NoState(f"expected the state of a backend in {file.parent}, got no {file.name} in it")
        self.engine = _engine(parsed, self.is_sqlite, in_memory, busy_timeout_s)
        # In memory there is one connection for all threads: they take turns.
        self._turn: AbstractContextManager[Any] = threading.RLock() if in_memory else nullcontext()
        try:
            with self._translate_errors():
                migrate(self.engine) if create else check_schema(self.engine, any_schema)
        except BaseException:
            self.engine.dispose()  # else SQLite's log stays beside the file
            raise
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        self._open = threading.local()  # the transaction that this thread is in

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session that commits at the end of the block, or rolls back when it raises.

        Within another transaction of the same thread it is a part of that one: what it wrote is undone when it
        raises, and stored when the outer block ends well.

        Raises:
            StoreUnavailable: the database is locked, full or down; nothing of the block is stored.
        """
        outer: Session | None = getattr(self._open, "session", None)
        if outer is not None:
            with self._translate_errors(), outer.begin_nested():
                yield outer
            return
        with self._translate_errors(), self._turn, self._sessions.begin() as session:
            self._open.session = session
            try:
                yield session
            finally:
                self._open.session = None

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session for reads only: under SQLite it sees one snapshot and waits for no writer. Within a transaction of
        the same thread it sees what that one wrote.

        Raises:
            StoreUnavailable: the database is locked or down.
        """
        outer: Session | None = getattr(self._open, "session", None)
        if outer is not None:
            with self._translate_errors():
                yield outer
            return
        with self._translate_errors(), self._turn, self._sessions() as session:
            session.connection(execution_options={"readonly": True})
            yield session

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction as in :meth:`transaction`, without a session around it, which costs three times as much: for
        what comes by the hundred a second. Not to be used within another transaction of the same thread.

        Raises:
            StoreUnavailable: the database is locked, full or down; nothing of the block is stored.
        """
        with self._translate_errors(), self._turn, self.engine.begin() as connection:
            yield connection

    def now(self, session: Session) -> datetime:
        """The time by which leases run: the database server's, so that workers' clocks need not agree."""
        if self.is_sqlite:
            return now()
        time: datetime = session.execute(text("SELECT clock_timestamp() AT TIME ZONE 'UTC'")).scalar_one()
        return time

    def check(self) -> None:
        """Ask for nothing, in a time that does not grow with what is stored.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        with self.reading() as session:
            session.execute(text("SELECT 1 FROM alembic_version"))

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (OperationalError, InterfaceError, NoConnectionLeft) as error:
            cause = error.args[0] if isinstance(error, NoConnectionLeft) else error.orig
            reason = " ".join(str(cause).split())[:200]
            forbidden = self.is_sqlite and any(words in reason for words in _FORBIDDEN)
            raise StoreUnavailable(
                f"expected the state database {self.name} to answer, got: {reason}; {_ALLOW if forbidden else _WAIT}"
            ) from error
        except DatabaseError as error:
            if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF not in _DAMAGED:
                raise
            raise StateError(
                f"expected the state database {self.name} to be whole, got: {error.orig}; stop service and worker, "
                "then bring a backup back with ppal restore FILE --force"
            ) from error


def shown_address(url: URL) -> str:
    """The address of a database as people may see it: without its password, which may stand in the query too."""
    hidden = {key: "***" for key in url.query if is_password(key)}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SettingsError("expected PPAL_DATABASE_URL such as postgresql://user:password@host/name") from None
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername in ("postgresql", "postgres") else parsed


def postgres_options(given: Collection[str]) -> dict[str, Any]:
    """What every connection to a PostgreSQL is opened with, the state's and the job queue's: a server that takes
    connections and does not answer, and a host that vanishes later, are given up within seconds.

    Args:
        given: parameters that the address holds itself; its waiting times stay as they are there.
    """
    waiting = {
        "connect_timeout": POSTGRES_WAIT_S,
        "tcp_user_timeout": POSTGRES_WAIT_S * 1000,
        "keepalives_idle": POSTGRES_WAIT_S,
        "keepalives_interval": POSTGRES_WAIT_S,
    }
    # A database of encoding SQL_ASCII, PostgreSQL's own where the server has no locale, answers in bytes.
    return {"client_encoding": "UTF8", **{name: value for name, value in waiting.items() if name not in given}}


def _engine(url: URL, is_sqlite: bool, in_memory: bool, busy_timeout_s: float) -> Engine:
    options: dict[str, Any] = {"pool_pre_ping": True}
    if is_sqlite:
        options = {"connect_args": {"timeout": busy_timeout_s}}
    if in_memory:
        options = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    if not is_sqlite:
        options["connect_args"] = postgres_options(url.query)
    try:
        engine = create_engine(url, **options)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise SettingsError(
            f"expected a driver for the database {url.drivername!r}, got: {error}; for PostgreSQL install "
            "ppal-backend[postgres] and write the URL as postgresql://user:password@host/name"
        ) from None
    if is_sqlite:
        event.listen(engine, "connect", _tune_sqlite)
        event.listen(engine, "begin", _begin_immediate)
    return engine


def _tune_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy emits BEGIN itself, below
    cursor = connection.cursor()
    _use_write_ahead_log(cursor)
    for pragma in ("synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


Given = ParamSpec("Given")
Result = TypeVar("Result")


def repeat_on_conflict(transaction: Callable[Given, Result]) -> Callable[Given, Result]:
    """Do a transaction once more where another process has inserted one of its rows at the same moment: now the row is
    found. The arguments are read twice then."""

    @wraps(transaction)
    def once_or_twice(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return transaction(*args, **kwargs)
        except IntegrityError:
            return transaction(*args, **kwargs)

    return once_or_twice


def _use_write_ahead_log(cursor: Any) -> None:
    """Switch a new database over. SQLite's busy timeout does not hold for this: while another process that starts does
    the same, it is refused at once, so it is tried for as long as a writer waits."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _begin_immediate(connection: Any) -> None:
    # A deferred transaction that first reads and then writes fails at once under WAL when
    # somebody else wrote in between; taking the write lock up front waits for its turn instead.
    readonly = connection.get_execution_options().get("readonly", False)
    connection.exec_driver_sql("BEGIN" if readonly else "BEGIN IMMEDIATE")


def migrate(engine: Engine) -> None:
    """Make the tables of a new database, or take the missing steps in an older one.

    A database that a release without migrations made is taken for the first release's. Processes that start at
    the same time wait for each other. Alembic is only imported when there is something to do.

    Raises:
        StateError: a newer release has been at work on this database.
    """
    with engine.connect() as connection:
        connection = connection.execution_options(readonly=True)
        if _revision(connection) == SCHEMA_VERSION:
            return
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        found = _revision(connection)
        if found != SCHEMA_VERSION:
            _upgrade(connection, found)


def check_schema(engine: Engine, any_schema: bool = False) -> None:
    """See that a database is at the schema of this release, and change nothing.

    Raises:
        NoState: it holds no tables.
        StateError: it is at another schema, and not ``any_schema``.
    """
    with engine.connect() as connection:
        found = _revision(connection.execution_options(readonly=True))
    if found is None:
        raise NoState("expected the state of a backend in the database, got no tables")
    if any_schema:
        return
    if found < SCHEMA_VERSION:
        raise StateError(
            f"expected a state database of schema {SCHEMA_VERSION}, got {found} of an older release; stop that "
            "release's service and worker, then run ppal migrate"
        )
    if found != SCHEMA_VERSION:
        raise StateError(_TOO_NEW.format(SCHEMA_VERSION, found))


def _revision(connection: Connection) -> str | None:
    """The step a database is at; None for a new one."""
    tables = set(inspect(connection).get_table_names())
    if "alembic_version" in tables:
        return connection.scalar(text("SELECT version_num FROM alembic_version"))
    return FIRST_SCHEMA if "projects" in tables else None


def _upgrade(connection: Connection, found: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    known = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise StateError(_TOO_NEW.format(SCHEMA_VERSION, found))
    if found is not None and not inspect(connection).has_table("alembic_version"):
        command.stamp(config, found)
    log.info("state database: schema %s is brought to %s", found or "(new)", SCHEMA_VERSION)
    command.upgrade(config, "head")
