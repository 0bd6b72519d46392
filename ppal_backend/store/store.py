"""The backend's memory: all stores over one database, opened where the settings say, or looked for.

``MODEL_DIR`` is a folder of the working directory by default, so a command may look in the wrong one. A process that
starts leaves a note in the cache folder, which all of a user's processes share; a note counts while its process lives.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import make_url

from ppal_backend.errors import NoState, StateError
from ppal_backend.files import read_json, write_json
from ppal_backend.settings import Settings
from ppal_backend.store.approvals import ApprovalStore, DismissalStore
from ppal_backend.store.database import Database, shown_address
from ppal_backend.store.events import EventStore
from ppal_backend.store.ledger import AnnotationLedger
from ppal_backend.store.projects import ProjectStore
from ppal_backend.store.rounds import RoundStore
from ppal_backend.store.sides import SideStore
from ppal_backend.store.steering import SteeringStore
from ppal_backend.store.versions import VersionStore
from ppal_backend.store.workers import ALIVE_WITHIN_S, Lease, NoteStore, WorkerStore

log = logging.getLogger(__name__)


class Store:
    """The backend's memory."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.projects = ProjectStore(database)
        self.events = EventStore(database)
        self.ledger = AnnotationLedger(database)
        self.sides = SideStore(database, self.ledger)
        self.steering = SteeringStore(database)
        self.approvals = ApprovalStore(database)
        self.dismissals = DismissalStore(database)
        self.rounds = RoundStore(database)
        self.versions = VersionStore(database)
        self.workers = WorkerStore(database)
        self.notes = NoteStore(database)

    def close(self) -> None:
        """Give the database connections back."""
        self.database.close()


def open_store(settings: Settings, create: bool = True, *, any_schema: bool = False) -> Store:
    """The store that the settings name; made when it does not exist, or without ``create`` an error.

    Raises:
        NoState: without ``create``, there is none.
        StateError: it is damaged, or another release has used it and not ``any_schema``.
    """
    return Store(Database(settings.state_url, create=create, any_schema=any_schema))


def database_file(url: str) -> Path | None:
    """The file of a SQLite database; None for another kind of database."""
    parsed = make_url(url)
    on_disk = parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:")
    return Path(str(parsed.database)) if on_disk else None


@dataclass(frozen=True)
class RunningBackend:
    """A process of a backend: what it was started as, its data folder, and its database without a password."""

    command: str
    model_dir: str
    database: str

    @property
    def advice(self) -> str:
        """How a command reaches its state."""
        place = f"set MODEL_DIR={self.model_dir}"
        if self.database.startswith("sqlite:///" + self.model_dir):
            return place
        return f"{place} and PPAL_DATABASE_URL as it has it ({self.database})"


def announce(settings: Settings, command: str, process: Lease | None = None) -> None:
    """Leave a note of a process that keeps its state where the settings say; notes of ended ones go.

    A cache folder that cannot be written to is no hindrance.

    Args:
        settings: its settings.
        command: what it was started as.
        process: the process; by default this one.
    """
    process = process or Lease.mine()
    try:
        for path, lease, _ in _notes(settings):
            if lease is None or lease.is_dead_here():
                path.unlink(missing_ok=True)
        note = {"process": str(process), **vars(_backend_of(settings, command))}
        write_json(_folder(settings) / f"{process.pid}.json", note)
    except OSError as error:
        log.debug("no note of this process was left: %s", error)


def find_store(settings: Settings, project: int | None = None) -> Store:
    """The store that a backend has made where the settings say. Nothing is made or changed: in the wrong folder, a
    command would find its own empty state.

    Args:
        settings: where to look.
        project: the project that is asked about.

    Raises:
        StateError: there is none, or another release's; the text tells where it was looked for and where a running
            backend keeps its own.
    """
    try:
        return open_store(settings, create=False)
    except NoState as error:
        whom = "no project is connected" if project is None else f"project {project} is not connected"
        raise StateError(f"{whom}: {error}{_folder_note(settings)}; {_advice(running_elsewhere(settings))}") from None


def hint_of_another(settings: Settings, store: Store) -> str:
    """Where a running backend keeps its state, if no worker lives on the one that the settings name; else empty."""
    age_s = store.workers.age_s()
    alive = age_s is not None and age_s < ALIVE_WITHIN_S
    elsewhere = [] if alive else running_elsewhere(settings)
    place = settings.model_dir.resolve()
    return f"looked in {place}{_folder_note(settings)}; {_advice(elsewhere)}" if elsewhere else ""


def _folder_note(settings: Settings) -> str:
    given = {"model_dir", "database_url"} & settings.model_fields_set
    return "" if given else " (MODEL_DIR is not set, so ppal-data in the working directory)"


def _advice(elsewhere: Sequence[RunningBackend]) -> str:
    if not elsewhere:
        return "set MODEL_DIR to the backend's data folder, or start one with ppal up"
    return "; ".join(
        f"a running backend (ppal {backend.command}) keeps its state elsewhere: {backend.advice}"
        for backend in elsewhere[:3]
    )


def running_elsewhere(settings: Settings) -> list[RunningBackend]:
    """Living backends of this machine that keep their state elsewhere than the settings say; none if one is here."""
    living = {backend for _, lease, backend in _notes(settings) if lease and backend and not lease.is_dead_here()}
    here = _backend_of(settings, "").database
    return [] if any(b.database == here for b in living) else sorted(living, key=lambda b: b.model_dir)


def _backend_of(settings: Settings, command: str) -> RunningBackend:
    database = shown_address(make_url(settings.state_url))
    return RunningBackend(command, str(settings.model_dir.resolve()), database)


def _folder(settings: Settings) -> Path:
    return settings.cache_dir / "running"


def _notes(settings: Settings) -> Iterator[tuple[Path, Lease | None, RunningBackend | None]]:
    """Notes with their process and what it is of; without either where they cannot be read."""
    for path in sorted(_folder(settings).glob("*.json")):
        try:
            note = read_json(path)
            lease = Lease.parse(note["process"])
            backend = RunningBackend(str(note["command"]), str(note["model_dir"]), str(note["database"]))
        except (OSError, ValueError, KeyError, TypeError):
            yield path, None, None
        else:
            if lease.is_here:  # else of another container with the same cache folder
                yield path, lease, backend
