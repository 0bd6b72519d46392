"""Training and inference in a Ray cluster: the local engine on its nodes, and pools shared among them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppal_backend.engines.local import log_unreadable
from ppal_backend.engines.ray.cluster import Needs, RayCluster, on_node
from ppal_backend.engines.ray.node import FileStamp, LocalOptions, Shard, ShardResult, ShardWorker, read_files
from ppal_backend.engines.ray.tasks import ShardRun, StepRunner, cut
from ppal_backend.rounds.ports import Inferred, PoolEntry, Trained, TrainingFiles
from ppal_backend.structures.round import ModelRef, OnProgress, Progress, RoundSpec

if TYPE_CHECKING:
    from ppal_backend.engines.ray.similarity import RaySimilarity
    from ppal_backend.structures.detections import Detections


class RayEngine:
    """The engine port over a Ray cluster.

    A pool is cut into shards of whole batches; what comes back is what the local engine says, in the order of the
    pool. A node that lacks a file of the pool, or the checkpoint, gets its bytes. Training and evaluation run on one
    node each, which must see the round's folder under the same path.

    Args:
        address: ``host:port`` of the cluster; empty starts Ray on this machine alone.
        zoo_root: Folder of the model zoo, the same on all nodes; None for the packaged one.
        threads: CPU cores of each process; None for one.
        processes: Processes that train one detector together on one node, each with a GPU of its own.
        tracking: ``tensorboard`` or ``mlflow`` for curves of the trainings; None for neither.
        weights_dir: Folder for downloaded weights, the same on all nodes; None for the default one of each node's user.

    Raises:
        SettingsError: Ray is not installed, or the address cannot be used.
    """

    def __init__(
        self,
        address: str = "",
        zoo_root: Path | None = None,
        threads: int | None = None,
        processes: int = 1,
        tracking: str | None = None,
        weights_dir: Path | None = None,
    ) -> None:
        self._cluster = RayCluster(address)
        self._options = LocalOptions(zoo_root, threads or 1, processes, tracking, weights_dir)
        self._steps = StepRunner(self._cluster, self._options)

    def kind_of(self, device: str) -> str:
        """``cuda`` or ``cpu``: what ``DEVICE`` means in this cluster."""
        return self._cluster.kind_of(device)

    def train(
        self, spec: RoundSpec, labels: tuple[str, ...], files: TrainingFiles, folder: Path,
        on_progress: OnProgress, should_stop: Callable[[], bool],
    ) -> Trained:  # fmt: skip
        spec = self._placed(spec)
        arguments = (spec, labels, files, folder)
        needs = self._needs(spec, self._options.processes)
        trained: Trained = self._steps.run("train", arguments, folder, needs, on_progress, should_stop)
        return trained

    def untrained(self, spec: RoundSpec, labels: tuple[str, ...], folder: Path) -> ModelRef | None:
        spec = self._placed(spec)
        model: ModelRef | None = self._steps.run("untrained", (spec, labels, folder), folder, self._needs(spec))
        return model

    def as_is(self, spec: RoundSpec, labels: tuple[str, ...], folder: Path) -> ModelRef:
        spec = self._placed(spec)
        model: ModelRef = self._steps.run("as_is", (spec, labels, folder), folder, self._needs(spec))
        return model

    def evaluate(
        self, spec: RoundSpec, model: ModelRef, ann_json: Path,
        earlier: Mapping[int, ModelRef] | None = None, folder: Path | None = None,
    ) -> Mapping[str, Any]:  # fmt: skip
        spec = self._placed(spec)
        arguments = (spec, model, ann_json, earlier, folder)
        metrics: Mapping[str, Any] = self._steps.run("evaluate", arguments, ann_json.parent, self._needs(spec))
        return metrics

    def infer(
        self, spec: RoundSpec, model: ModelRef, images: Iterable[PoolEntry],
        on_progress: OnProgress, should_stop: Callable[[], bool],
    ) -> Iterator[Inferred]:  # fmt: skip
        from ppal_backend.detector.zoo import find_entry

        entries = list(images)
        if not entries:
            return
        spec = self._placed(spec)
        needs = self._needs(spec)
        self._cluster.capable(needs)
        entry = find_entry(model.detector, self._options.zoo_root)
        batch = entry.batch_cuda if spec.device == "cuda" else entry.batch_cpu
        pieces = cut(len(entries), batch, self._places(needs))
        shards = [Shard.of([entries[k] for k in piece]) for piece in pieces]
        run = ShardRun(
            self._cluster.ray, self._hiring(spec, model, needs), shards, lambda: self._places(needs), should_stop
        )
        for piece, result in zip(pieces, run.results(), strict=True):
            yield from _own(result)
            on_progress(Progress("infer", piece.stop, len(entries)))

    def similarity(
        self,
        detections: Sequence[Detections],
        score_threshold: float = 0.05,
        device: str | None = None,
        memory_gib: float | None = None,
        *,
        metric: str = "auto",
        max_detections: int = 100,
    ) -> RaySimilarity:
        """CCMS row by row on all nodes, for pools whose matrix fits nowhere.

        Takes the arguments of :class:`~ppal_backend.acquisition.ccms.LazySimilarity`.
        """
        from ppal_backend.acquisition.ccms.objects import pack_objects
        from ppal_backend.engines.ray.similarity import RaySimilarity

        ray, kind = self._cluster.ray, self._cluster.kind_of(device or "auto")
        needs = Needs(self._options.threads, int(kind == "cuda"))
        packed = pack_objects(detections, score_threshold, "cpu", metric, max_detections)

        def start(cls: type, options: Mapping[str, Any]) -> Any:
            return ray.remote(cls).options(num_cpus=needs.cpus, num_gpus=needs.gpus, **options)

        return RaySimilarity(ray, start, self._places(needs), kind, packed, memory_gib)

    def _hiring(self, spec: RoundSpec, model: ModelRef, needs: Needs) -> Callable[[], Any]:
        """What starts a process for shards."""
        worker = self._cluster.ray.remote(ShardWorker).options(num_cpus=needs.cpus, num_gpus=needs.gpus)
        checkpoint, read_there = FileStamp.of(model.checkpoint), partial(_read_at, self._cluster.home)
        return lambda: worker.remote(self._options, spec, model, checkpoint, read_there)

    def _placed(self, spec: RoundSpec) -> RoundSpec:
        """The round with a device that means the same on every node."""
        return replace(spec, device=self._cluster.kind_of(spec.device))

    def _needs(self, spec: RoundSpec, processes: int = 1) -> Needs:
        return Needs(self._options.threads * processes, processes if spec.device == "cuda" else 0)

    def _places(self, needs: Needs) -> int:
        """How many processes the cluster can hold."""
        return sum(
            int(min(node.cpus // needs.cpus, node.gpus // needs.gpus if needs.gpus else node.cpus))
            for node in self._cluster.nodes()
        )


def _read_at(node_id: str, paths: list[str]) -> list[bytes | None]:
    """Contents of files of another node; called on a node of the cluster."""
    import ray

    reader = ray.remote(read_files).options(num_cpus=0, scheduling_strategy=on_node(node_id))
    contents: list[bytes | None] = ray.get(reader.remote(paths))
    return contents


def _own(result: ShardResult) -> Iterator[Inferred]:
    """Results in memory of this process: Ray's arrays are read-only and keep its object store full."""
    for image_id, error in result.unreadable:
        log_unreadable(image_id, error)
    for item in result.inferred:
        yield copy.deepcopy(item)
