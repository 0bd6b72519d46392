"""Training and inference in this process, on its GPU or CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ppal_backend.errors import ImageError, RoundCancelled
from ppal_backend.rounds.ports import Inferred, PoolEntry, Trained
from ppal_backend.structures.progress import OnProgress
from ppal_backend.structures.round import ModelRef, RoundSpec

log = logging.getLogger(__name__)


class LocalEngine:
    """The detector room behind the engine port. mmdetection is imported at the first use.

    Args:
        zoo_root: folder of the model zoo; None for the packaged one.
        threads: CPU threads; None leaves torch's choice.
    """

    def __init__(self, zoo_root: Path | None = None, threads: int | None = None) -> None:
        self._zoo_root = zoo_root
        if threads is not None:
            import torch

            torch.set_num_threads(threads)

    def train(
        self, spec: RoundSpec, labels: tuple[str, ...], train_json: Path, folder: Path,
        on_progress: OnProgress, should_stop: Callable[[], bool],
    ) -> Trained:  # fmt: skip
        from ppal_backend.detector.training import TrainRequest, train

        request = TrainRequest(
            detector=spec.detector,
            classes=labels,
            train_json=train_json,
            val_json=None,
            work_dir=folder,
            seed=spec.seed,
            device=spec.device,
            init_weights="random" if spec.init_weights == "random" else None,
            max_iterations=spec.max_iterations,
            zoo_root=self._zoo_root,
            **spec.difficulty_options,
        )
        result = train(request, on_progress, should_stop)
        model = ModelRef(spec.detector, str(result.checkpoint), labels, result.difficulty)
        return Trained(model, {"iterations": result.iterations, "loss": result.final_loss})

    def evaluate(self, spec: RoundSpec, model: ModelRef, ann_json: Path) -> Mapping[str, Any]:
        from ppal_backend.detector.evaluation import evaluate

        return asdict(
            evaluate(
                model.detector, Path(model.checkpoint), model.labels, ann_json, spec.device, zoo_root=self._zoo_root
            )
        )

    def infer(
        self, spec: RoundSpec, model: ModelRef, images: Iterable[PoolEntry],
        on_progress: OnProgress, should_stop: Callable[[], bool],
    ) -> Iterator[Inferred]:  # fmt: skip
        from ppal_backend.detector.inference import PoolImage, PoolInference

        detector = PoolInference(model.detector, Path(model.checkpoint), model.labels, spec.device, self._zoo_root)
        pool = (PoolImage(entry.image_id, entry.path) for entry in images)
        for result in detector.run_with_features(pool, on_progress=on_progress, on_error=_log_unreadable):
            if should_stop():
                raise RoundCancelled("stopped during inference; images done so far are kept")
            yield Inferred(result.detections, result.features)


def _log_unreadable(image_id: int, error: ImageError) -> None:
    log.warning("task %d is left without predictions: %s", image_id, error)
