"""Training and inference in this process, on its GPU or CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppal_backend.errors import ImageError, RoundCancelled
from ppal_backend.rounds.ports import Inferred, PoolEntry, Trained, TrainingFiles
from ppal_backend.structures.round import AS_IS, RIVAL_NAMES, ModelRef, OnProgress, RoundSpec

if TYPE_CHECKING:
    from ppal_backend.detector.infer.inference import PoolInference

log = logging.getLogger(__name__)


def yield_while_waiting() -> None:
    """Let idle OpenMP threads sleep instead of spinning; call before torch is imported.

    Spinning threads of several processes on few cores take each other's time: with two cores and other work on
    them, a small training step took three to four times as long. The operator's own OMP_WAIT_POLICY wins.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class LocalEngine:
    """The detector room behind the engine port. mmdetection is imported at the first use.

    Args:
        zoo_root: folder of the model zoo; None for the packaged one.
        threads: CPU threads; None leaves torch's choice.
        processes: Processes that train one detector together, each with a GPU of its own.
        tracking: ``tensorboard`` or ``mlflow`` for curves of the trainings; None for neither.
        weights_dir: folder for downloaded weights; None for the default one of this user.
    """

    def __init__(
        self,
        zoo_root: Path | None = None,
        threads: int | None = None,
        processes: int = 1,
        tracking: str | None = None,
        weights_dir: Path | None = None,
    ) -> None:
        self._zoo_root, self._processes, self._tracking = zoo_root, processes, tracking
        self._weights_dir = weights_dir
        if threads is not None:
            import torch

            torch.set_num_threads(threads)

    def kind_of(self, device: str) -> str:
        """``cuda`` or ``cpu``: what ``DEVICE`` means here."""
        import torch

        return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device.split(":")[0]

    def train(
        self, spec: RoundSpec, labels: tuple[str, ...], files: TrainingFiles, folder: Path,
        on_progress: OnProgress, should_stop: Callable[[], bool],
    ) -> Trained:  # fmt: skip
        from ppal_backend.detector.train.training import TrainRequest, train

        request = TrainRequest(
            detector=spec.detector,
            classes=labels,
            train_json=files.train,
            val_json=files.validation,
            work_dir=folder,
            seed=spec.seed,
            device=spec.device,
            init_weights=_start(spec),
            max_iterations=spec.max_iterations,
            difficulty=spec.difficulty,
            zoo_root=self._zoo_root,
            unlabelled=tuple(files.unlabelled),
            patience=spec.patience,
            processes=self._processes,
            deterministic=spec.deterministic,
            mixed_precision=spec.mixed_precision,
            tracking=self._tracking,
            weights_dir=self._weights_dir,
            slices=spec.slices,
            known=spec.known,
            rival=spec.strategy if spec.strategy in RIVAL_NAMES else None,
            **spec.difficulty_options,
        )
        result = train(request, on_progress, should_stop)
        model = ModelRef(spec.detector, str(result.checkpoint), labels, result.difficulty)
        facts: dict[str, Any] = {"iterations": result.iterations, "loss": result.final_loss}
        if result.best_step is not None:
            facts["best_step"] = result.best_step
        if result.why_slices:
            facts.update(slices=result.slices, why_slices=result.why_slices)
        return Trained(model, facts)

    def untrained(self, spec: RoundSpec, labels: tuple[str, ...], folder: Path) -> ModelRef | None:
        from ppal_backend.detector.weights.initial import save_untrained

        path = folder / "untrained.pth"
        if not save_untrained(spec.detector, labels, path, spec.device, self._zoo_root, self._weights_dir):
            return None
        return ModelRef(spec.detector, str(path), labels)

    def as_is(self, spec: RoundSpec, labels: tuple[str, ...], folder: Path) -> ModelRef:
        from ppal_backend.detector.weights.initial import save_as_is

        tile = spec.slices if isinstance(spec.slices, int) else None  # nothing is labelled yet that could decide
        save_as_is(spec.detector, labels, spec.known, folder / AS_IS, self._zoo_root, self._weights_dir, tile)
        return ModelRef(spec.detector, str(folder / AS_IS), labels)

    def evaluate(
        self, spec: RoundSpec, model: ModelRef, ann_json: Path,
        earlier: Mapping[int, ModelRef] | None = None, folder: Path | None = None,
    ) -> Mapping[str, Any]:  # fmt: skip
        from ppal_backend.detector.infer.evaluation import evaluate, evaluate_versions

        if folder is None:
            return asdict(
                evaluate(
                    model.detector, Path(model.checkpoint), model.labels, ann_json, spec.device, zoo_root=self._zoo_root
                )
            )
        found = asdict(
            evaluate_versions(spec.number, model, earlier or {}, ann_json, folder, spec.device, self._zoo_root)
        )
        return {**found.pop("metrics"), **found}

    def infer(
        self, spec: RoundSpec, model: ModelRef, images: Iterable[PoolEntry],
        on_progress: OnProgress, should_stop: Callable[[], bool],
    ) -> Iterator[Inferred]:  # fmt: skip
        from ppal_backend.detector.infer.inference import PoolImage

        detector = self.open(spec, model)
        pool = (PoolImage(entry.image_id, entry.path) for entry in images)
        for result in detector.run_with_features(pool, on_progress=on_progress, on_error=log_unreadable):
            if should_stop():
                raise RoundCancelled("stopped during inference; images done so far are kept")
            yield Inferred(result.detections, result.features)

    def open(self, spec: RoundSpec, model: ModelRef) -> PoolInference:
        """A detector ready to look at the pool of a round."""
        from ppal_backend.acquisition.strategies import READS_COUNTS
        from ppal_backend.detector.infer.inference import PoolInference

        return PoolInference(
            model.detector, Path(model.checkpoint), model.labels, spec.device, self._zoo_root,
            count=spec.strategy in READS_COUNTS, embedding=spec.embedding, levels=spec.levels,
        )  # fmt: skip


def _start(spec: RoundSpec) -> str | None:
    """Where a training starts from: a checkpoint, ``random``, or None for the zoo's weights."""
    if spec.init_weights == "random":
        return "random"
    if spec.init_weights == "last" and spec.model is not None:
        if spec.model.detector == spec.detector:
            return spec.model.checkpoint
        log.info("%s starts from the zoo's weights: the last version is of %s", spec.detector, spec.model.detector)
    return None


def log_unreadable(image_id: int, error: ImageError) -> None:
    """Tell that an image of the pool cannot be looked at."""
    log.warning("task %d is left without predictions: %s", image_id, error)
