"""Tells the job queue which projects need looking after, off the path of the request.

Putting a job into the queue waits for the disk; while a round writes checkpoints that can take longer than an
annotator should wait for a submit. The event itself is stored before anybody is told, so a notice that is
lost with the process costs at most one poll interval.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

log = logging.getLogger(__name__)

CLOSE_WAIT_S = 5.0
PAUSE_S = 0.25  # between notices: hundreds of webhooks a second are a few jobs, and each of those handles them all


class Jobs(Protocol):
    """The job queue, as far as the service uses it."""

    def sync(self, project_id: int, /) -> object:
        """Enqueue: handle the project's pending events, poll it, start a round if one is due."""


class Notifier:
    """Passes notices on in a thread of its own, the first at once; notices of one project that wait are one notice.

    Args:
        jobs: where they go. A failure, of whatever kind, is logged and forgotten.
    """

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._waiting: dict[int, None] = {}
        self._busy = self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def notify(self, project_id: int) -> None:
        """Have a job enqueued for a project; returns at once."""
        with self._changed:
            is_known = project_id in self._waiting
            self._waiting[project_id] = None
            if self._thread is None or not self._thread.is_alive():  # none yet, or lost in a fork
                self._thread = threading.Thread(target=self._run, name="ppal-notifier", daemon=True)
                self._thread.start()
            if not is_known:
                self._changed.notify_all()

    def flush(self, timeout_s: float = CLOSE_WAIT_S) -> bool:
        """Wait until every notice is passed on; False when that takes too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)

    def close(self) -> None:
        """Pass on what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.flush()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                projects, self._waiting = list(self._waiting), {}
                self._busy = True
            for project_id in projects:
                self._pass_on(project_id)
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed, PAUSE_S)

    def _pass_on(self, project_id: int) -> None:
        try:
            self._jobs.sync(project_id)
        except Exception:
            log.exception("the job queue took no job for project %d; the next poll will handle it", project_id)
