"""The processes that hold rounds: who they are, and their signs of life where every machine sees them.

They are told apart by what no clock can change: host, boot, process namespace, process and its start.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import delete, select

from ppal_backend.errors import StoreUnavailable
from ppal_backend.store.database import Database
from ppal_backend.store.tables import NoteRow, WorkerRow, now

log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True)
class Lease:
    """A process that holds a round. ``started`` is its start in seconds, so that a reused process id is told apart;
    counted from the host's boot where the system tells that, because a clock that is set would move any other."""

    host: str
    pid: int
    started: float

    @classmethod
    def mine(cls) -> Lease:
        """The lease of the calling process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Lease:
        """The lease of a running process of this host.

        Raises:
            psutil.NoSuchProcess: there is none.
        """
        return cls(this_host(), pid, _started(pid))

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}:{self.started:.2f}"

    @classmethod
    def parse(cls, text: str) -> Lease:
        """The inverse of ``str``."""
        host, pid, started = text.rsplit(":", 2)
        return cls(host, int(pid), float(started))

    @property
    def is_here(self) -> bool:
        """Whether its process is one that this process can see."""
        return self.host == this_host()

    def is_dead_here(self) -> bool:
        """True when it belongs to a process of this host that has ended; False when nobody can tell."""
        if not self.is_here:
            return False
        try:
            return abs(_started(self.pid) - self.started) > 0.1
        except psutil.NoSuchProcess:
            return True


@lru_cache(maxsize=1)
def this_host() -> str:
    """This host as leases name it. Containers and reboots that share a host name are different hosts."""
    parts = [socket.gethostname()]
    if _BOOT_ID.is_file():
        parts.append(_BOOT_ID.read_text().strip()[:8])
    if _PID_NAMESPACE.is_symlink():
        parts.append(os.readlink(_PID_NAMESPACE).strip("pid:[]"))  # noqa: PTH115 (not a path)
    return "/".join(parts)


def _started(pid: int) -> float:
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").is_file():
        return psutil.Process(pid).create_time()
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    if fields[0] == "Z":  # ended, and only waits for its parent to notice
        raise psutil.NoSuchProcess(pid)
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


BEAT_EVERY_S = 5.0
ALIVE_WITHIN_S = 30.0
FORGET_AFTER_S = 86_400.0


class WorkerStore:
    """When each worker was last heard of, by the clock that leases run by."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def beat(self, name: str) -> None:
        """A worker lives. One that is new here makes those forgotten that have been silent for a day."""
        with self._database.transaction() as session:
            time_now = self._database.now(session)
            row = session.get(WorkerRow, name)
            if row is None:
                silent = time_now - timedelta(seconds=FORGET_AFTER_S)
                session.execute(delete(WorkerRow).where(WorkerRow.beat_at < silent))
                row = WorkerRow(name=name)
                session.add(row)
            row.beat_at = time_now

    def leave(self, name: str) -> None:
        """A worker ends as it should."""
        with self._database.transaction() as session:
            session.execute(delete(WorkerRow).where(WorkerRow.name == name))

    def ages_s(self) -> dict[str, float]:
        """Seconds since each worker's last sign of life.

        A time in the future, after a clock was set back, counts as that far off: a living worker sets it right in
        seconds.
        """
        with self._database.reading() as session:
            time_now = self._database.now(session)
            return {
                row.name: abs((time_now - row.beat_at).total_seconds()) for row in session.scalars(select(WorkerRow))
            }

    def age_s(self) -> float | None:
        """Seconds since any worker's last sign of life; None when there is none."""
        return min(self.ages_s().values(), default=None)


LABEL_STUDIO_NOTE = "label_studio"
"""Name of the note that says whether Label Studio answers, and which projects it has."""


class NoteStore:
    """What a worker found out and every page may show, by name."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, name: str, content: dict[str, Any]) -> None:
        """Keep a note in place of the one before."""
        with self._database.transaction() as session:
            session.merge(NoteRow(name=name, content=content, noted_at=now()))

    def get(self, name: str) -> tuple[dict[str, Any], datetime | None]:
        """A note and when it was made (UTC); empty and None without one."""
        with self._database.reading() as session:
            row = session.get(NoteRow, name)
            return ({}, None) if row is None else (dict(row.content), row.noted_at)


class Heartbeat:
    """One worker's sign of life; how old it is says whether the worker lives."""

    def __init__(self, workers: WorkerStore) -> None:
        self._workers, self._name = workers, str(Lease.mine())
        self._next = 0.0

    def beat(self) -> None:
        """Still here; said every few seconds, however often it is called. A database that is away is logged, the
        worker goes on."""
        if time.monotonic() < self._next:
            return
        try:
            self._workers.beat(self._name)
        except StoreUnavailable as error:
            log.warning("the worker's sign of life could not be stored: %s", error)
        else:
            self._next = time.monotonic() + BEAT_EVERY_S

    def end(self) -> None:
        """Leaving."""
        try:
            self._workers.leave(self._name)
        except StoreUnavailable as error:
            log.warning("the worker leaves without a word: %s", error)
