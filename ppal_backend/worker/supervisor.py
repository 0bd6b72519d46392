"""Runs each round in a process of its own: a crash, an out-of-memory kill or a leak stays there."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import psutil

from ppal_backend.store import CRASH_LIMIT, Lease, Store

log = logging.getLogger(__name__)

RETRY_AFTER_CRASH_S = 5.0
STOP_WAIT_S = 60.0
ROUND_MODULE = "ppal_backend.worker.round_process"


class Supervisor:
    """Starts round processes and says what became of them."""

    def __init__(self, store: Store, module: str = ROUND_MODULE) -> None:
        self._store, self._module = store, module
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._stopping = False

    def run_next(self) -> int | None:
        """Run the round that was asked for first, of whichever project, and wait for its end.

        Projects that another thread waits for a process of are left out: that one may need seconds before it claims its
        round.

        Returns:
            Its project; None where there is nothing to do.
        """
        with self._lock:
            waiting = [p for p in self._store.rounds.claimable_projects() if p not in self._children]
            if self._stopping or not waiting:
                return None
            project_id = waiting[0]
            child = subprocess.Popen([sys.executable, "-m", self._module, str(project_id)])
            self._children[project_id] = child
        try:
            lease = _lease_of(child)
            code = child.wait()
        finally:
            with self._lock:
                del self._children[project_id]
        if code != 0 and lease is not None and not self._stopping:
            self._crashed(project_id, code, lease)
        return project_id

    def stop(self) -> None:
        """Ask running rounds to save what they have and leave; kill those that do not."""
        with self._lock:
            self._stopping = True
            children = list(self._children.values())
        for child in children:
            child.terminate()
        for child in children:
            try:
                child.wait(STOP_WAIT_S)
            except subprocess.TimeoutExpired:
                log.warning("a round did not stop within %.0f s; killed, it resumes from its last step", STOP_WAIT_S)
                child.kill()
                child.wait()

    def _crashed(self, project_id: int, code: int, lease: Lease) -> None:
        record = self._store.rounds.running(project_id)
        if record is None or not self._store.rounds.holds(record.id, lease):
            return  # it let go of the round before it ended, or somebody else has taken it over by now
        cause = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        error = f"the process of round {record.number} ended early ({cause}) in step {record.step or 'start'!r}"
        again = self._store.rounds.crashed(record.id, error, CRASH_LIMIT, RETRY_AFTER_CRASH_S, lease)
        log.error("%s; %s", error, "it will be resumed" if again else f"given up after {CRASH_LIMIT} times")


def _lease_of(child: subprocess.Popen[bytes]) -> Lease | None:
    """What the child holds its round under; None when it has ended already, then nothing is known of its round."""
    try:
        return Lease.of(child.pid)
    except psutil.NoSuchProcess:
        return None
