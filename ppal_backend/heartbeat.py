"""Signs of life of the workers, kept in the state database."""

from __future__ import annotations

import logging
import time

from ppal_backend.errors import StoreUnavailable
from ppal_backend.store import Lease, Store

log = logging.getLogger(__name__)

BEAT_EVERY_S = 5.0


class Heartbeat:
    """One worker's sign of life; how old it is says whether the worker lives."""

    def __init__(self, store: Store) -> None:
        self._store, self._name = store, str(Lease.mine())
        self._next = 0.0

    def beat(self) -> None:
        """Still here; said every few seconds, however often it is called. A database that is away is logged, the
        worker goes on."""
        if time.monotonic() < self._next:
            return
        try:
            self._store.workers.beat(self._name)
        except StoreUnavailable as error:
            log.warning("the worker's sign of life could not be stored: %s", error)
        else:
            self._next = time.monotonic() + BEAT_EVERY_S

    def end(self) -> None:
        """Leaving."""
        try:
            self._store.workers.leave(self._name)
        except StoreUnavailable as error:
            log.warning("the worker leaves without a word: %s", error)


def heartbeat_age_s(store: Store) -> float | None:
    """Seconds since any worker's last sign of life; None when there is none.

    Raises:
        StoreUnavailable: the state database does not answer.
    """
    return min(store.workers.ages_s().values(), default=None)
