"""All stores over one database."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.engine import make_url

from ppal_backend.settings import Settings
from ppal_backend.store.database import Database
from ppal_backend.store.events import EventStore
from ppal_backend.store.ledger import AnnotationLedger
from ppal_backend.store.projects import ProjectStore
from ppal_backend.store.rounds import RoundStore
from ppal_backend.store.versions import VersionStore
from ppal_backend.store.workers import WorkerStore


class Store:
    """The backend's memory."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.projects = ProjectStore(database)
        self.events = EventStore(database)
        self.ledger = AnnotationLedger(database)
        self.rounds = RoundStore(database)
        self.versions = VersionStore(database)
        self.workers = WorkerStore(database)

    def close(self) -> None:
        """Give the database connections back."""
        self.database.close()


def open_store(settings: Settings, create: bool = True) -> Store:
    """The store that the settings name; made when it does not exist, or without ``create`` an error.

    Raises:
        NoState: without ``create``, there is none.
        StateError: another release has used it.
    """
    return Store(Database(settings.state_url, create=create))


def database_file(url: str) -> Path | None:
    """The file of a SQLite database; None for another kind of database."""
    parsed = make_url(url)
    on_disk = parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:")
    return Path(str(parsed.database)) if on_disk else None
