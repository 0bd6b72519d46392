"""Work given to a Ray cluster: a pool cut into shards, or one step of a round. A process that is lost costs a retry.

A shard goes to any free process; a step is a task on a node that sees the round's folder.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppal_backend.engines.ray.cluster import Needs, Node, RayCluster, on_node, translate_errors
from ppal_backend.engines.ray.node import Line, LocalOptions, Mailbox, run_step
from ppal_backend.errors import DetectorError, RoundCancelled
from ppal_backend.structures.round import OnProgress

log = logging.getLogger(__name__)

RETRIES = 3
SHARD_IMAGES = 64
_POLL_S = 0.5
_STEP_POLL_S = 0.2
_LOOK_S = 60.0
_PATIENCE_S = 60.0
_AHEAD = 4  # shards a process may be ahead of the oldest one that is not done

ShouldStop = Callable[[], bool]


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
                with translate_errors(self._ray):
                    value = self._ray.get(answer)
            except self._ray.exceptions.RayTaskError:
                raise
            except self._ray.exceptions.RayError as error:
                self._drop_worker(process, shard, error)
                continue
            self._idle.append(process)
            if shard is None:
                self._failed_starts = 0
            else:
                self._done[shard] = value
        self._complain(bool(ready))

    def _drop_worker(self, process: Any, shard: int | None, error: Exception) -> None:
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


class StepRunner:
    """Runs methods of the local engine somewhere in the cluster.

    A step whose process is lost runs again, on another node if need be: a training goes on from its last checkpoint in
    the round's folder.

    Args:
        cluster: Where.
        options: How to make the local engine there.
    """

    def __init__(self, cluster: RayCluster, options: LocalOptions) -> None:
        self._cluster, self._options = cluster, options

    def run(
        self,
        name: str,
        arguments: Sequence[Any],
        folder: Path,
        needs: Needs,
        on_progress: OnProgress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Any:
        """Call a method of the local engine.

        Args:
            name: The method.
            arguments: Its arguments, but for ``on_progress`` and ``should_stop``.
            folder: A folder of the round that the node must see.
            needs: What the step takes.
            on_progress: For a method that takes it.
            should_stop: Likewise.

        Raises:
            EngineUnavailable: No node is large enough.
            DetectorError: No such node sees the folder, or every try was lost.
            PPALError: What the method said.
        """
        ray = self._cluster.ray
        with _marked(folder) as marker:
            for attempt in range(1 + RETRIES):
                try:
                    return self._attempt(name, arguments, marker, needs, on_progress, should_stop)
                except ray.exceptions.RayTaskError:
                    raise
                except ray.exceptions.RayError as error:
                    reason = str(error).splitlines()[0]
                    log.warning("try %d of step %r in the Ray cluster was lost: %s", attempt + 1, name, reason)
        raise DetectorError(
            f"expected step {name!r} to end in the Ray cluster, got {1 + RETRIES} processes that were lost with it "
            f"({reason}); they may lack memory, see Ray's log on the nodes"
        )

    def _attempt(
        self,
        name: str,
        arguments: Sequence[Any],
        marker: Path,
        needs: Needs,
        on_progress: OnProgress | None,
        should_stop: ShouldStop | None,
    ) -> Any:
        ray, strategy = self._cluster.ray, self._where(marker, needs)
        size = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "scheduling_strategy": strategy}
        mailbox = None
        if on_progress is not None:
            at_home = {"num_cpus": 0, "scheduling_strategy": on_node(self._cluster.home)}
            mailbox = ray.remote(Mailbox).options(**at_home).remote()
        task = ray.remote(max_retries=0, max_calls=1, **size)(_on_node)
        answer = task.remote(self._options, str(marker), name, list(arguments), mailbox)
        try:
            while not ray.wait([answer], timeout=_STEP_POLL_S)[0]:
                self._pass_on(mailbox, on_progress, should_stop)
            self._pass_on(mailbox, on_progress, None)
            with translate_errors(ray):
                return ray.get(answer)
        finally:
            ray.cancel(answer, force=True)  # of no effect on one that has ended
            if mailbox is not None:
                ray.kill(mailbox)

    def _pass_on(self, mailbox: Any, on_progress: OnProgress | None, should_stop: ShouldStop | None) -> None:
        if mailbox is None or on_progress is None:
            return
        if should_stop is not None and should_stop():
            mailbox.ask_to_stop.remote()
        for progress in self._cluster.ray.get(mailbox.take.remote()):
            on_progress(progress)

    def _where(self, marker: Path, needs: Needs) -> Any:
        """Ray's own choice where every large enough node sees the folder, else the first that does, home before all.

        Raises:
            DetectorError: None does.
        """
        nodes = self._cluster.capable(needs)
        home = self._cluster.home
        seeing = [node for node in nodes if node.id == home or self._sees(node, marker)]
        if not seeing:
            raise DetectorError(
                f"expected {marker.parent} on a node of the Ray cluster with {needs}, got none that sees it "
                f"({', '.join(node.host for node in nodes)}); share MODEL_DIR with these nodes under the same path"
            )
        if len(seeing) == len(nodes):
            return "DEFAULT"
        return on_node(min(seeing, key=lambda node: node.id != home).id)

    def _sees(self, node: Node, marker: Path) -> bool:
        ray = self._cluster.ray
        look = ray.remote(_is_file).options(num_cpus=0, max_retries=0, scheduling_strategy=on_node(node.id))
        try:
            return bool(ray.get(look.remote(str(marker)), timeout=_LOOK_S))
        except ray.exceptions.RayError as error:
            log.warning("node %s of the Ray cluster does not answer: %s", node.host, str(error).splitlines()[0])
            return False


@contextmanager
def _marked(folder: Path) -> Iterator[Path]:
    """A file in a folder that no other folder has, so that a node can tell whether it sees this one."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f".seen-{uuid.uuid4().hex}"
    marker.touch()
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)


def _is_file(path: str) -> bool:
    return Path(path).is_file()


def _on_node(options: LocalOptions, marker: str, name: str, arguments: Sequence[Any], mailbox: Any) -> Any:
    """The task itself."""
    import ray

    if mailbox is None:
        return run_step(options, marker, name, arguments, None)
    line = Line(
        lambda progress: ray.get(mailbox.post.remote(progress)), lambda: bool(ray.get(mailbox.is_stopped.remote()))
    )
    return run_step(options, marker, name, arguments, line)
