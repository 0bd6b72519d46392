"""One step of a round as a task of a Ray cluster, where the node sees the round's folder."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppal_backend.engines.ray_cluster import Needs, Node, RayCluster, on_node, told_errors
from ppal_backend.engines.ray_shards import RETRIES
from ppal_backend.engines.ray_work import Line, LocalOptions, Mailbox, run_step
from ppal_backend.errors import DetectorError
from ppal_backend.structures.progress import OnProgress

log = logging.getLogger(__name__)

_POLL_S = 0.2
_LOOK_S = 60.0

ShouldStop = Callable[[], bool]


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
            while not ray.wait([answer], timeout=_POLL_S)[0]:
                self._pass_on(mailbox, on_progress, should_stop)
            self._pass_on(mailbox, on_progress, None)
            with told_errors(ray):
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
