"""mmengine hooks of a training: class difficulty, the loss guard, progress and stopping, plain checkpoints."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, barrier, get_rank, is_distributed
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper

from ppal_backend.acquisition.difficulty import DifficultyEMA, training_difficulty
from ppal_backend.detector.heads import Positives, detection_head, read_training
from ppal_backend.detector.heads.base import Restore, override
from ppal_backend.errors import CheckpointError, DetectorError, RoundCancelled
from ppal_backend.structures.round import OnProgress, Progress

_REPORT_EVERY_S = 0.5


class RepeatableSteps(Hook):
    """Makes what a step draws at random depend on seed and step alone, so that a resumed training draws the same.

    That is torch's generator (dropout, samplers of proposals, noise of denoising queries) and the input size of
    mmdetection's ``BatchSyncRandomResize``, which otherwise remembers its size outside of checkpoints.

    Args:
        seed: Seed of the training.
    """

    priority = "VERY_HIGH"

    def __init__(self, seed: int) -> None:
        self._seed, self._restores = seed, list[Restore]()

    def before_train(self, runner: Any) -> None:
        """Take over the random sizes."""
        self.detach()
        for module in runner.model.modules():
            if type(module).__name__ == "BatchSyncRandomResize":
                self._restores.append(self._take_over(runner, module))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the step; processes draw different numbers."""
        del batch_idx, data_batch
        torch.manual_seed(self._number(5, runner.iter, get_rank()))

    def after_train(self, runner: Any) -> None:
        """Give them back."""
        del runner
        self.detach()

    def detach(self) -> None:
        """Leave the model as it was; harmless when nothing was taken over."""
        while self._restores:
            self._restores.pop()()

    def _number(self, *parts: int) -> int:
        return int(np.random.SeedSequence((self._seed, *parts)).generate_state(1)[0])

    def _take_over(self, runner: Any, resize: Any) -> Restore:
        forward = resize.forward

        def resizing(inputs: torch.Tensor, samples: Any) -> Any:
            height, width = inputs.shape[-2:]
            block = runner.iter // resize._interval
            low, high = resize._random_size_range
            size = low + self._number(4, block) % (high - low + 1)
            sides = (resize._size_divisor * size, resize._size_divisor * int(width / height * size))
            resize._input_size = sides if block else (height, width)
            return forward(inputs, samples)

        def unchanged(aspect_ratio: float, device: torch.device) -> Any:
            del aspect_ratio, device
            return resize._input_size

        return override(resize, forward=resizing, _get_random_size=unchanged)


class LateL1Loss(Hook):
    """Adds YOLOX's L1 loss from a step on, as its recipe does when mosaics end.

    Args:
        first: The step.
    """

    def __init__(self, first: int) -> None:
        self._first = first

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Switch the loss; the head says nothing of it in checkpoints."""
        del batch_idx, data_batch
        head: Any = detection_head(runner.model)
        head.use_l1 = runner.iter >= self._first


@contextmanager
def averaged_weights(runner: Any) -> Iterator[None]:
    """The model with the average of its weights where a hook keeps one, as it was with its own afterwards."""
    averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    for hook in averages:
        hook._swap_ema_parameters()
    try:
        yield
    finally:
        for hook in averages:
            hook._swap_ema_parameters()


class LossGuard(Hook):
    """Ends a training whose loss is no longer a number, and remembers the latest losses."""

    priority = "ABOVE_NORMAL"

    def __init__(self, window: int = 20) -> None:
        self.latest: deque[float] = deque(maxlen=window)

    @property
    def mean(self) -> float | None:
        """Mean loss over the latest steps; None before the first."""
        return sum(self.latest) / len(self.latest) if self.latest else None

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Check this step's loss.

        Raises:
            DetectorError: The loss is NaN or infinite.
        """
        del data_batch
        loss = _mean_of_processes(float(outputs["loss"].detach()) if outputs and "loss" in outputs else math.nan)
        if not math.isfinite(loss):
            raise DetectorError(
                f"training diverged: the loss of step {batch_idx + 1} of {runner.max_iters} is {loss}; lower the "
                f"learning rate of the detector's schedule or check the annotations for wrong boxes"
            )
        self.latest.append(loss)


def _mean_of_processes(value: float) -> float:
    if not is_distributed():
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    all_reduce(shared, op="mean")
    return float(shared)


class ProgressHook(Hook):
    """Reports steps, and stops the training when asked to, after saving a checkpoint.

    Args:
        guard: Knows the loss.
        on_progress: Told the step, and in words the loss and the latest mAP on held-out images.
        should_stop: Polled after every step. With several processes it is enough that one of them is told to stop.
        latest_map: Gives the latest mAP, or None before the first.
    """

    priority = "LOWEST"

    def __init__(
        self,
        guard: LossGuard,
        on_progress: OnProgress | None,
        should_stop: Callable[[], bool] | None,
        latest_map: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._guard = guard
        self._latest_map = latest_map
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._reported = -math.inf

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Report at most twice a second, and poll ``should_stop`` after every update of the weights.

        Raises:
            RoundCancelled: ``should_stop`` said so; the checkpoint of this step is on disk.
        """
        del data_batch, outputs
        done, total = batch_idx + 1, runner.max_iters
        now = time.monotonic()
        if self._on_progress is not None and (done == total or now - self._reported >= _REPORT_EVERY_S):
            self._reported = now
            self._on_progress(Progress("train", done, total, self._remark()))
        between_updates = done % int(runner.optim_wrapper._accumulative_counts) == 0
        if done < total and between_updates and self._is_to_stop():
            if not (Path(runner.work_dir) / f"iter_{done}.pth").is_file():
                runner.save_checkpoint(runner.work_dir, f"iter_{done}.pth", by_epoch=False)
            barrier()  # the first process writes: none may tell the caller before it has
            raise RoundCancelled(f"training was asked to stop at step {done} of {total}; it resumes from there")

    def _is_to_stop(self) -> bool:
        asked = self._should_stop is not None and self._should_stop()
        return _mean_of_processes(float(asked)) > 0

    def _remark(self) -> str:
        """What the steps show beside their number; whoever shows it tells the time that is left."""
        mean, found = self._guard.mean, self._latest_map()
        parts = [] if mean is None else [f"loss {mean:.3f}"]
        if found is not None:
            parts.append(f"mAP {found:.3f} on held-out images")
        return ", ".join(parts)


class PlainCheckpoints(Hook):
    """Keeps checkpoints loadable with ``weights_only=True``: log histories (numpy buffers) are left out."""

    priority = "LOWEST"

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Keep only plain values of the message hub."""
        del runner
        info = checkpoint.get("message_hub", {}).get("runtime_info", {})
        plain = {key: value for key, value in info.items() if _is_plain(value)}
        checkpoint["message_hub"] = {
            "log_scalars": {},
            "runtime_info": plain,
            "resumed_keys": dict.fromkeys(plain, True),
        }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return type(value) in (type(None), bool, int, float, str)  # numpy's floats are floats too, and not plain


CHECKPOINT_KEY = "ppal_difficulty"


class DifficultyHook(Hook):
    """Follows the difficulty of every class while a detector trains.

    It is read from the head's instance between the beginning and the end of a training. Losses,
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
        """Begin to read the head.

        Raises:
            UnsupportedHead: No family covers the detector's head.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.detach()
        self._restore = read_training(model, self._take)

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
        """Leave the head alone again."""
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
        probabilities, ious = positives.probabilities[usable].float(), positives.ious[usable].float()  # or half
        q = training_difficulty(probabilities, ious, self.xi)
        sums, counts = self.ema.sums_and_counts(positives.class_indices[usable], q)
        self._sums += sums
        self._counts += counts
