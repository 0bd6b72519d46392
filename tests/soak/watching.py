"""Memory, descriptors and threads of service and workers, sampled all along."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass

import psutil

from tests.soak.site import Site

EVERY_S = 5.0
WARM_AFTER_S = 60.0
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """One process at one moment: seconds since the start, its role and id, how old it is, MiB, descriptors, threads."""

    at_s: float
    role: str
    pid: int
    age_s: float
    mib: float
    descriptors: int
    threads: int


class Watcher(threading.Thread):
    """Takes a sample of every process that the launcher started, and of the service's children."""

    def __init__(self, site: Site) -> None:
        super().__init__(name="watcher", daemon=True)
        self._site, self._began, self._ended = site, time.monotonic(), threading.Event()
        self.samples: list[Sample] = []

    def run(self) -> None:
        while not self._ended.wait(EVERY_S):
            self.look()

    def look(self) -> list[Sample]:
        found = [s for role, process in self._roles() if (s := self._sample(role, process)) is not None]
        self.samples += found
        return found

    def finish(self) -> None:
        self._ended.set()
        self.join()

    def _roles(self) -> list[tuple[str, psutil.Process]]:
        rows = []
        for name, started in dict(self._site.group.processes).items():
            try:
                process = psutil.Process(started.pid)
                rows.append((name if name != "service" else "service master", process))
                rows += [("service", child) for child in process.children()] if name == "service" else []
            except psutil.NoSuchProcess:
                continue
        return rows

    def _sample(self, role: str, process: psutil.Process) -> Sample | None:
        try:
            with process.oneshot():
                return Sample(
                    round(time.monotonic() - self._began, 1), role, process.pid,
                    round(time.time() - process.create_time(), 1), round(process.memory_info().rss / MIB, 1),
                    process.num_fds(), process.num_threads(),
                )  # fmt: skip
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return None

    def figures(self) -> dict[str, dict]:
        """By role: the first warm, the middle and the last sample, the highest, and the growth of the longest life."""
        told = {}
        for role in sorted({s.role for s in self.samples}):
            mine = [s for s in self.samples if s.role == role]
            warm = [s for s in mine if s.age_s >= WARM_AFTER_S] or mine
            life = self.longest_life(role)
            told[role] = {
                "start": asdict(warm[0]),
                "middle": asdict(warm[len(warm) // 2]),
                "end": asdict(mine[-1]),
                "highest_mib": max(s.mib for s in mine),
                "lives": len({s.pid for s in mine}),
                "longest_life_s": round(life[-1].at_s - life[0].at_s, 1),
                "grown_mib": round(life[-1].mib - life[0].mib, 1),
                "grown_descriptors": life[-1].descriptors - life[0].descriptors,
            }
        return told

    def longest_life(self, role: str) -> list[Sample]:
        """The samples of the process of a role that was watched longest, once it was warm."""
        lives: dict[int, list[Sample]] = {}
        for sample in self.samples:
            if sample.role == role:
                lives.setdefault(sample.pid, []).append(sample)
        longest = max(lives.values(), key=lambda rows: rows[-1].at_s - rows[0].at_s)
        return [s for s in longest if s.age_s >= WARM_AFTER_S] or longest[-1:]
