"""Training a detector of the zoo: an mmengine Runner with an iteration loop that resumes exactly."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppal_backend.acquisition.difficulty import DifficultyEMA
from ppal_backend.detector.checkpoints import (
    FINAL_NAME,
    load_final,
    newest_loadable,
    remove_training_checkpoints,
    save_final,
    training_checkpoints,
)
from ppal_backend.detector.config import build_config
from ppal_backend.detector.data import ImageRecord, TrainingData, read_coco
from ppal_backend.detector.difficulty_hook import DifficultyHook
from ppal_backend.detector.evaluation import Metrics, evaluate
from ppal_backend.detector.fetch import weights_file
from ppal_backend.detector.hooks import LossGuard, PlainCheckpoints, ProgressHook
from ppal_backend.detector.models import build_model, build_pipeline
from ppal_backend.detector.runner import LOG_NAME, Initialise, build_runner, remove_if_empty
from ppal_backend.detector.runtime import isolated, pick_device
from ppal_backend.detector.weights import apply_weights, load_checkpoint, state_dict_of
from ppal_backend.detector.zoo import ZooEntry, find_entry
from ppal_backend.errors import CheckpointError, DetectorError
from ppal_backend.files import write_json
from ppal_backend.structures.progress import OnProgress

__all__ = ["Metrics", "TrainRequest", "TrainResult", "evaluate", "train"]

logger = logging.getLogger(__name__)

REQUEST_NAME = "request.json"
CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class TrainRequest:
    """Everything that decides the outcome of a training.

    Args:
        detector: Name in the zoo.
        classes: Labels in the order of the class indices.
        train_json: COCO file with absolute ``file_name``; images without boxes count as true negatives.
        val_json: Not used while training; kept for callers that evaluate afterwards.
        work_dir: Folder of this training alone. A training that was cut off resumes from it.
        seed: Seed of initialisation, order and augmentation.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        init_weights: Checkpoint to start from; None for the zoo's own weights (none, for a detector
            that the zoo says trains from scratch); ``"random"`` for none at all.
        max_iterations: Cap on the optimiser steps; None follows the schedule.
        difficulty: Whether to follow class difficulty (Eq. 1 to 3).
        xi: Share of classification in Eq. 1.
        momentum: m0 of Eq. 2 and 3.
        absent: ``keep`` (Eq. 2) or ``drift`` for classes absent from a step.
        zoo_root: Folder of the zoo; None for the packaged one.
        weights_dir: Folder for downloaded weights; None for the default cache.
        workers: Data loader processes; None chooses none on a CPU and up to 4 on a GPU.
    """

    detector: str
    classes: tuple[str, ...]
    train_json: Path
    val_json: Path | None
    work_dir: Path
    seed: int = 0
    device: str = "auto"
    init_weights: Path | str | None = None
    max_iterations: int | None = None
    difficulty: bool = True
    xi: float = 0.6
    momentum: float = 0.99
    absent: str = "keep"
    zoo_root: Path | None = None
    weights_dir: Path | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if not self.classes:
            raise ValueError("expected at least one class; take them from the labeling config")
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ValueError(f"expected max_iterations >= 1 or None, got {self.max_iterations}")

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed training must have in common with the one that was cut off."""
        return {
            "detector": self.detector,
            "classes": list(self.classes),
            "train_sha256": hashlib.sha256(Path(self.train_json).read_bytes()).hexdigest(),
            "seed": self.seed,
            "init_weights": None if self.init_weights is None else str(self.init_weights),
            "max_iterations": self.max_iterations,
            "difficulty": [self.xi, self.momentum, self.absent] if self.difficulty else None,
        }


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Args:
        checkpoint: ``{"state_dict", "meta"}`` file, loadable with ``weights_only=True``.
        difficulty: ``[C]`` class difficulties in [0, 1], or None when they were not followed.
        iterations: Optimiser steps.
        final_loss: Mean loss of the last 20 steps.
        seconds: Wall time of the last stretch of training (a resumed training counts from its resumption).
    """

    checkpoint: Path
    difficulty: tuple[float, ...] | None
    iterations: int
    final_loss: float
    seconds: float


def train(
    request: TrainRequest,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train a detector, or finish a training that was cut off.

    Args:
        request: What to train on what.
        on_progress: Called at most twice a second with ``Progress("train", step, steps, remark)``.
        should_stop: Polled after every step.

    Returns:
        The result; at once when ``work_dir`` already holds it.

    Raises:
        RoundCancelled: ``should_stop`` said so; a checkpoint is on disk and the same call resumes from it.
        WeightsUnavailable: Initial weights cannot be had.
        CheckpointError: Initial weights are damaged, unsafe or of another architecture.
        UnsupportedHead: Difficulty is wanted and no probe covers the head.
        DatasetError: The COCO file cannot be read.
        ImageError: An image cannot be read.
        DetectorError: No images, a diverging loss, or a ``work_dir`` of another training.
    """
    entry = find_entry(request.detector, request.zoo_root)
    records = read_coco(request.train_json, request.classes)
    if not records:
        raise DetectorError(f"expected training images in {request.train_json}, found none; annotate images first")
    work_dir = Path(request.work_dir)
    _claim(work_dir, request)
    finished = work_dir / FINAL_NAME
    if finished.is_file():
        return _result(finished, request)
    device = pick_device(request.device)
    name = f"ppal-{uuid.uuid4().hex}"
    with isolated(name, work_dir / LOG_NAME):
        _run(request, entry, records, device, name, on_progress, should_stop)
    remove_training_checkpoints(work_dir)
    return _result(finished, request)


def _run(
    request: TrainRequest,
    entry: ZooEntry,
    records: tuple[ImageRecord, ...],
    device: torch.device,
    name: str,
    on_progress: OnProgress | None,
    should_stop: Callable[[], bool] | None,
) -> None:
    started = time.monotonic()
    random_start = _starts_random(request, entry)
    workers = request.workers
    if workers is None:
        workers = 0 if device.type == "cpu" else min(4, os.cpu_count() or 1)
    config = build_config(
        entry,
        request.classes,
        train_images=len(records),
        max_iterations=request.max_iterations,
        trained_backbone=not random_start,
        workers=workers,
    )
    write_json(Path(request.work_dir) / CONFIG_NAME, config.to_dict())
    guard = LossGuard()
    hook = DifficultyHook(
        DifficultyEMA(len(request.classes), request.momentum, request.absent), request.xi
    ) if request.difficulty else None  # fmt: skip
    resume_from = newest_loadable(Path(request.work_dir))
    data = TrainingData(records, build_pipeline(config.train_pipeline), request.classes, request.seed)
    torch.manual_seed(request.seed)
    runner = build_runner(
        config,
        data,
        build_model(config),
        device=device,
        name=name,
        work_dir=Path(request.work_dir),
        seed=request.seed,
        resume_from=resume_from,
        initialise=_initialiser(request, entry, resume_from),
    )
    extra = [guard, ProgressHook(guard, on_progress, should_stop), PlainCheckpoints()]
    for item in extra if hook is None else [hook, *extra]:
        runner.register_hook(item)
    try:
        model = runner.train()
    finally:
        if hook is not None:
            hook.detach()
        remove_if_empty(Path(runner.log_dir))
    _save_result(request, model, hook, guard, runner.max_iters, time.monotonic() - started)


def _starts_random(request: TrainRequest, entry: ZooEntry) -> bool:
    """Random weights are used where they were asked for, or where the zoo offers no others and says so."""
    nothing_else = request.init_weights is None and entry.weights is None
    return request.init_weights == "random" or (nothing_else and entry.from_scratch)


def _initialiser(request: TrainRequest, entry: ZooEntry, resume_from: Path | None) -> Initialise:
    """Choose, fetch and check the initial weights now, before anything is built."""
    if _starts_random(request, entry) or resume_from is not None:
        return lambda model: None
    if request.init_weights is None:
        path = weights_file(entry, request.weights_dir)
        kind = entry.weights.kind if entry.weights is not None else "detector"
    else:
        path, kind = Path(request.init_weights), "detector"
    tensors = state_dict_of(load_checkpoint(path), path)
    if kind == "detector" and not any(name.startswith("backbone.") for name in tensors):
        kind = "backbone"

    def initialise(model: torch.nn.Module) -> None:
        apply_weights(model, tensors, kind, path)

    return initialise


def _claim(work_dir: Path, request: TrainRequest) -> None:
    """Note in ``work_dir`` what is trained there; refuse a folder that holds another training."""
    work_dir.mkdir(parents=True, exist_ok=True)
    note = work_dir / REQUEST_NAME
    mine = request.fingerprint()
    begun = (work_dir / FINAL_NAME).is_file() or training_checkpoints(work_dir)
    if not note.is_file() or not begun:
        write_json(note, mine)
        return
    other = json.loads(note.read_text(encoding="utf-8"))
    if other != mine:
        changed = sorted(key for key in mine if other.get(key) != mine[key])
        raise DetectorError(
            f"{work_dir} holds another training (it differs in {', '.join(changed)}); use a folder of its own"
        )


def _save_result(
    request: TrainRequest,
    model: torch.nn.Module,
    hook: DifficultyHook | None,
    guard: LossGuard,
    iterations: int,
    seconds: float,
) -> None:
    inner = getattr(model, "module", model)
    meta = {
        "detector": request.detector,
        "classes": list(request.classes),
        "difficulty": None if hook is None else hook.ema.difficulty.tolist(),
        "iterations": iterations,
        "final_loss": guard.mean,
        "seconds": seconds,
        "seed": request.seed,
    }
    save_final(Path(request.work_dir) / FINAL_NAME, inner.state_dict(), meta)


def _result(path: Path, request: TrainRequest) -> TrainResult:
    final = load_final(path, request.detector, request.classes)
    try:
        return TrainResult(
            checkpoint=path,
            difficulty=final.difficulty,
            iterations=final.meta["iterations"],
            final_loss=final.meta["final_loss"],
            seconds=final.meta["seconds"],
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]!r}; delete it to train again") from error
