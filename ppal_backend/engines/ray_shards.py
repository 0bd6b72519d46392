"""Work cut into shards for processes of a Ray cluster; a process that is lost costs its shard, not the work."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ppal_backend.engines.ray_cluster import told_errors
from ppal_backend.errors import DetectorError, RoundCancelled

log = logging.getLogger(__name__)

RETRIES = 3
SHARD_IMAGES = 64
_POLL_S = 0.5
_PATIENCE_S = 60.0
_AHEAD = 4  # shards a process may be ahead of the oldest one that is not done


def cut(images: int, batch_size: int, processes: int) -> list[range]:
    """Positions of the images of each shard, in order.

    A shard holds whole batches, so that every batch has the images it would have in one process: a detector pads the
    images of a batch to one size, and so the others in a batch can change what it says of an image.

    Args:
        images: How many there are.
        batch_size: Images of a batch.
        processes: How many there are to share the images.
    """
    even = -(-images // max(1, processes))
    size = max(1, -(-min(even, SHARD_IMAGES) // batch_size)) * batch_size
    return [range(start, min(start + size, images)) for start in range(0, images, size)]


class ShardRun:
    """Gives shards to processes as they become free, and gives lost ones to others.

    Args:
        ray: The module, connected.
        hire: Starts a process (an actor with the methods ``load()`` and ``work(shard)``) that may have to wait for
            its place in the cluster.
        shards: What ``work`` is called with, one each.
        places: How many processes the cluster can hold now.
        should_stop: Polled about twice a second.
    """

    def __init__(
        self,
        ray: Any,
        hire: Callable[[], Any],
        shards: Sequence[Any],
        places: Callable[[], int],
        should_stop: Callable[[], bool],
    ) -> None:
        self._ray, self._hire, self._shards, self._places = ray, hire, shards, places
        self._should_stop = should_stop
        self._todo = list(range(len(shards)))
        self._crew: set[Any] = set()
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, int | None]] = {}  # answer awaited -> process, shard (None: it loads)
        self._done: dict[int, Any] = {}
        self._lost: Counter[int] = Counter()
        self._failed_starts, self._why = 0, ""
        self._next, self._idle_since = 0, time.monotonic()

    def results(self) -> Iterator[Any]:
        """What ``work`` returned for each shard, in the order of the shards.

        Raises:
            RoundCancelled: ``should_stop`` said so.
            DetectorError: A shard was lost, or no process could start, more often than is bearable.
            PPALError: A process said why it cannot.
        """
        try:
            while self._next < len(self._shards):
                if self._should_stop():
                    raise RoundCancelled("stopped during inference; images done so far are kept")
                self._grow()
                self._assign()
                self._collect()
                while self._next in self._done:
                    self._next += 1
                    yield self._done.pop(self._next - 1)
        finally:
            for process in self._crew:
                self._ray.kill(process)

    def _grow(self) -> None:
        """Have as many processes as there is room and work for."""
        left = len(self._todo) + sum(shard is not None for _, shard in self._busy.values())
        if self._failed_starts > RETRIES:
            if not self._crew:
                raise DetectorError(
                    f"expected processes to start in the Ray cluster, got {self._failed_starts} failures "
                    f"({self._why}); see Ray's log on the nodes, and install the same version of this package on all"
                )
            return
        while len(self._crew) < min(max(1, self._places()), left):
            process = self._hire()
            self._crew.add(process)
            self._busy[process.load.remote()] = (process, None)

    def _assign(self) -> None:
        limit = self._next + _AHEAD * max(1, len(self._crew))
        while self._idle and self._todo and self._todo[0] < limit:
            process, shard = self._idle.pop(), self._todo.pop(0)
            self._busy[process.work.remote(self._shards[shard])] = (process, shard)

    def _collect(self) -> None:
        ready, _ = self._ray.wait(list(self._busy), timeout=_POLL_S)
        for answer in ready:
            process, shard = self._busy.pop(answer)
            try:
                with told_errors(self._ray):
                    value = self._ray.get(answer)
            except self._ray.exceptions.RayTaskError:
                raise
            except self._ray.exceptions.RayError as error:
                self._lose(process, shard, error)
                continue
            self._idle.append(process)
            if shard is None:
                self._failed_starts = 0
            else:
                self._done[shard] = value
        self._complain(bool(ready))

    def _lose(self, process: Any, shard: int | None, error: Exception) -> None:
        """A process is gone: its shard is to be done by another."""
        reason = str(error).splitlines()[0]
        self._crew.discard(process)
        self._ray.kill(process)  # it may live on behind a broken connection
        if shard is None:
            self._failed_starts, self._why = self._failed_starts + 1, reason
            log.warning("a process of the Ray cluster could not start: %s", reason)
            return
        self._lost[shard] += 1
        log.warning("a process of the Ray cluster was lost with shard %d: %s", shard, reason)
        if self._lost[shard] > RETRIES:
            raise DetectorError(
                f"expected shard {shard + 1} of {len(self._shards)} to be done, got {self._lost[shard]} processes that "
                f"were lost with it ({reason}); they may lack memory, see Ray's log on the nodes"
            ) from error
        self._todo.insert(0, shard)
        self._todo.sort()

    def _complain(self, heard: bool) -> None:
        now = time.monotonic()
        if heard or any(shard is not None for _, shard in self._busy.values()):
            self._idle_since = now
        elif now - self._idle_since > _PATIENCE_S:
            log.warning("waiting for a free place in the Ray cluster; other work may hold its GPUs or cores")
            self._idle_since = now
