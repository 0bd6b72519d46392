"""Small mmengine hooks of a training: the loss guard, progress and stopping."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from ppal_backend.errors import DetectorError, RoundCancelled
from ppal_backend.structures.progress import OnProgress, Progress

_REPORT_EVERY_S = 0.5


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
        loss = float(outputs["loss"].detach()) if outputs and "loss" in outputs else math.nan
        if not math.isfinite(loss):
            raise DetectorError(
                f"training diverged: the loss of step {batch_idx + 1} of {runner.max_iters} is {loss}; lower the "
                f"learning rate of the detector's schedule or check the annotations for wrong boxes"
            )
        self.latest.append(loss)


class ProgressHook(Hook):
    """Reports steps, and stops the training when asked to, after saving a checkpoint."""

    priority = "LOWEST"

    def __init__(
        self, guard: LossGuard, on_progress: OnProgress | None, should_stop: Callable[[], bool] | None
    ) -> None:
        self._guard = guard
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._reported = -math.inf

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Report at most twice a second, and poll ``should_stop`` every step.

        Raises:
            RoundCancelled: ``should_stop`` said so; the checkpoint of this step is on disk.
        """
        del data_batch, outputs
        done, total = batch_idx + 1, runner.max_iters
        now = time.monotonic()
        if self._on_progress is not None and (done == total or now - self._reported >= _REPORT_EVERY_S):
            self._reported = now
            mean = self._guard.mean
            self._on_progress(Progress("train", done, total, "" if mean is None else f"loss {mean:.3f}"))
        if done < total and self._should_stop is not None and self._should_stop():
            if not (Path(runner.work_dir) / f"iter_{done}.pth").is_file():
                runner.save_checkpoint(runner.work_dir, f"iter_{done}.pth", by_epoch=False)
            raise RoundCancelled(f"training was asked to stop at step {done} of {total}; it resumes from there")


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
