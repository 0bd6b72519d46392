"""Training difficulty of classes, kept by an mmengine hook beside an unchanged training (Eq. 1 to 3)."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import all_reduce, is_distributed
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ppal_backend.acquisition.difficulty import DifficultyEMA, training_difficulty
from ppal_backend.detector.probes import Positives, attach_probe
from ppal_backend.detector.probes.base import Restore
from ppal_backend.errors import CheckpointError

CHECKPOINT_KEY = "ppal_difficulty"


class DifficultyHook(Hook):
    """Follows the difficulty of every class while a detector trains.

    The probe of the head is attached to the head's instance before training and detached after it. Losses,
    gradients and weights are bitwise what they are without the hook. With several processes the sums and
    counts of a step are added up before the average moves, so that all processes hold the same state. The
    state is saved in checkpoints and restored from them.

    Args:
        ema: Moving average to feed.
        xi: Share of classification against localisation in Eq. 1, in [0, 1].
    """

    priority = "NORMAL"

    def __init__(self, ema: DifficultyEMA, xi: float = 0.6) -> None:
        self.ema = ema
        self.xi = xi
        self._sums = torch.zeros(ema.num_classes, dtype=torch.float64)
        self._counts = torch.zeros(ema.num_classes, dtype=torch.float64)
        self._restore: Restore | None = None

    def before_train(self, runner: Any) -> None:
        """Attach the probe.

        Raises:
            UnsupportedHead: No probe covers the detector's head.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.detach()
        self._restore = attach_probe(model, self._take)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Move the average by what this step's positives said."""
        del runner, batch_idx, data_batch, outputs
        sums, counts = self._sums, self._counts
        self._sums, self._counts = torch.zeros_like(sums), torch.zeros_like(counts)
        if is_distributed():
            all_reduce(sums)
            all_reduce(counts)
        self.ema.update_from_sums(sums, counts)

    def after_train(self, runner: Any) -> None:
        """Detach the probe."""
        del runner
        self.detach()

    def detach(self) -> None:
        """Put the head's own methods back; harmless when nothing is attached."""
        if self._restore is not None:
            self._restore()
            self._restore = None

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Save the state beside the weights."""
        del runner
        checkpoint[CHECKPOINT_KEY] = self.ema.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the state of a resumed training.

        Raises:
            CheckpointError: The state belongs to other classes.
        """
        del runner
        if CHECKPOINT_KEY in checkpoint:
            try:
                self.ema.load_state_dict(checkpoint[CHECKPOINT_KEY])
            except (KeyError, ValueError) as error:
                raise CheckpointError(f"the difficulty state in the checkpoint does not fit: {error}") from error

    def _take(self, positives: Positives) -> None:
        usable = positives.probabilities.isfinite() & positives.ious.isfinite()
        q = training_difficulty(positives.probabilities[usable], positives.ious[usable], self.xi)
        sums, counts = self.ema.sums_and_counts(positives.class_indices[usable], q)
        self._sums += sums
        self._counts += counts
