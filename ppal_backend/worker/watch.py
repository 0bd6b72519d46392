"""Watches one round from within its process: reports to the store, keeps the lease, says when to stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from ppal_backend.errors import LeaseLost, StoreUnavailable
from ppal_backend.store import LEASE_S, Lease, RoundRecord, Store
from ppal_backend.structures.round import Progress

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
REPORT_EVERY_S = 1.0
SILENCE_S = LEASE_S - 10.0  # afterwards another machine may take the round


class Watch:
    """Observes one round: reports to the store, keeps the lease alive, and says when to stop.

    The process ends at once when its parent is gone, when another process holds the round, or when the database has
    been out of reach for so long that another machine may hold it: whoever has the round goes on from its last step.

    Args:
        store: the state.
        record: the round.
        lease: what it is held under.
        before_step: called with the name of each step; what it raises ends the attempt.
        leave: ends the process.
    """

    def __init__(
        self,
        store: Store,
        record: RoundRecord,
        lease: Lease,
        before_step: Callable[[str], None] = lambda step: None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._store, self._round, self._lease = store, record, lease
        self._before_step, self._leave = before_step, leave
        self._stop, self._ended = threading.Event(), threading.Event()
        self._parent, self._reported, self.step = os.getppid(), 0.0, record.step
        self._before_export: frozenset[int] = frozenset()

    def start(self) -> None:
        """Begin to keep the lease alive; SIGTERM asks the round to stop."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker decides
        threading.Thread(target=self._keep_lease, name="lease", daemon=True).start()

    def stop(self) -> None:
        """The round is over."""
        self._ended.set()

    def exported(self, annotation_ids: Sequence[int]) -> None:
        self.fence()
        ledger, project_id = self._store.ledger, self._round.project_id
        gone = self._before_export.difference(annotation_ids)
        ledger.deleted(project_id, gone, corrects=self._round.kind == "rank")  # a training knows it from now on
        if self._round.kind == "rank":
            return  # nothing was learned from them: they still count towards the next training
        ledger.used_by(project_id, self._round.number, annotation_ids)

    def report_problem(self, topic: str, problem: str) -> None:
        self._store.projects.set_problem(self._round.project_id, topic, problem)

    def fence(self) -> None:
        record = self._round
        if not self._store.rounds.prolong(record.id, self._lease):
            raise LeaseLost(
                f"round {record.number} of project {record.project_id} is held by another process or has ended; this "
                "one changes nothing any more"
            )

    def step_started(self, step: str) -> None:
        self.fence()
        self.step = step
        if step == "export":  # what comes while it is written need not be in it; what is known now must be
            self._before_export = frozenset(self._store.ledger.usable(self._round.project_id))
            if self._round.kind == "train":
                self._store.ledger.corrections_read(self._round.project_id)
        self._store.rounds.report(self._round.id, step, {}, self._lease)
        log.info("round %d of project %d: %s", self._round.number, self._round.project_id, step)
        self._before_step(step)

    def progress(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._reported < REPORT_EVERY_S and progress.done < progress.total:
            return
        self._reported = now
        shown = {"done": progress.done, "total": progress.total, "detail": progress.detail}
        try:
            self._store.rounds.report(self._round.id, self.step, shown, self._lease)
        except StoreUnavailable as error:  # only to be looked at: no reason to interrupt a training
            log.warning("progress is not shown: %s", error)

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stop.set()

    def _keep_lease(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(HEARTBEAT_S):
            try:
                if os.getppid() != self._parent:
                    self._store.rounds.release(self._round.id, lease=self._lease)
                    return self._leave_process("its worker is gone")
                if self._store.rounds.renew(self._round.id, self._lease):
                    renewed = time.monotonic()
                elif self._store.rounds.is_taken(self._round.id, self._lease):
                    return self._leave_process("another process holds it")
                else:
                    self._stop.set()  # somebody asked to cancel or to pause, or it has just ended
            except StoreUnavailable as error:
                log.warning("round %d of project %d: %s", self._round.number, self._round.project_id, error)
                if os.getppid() != self._parent:
                    return self._leave_process("its worker and its database are gone")
                # Under SQLite everybody is on this host and sees that this process lives.
                if not self._store.database.is_sqlite and time.monotonic() - renewed > SILENCE_S:
                    return self._leave_process("the database has been out of reach for too long")

    def _leave_process(self, why: str) -> None:
        number, project_id = self._round.number, self._round.project_id
        log.error("round %d of project %d is left by this process: %s", number, project_id, why)
        self._leave(1)
