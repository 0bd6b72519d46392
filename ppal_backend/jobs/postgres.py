"""The job queue in PostgreSQL: huey's SQL storage, in a schema of its own so that it may share a database.

Consumers take jobs with ``FOR UPDATE SKIP LOCKED``: none is taken twice, none waits for another.
"""

from __future__ import annotations

from typing import Any

from huey.contrib.sql_huey import SqlStorage
from peewee import PostgresqlDatabase

SCHEMA = "ppal_jobs"
CONNECT_TIMEOUT_S = 10
_LOCK = 7_705_362  # names our advisory lock in PostgreSQL; any number that nobody else uses there


class PostgresStorage(SqlStorage):
    """The jobs of one queue.

    Args:
        name: the queue's name.
        url: the database as ``postgresql://user:password@host/name``.
    """

    def __init__(self, name: str, url: str, **options: Any) -> None:
        address = "postgresql://" + url.split("://", 1)[1]
        database = PostgresqlDatabase(
            address,
            prefer_psycopg3=True,
            options=f"-c search_path={SCHEMA}",
            connect_timeout=CONNECT_TIMEOUT_S,
            tcp_user_timeout=CONNECT_TIMEOUT_S * 1000,
        )
        self._made = False
        super().__init__(name, database, create_tables=False, **options)

    def check_conn(self) -> None:
        """Called before every use: connect anew when the server has been away, and make the tables at the first."""
        super().check_conn()
        if not self._made:
            self.create_tables()
            self._made = True

    def create_tables(self) -> None:
        """Make the tables where they are missing; processes that do so at the same time wait for each other."""
        with self.database.atomic():
            self.database.execute_sql("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            self.database.execute_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
            self.database.create_tables([self.KV, self.Schedule, self.Task, self.Counter])

    def queue_size(self) -> int:
        """Jobs that wait."""
        self.check_conn()
        return int(super().queue_size())
