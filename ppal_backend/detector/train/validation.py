"""The best weights of a training by their mAP on held-out images, and an end when nothing gets better."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import broadcast, is_distributed, is_main_process
from mmengine.hooks import Hook

from ppal_backend.detector.train.hooks import averaged_weights
from ppal_backend.detector.train.semi import predicting_part
from ppal_backend.detector.weights import load_final, save_final
from ppal_backend.errors import CheckpointError

logger = logging.getLogger(__name__)

BEST_NAME = "best.pth"
EVALUATIONS = 4
_TRAINED_PER_EVALUATED = 4

Evaluate = Callable[[torch.nn.Module], float]


@dataclass(frozen=True)
class Best:
    """The best weights so far: the step after which they were taken, and their mAP in [0, 1]."""

    step: int
    map: float


def validation_steps(total: int, batch_size: int, images: int) -> tuple[int, ...]:
    """Steps after which to evaluate: evenly spaced, the last one included.

    All evaluations together look at no more than a quarter as many images as the training does, and there are four
    of them at most. One alone could not choose anything, so there are two at least or none.

    Args:
        total: Optimiser steps of the training.
        batch_size: Images a step.
        images: Held-out images.

    Returns:
        Rising steps from 1 to ``total``; empty when there is nothing to evaluate on, or no time for it.
    """
    if images < 1:
        return ()
    count = min(EVALUATIONS, total, total * batch_size // (_TRAINED_PER_EVALUATED * images))
    return tuple(round(total * number / count) for number in range(1, count + 1)) if count > 1 else ()


class ValidationHook(Hook):
    """Evaluates a few times while a detector trains, keeps the best weights on disk, and can end the training.

    The weights go to ``best.pth`` with their step and mAP. This file alone says what is best so far: it is written
    whole or not at all, so a training that was killed anywhere goes on with it. Where two evaluations are equal the
    later weights are kept. Training itself is not touched: an evaluation draws no random numbers and leaves the
    model as it was. With several processes the first one evaluates, the others wait for its word.

    Args:
        evaluate: Gives the mAP in [0, 1] of the detector that predicts, which is in evaluation mode.
        steps: See :func:`validation_steps`.
        path: File of the best weights.
        detector: Name in the zoo, kept in the file.
        classes: Labels in the order of the class indices, kept in the file.
        patience: Evaluations without a better mAP after which training ends; None never ends it.
    """

    priority = "BELOW_NORMAL"

    def __init__(
        self,
        evaluate: Evaluate,
        steps: tuple[int, ...],
        path: Path,
        detector: str,
        classes: tuple[str, ...],
        patience: int | None = None,
    ) -> None:
        self._evaluate, self._steps, self._path, self._patience = evaluate, steps, path, patience
        self._detector, self._classes = detector, classes
        self.best: Best | None = None
        self.latest: float | None = None

    def before_train(self, runner: Any) -> None:
        """Take up the best weights that an attempt which was cut off has left."""
        self.best = self._read()
        self._end_if_due(runner, runner.iter)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Evaluate when it is time to."""
        del data_batch, outputs
        step = batch_idx + 1
        if step not in self._steps:
            return
        found = torch.zeros(1, dtype=torch.float64)
        if is_main_process():
            found[0] = self._look(runner, step)
        if is_distributed():
            broadcast(found)
        self.latest = float(found)
        if self._is_best(self.latest):
            self.best = Best(step, self.latest)
        self._end_if_due(runner, step)

    def weights(self, last_step: int) -> dict[str, torch.Tensor] | None:
        """The best weights, or None when they are those of the last step (or there are none)."""
        if self.best is None or self.best.step >= last_step:
            return None
        return load_final(self._path, self._detector, self._classes).state_dict

    def _look(self, runner: Any, step: int) -> float:
        model = predicting_part(runner.model)
        with averaged_weights(runner):
            model.eval()
            try:
                found = self._evaluate(model)
            finally:
                runner.model.train()
            runner.visualizer.add_scalar("held_out/map", found, step)
            if self._is_best(found):
                facts = {"detector": self._detector, "classes": list(self._classes), "step": step, "map": found}
                save_final(self._path, model.state_dict(), facts)
        return found

    def _is_best(self, found: float) -> bool:
        return self.best is None or found >= self.best.map

    def _end_if_due(self, runner: Any, step: int) -> None:
        if self._patience is None or self.best is None:
            return
        if sum(self.best.step < done <= step for done in self._steps) >= self._patience:
            logger.info("training ends at step %d: nothing better since step %d", step, self.best.step)
            runner.train_loop.stop_training = True

    def _read(self) -> Best | None:
        if not self._path.is_file():
            return None
        try:
            meta = load_final(self._path, self._detector, self._classes).meta
            return Best(int(meta["step"]), float(meta["map"]))
        except (CheckpointError, KeyError) as error:
            logger.warning("the best weights so far are lost: %s", error)
            return None
