"""Who holds a round. Told apart by what no clock can change: host, boot, process namespace, process and its start."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

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
