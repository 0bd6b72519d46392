"""One attempt at a training, in this process; the only one, or one of several that share every batch."""

from __future__ import annotations

import gc
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process

from ppal_backend.acquisition.difficulty import DifficultyEMA
from ppal_backend.detector.config import build_config
from ppal_backend.detector.data import ImageRecord, build_pipeline, read_coco, training_stream
from ppal_backend.detector.infer.evaluation import evaluate_loaded
from ppal_backend.detector.models import LoadedDetector, build_model
from ppal_backend.detector.open_vocabulary import Prompts
from ppal_backend.detector.recipe import device_optimizer
from ppal_backend.detector.rivals import find_rival
from ppal_backend.detector.runtime import deterministic, isolated
from ppal_backend.detector.slices import choose, slice_steps, windows
from ppal_backend.detector.train.hooks import (
    DifficultyHook,
    LateL1Loss,
    LossGuard,
    PlainCheckpoints,
    ProgressHook,
    RepeatableSteps,
    averaged_weights,
)
from ppal_backend.detector.train.image_cache import FOLDER, with_image_cache
from ppal_backend.detector.train.request import TrainRequest
from ppal_backend.detector.train.runner import (
    LOG_NAME,
    TrainingRunner,
    build_runner,
    half_precision,
    remove_if_empty,
    visualizer_config,
)
from ppal_backend.detector.train.semi import predicting_part, prepare_teacher
from ppal_backend.detector.train.validation import BEST_NAME, ValidationHook, validation_steps
from ppal_backend.detector.weights import FINAL_NAME, FinalCheckpoint, save_final
from ppal_backend.detector.weights.initial import InitialWeights, initialiser, starts_random
from ppal_backend.detector.zoo import ZooEntry, find_entry
from ppal_backend.errors import OutOfMemory
from ppal_backend.files import write_json
from ppal_backend.structures.round import OnProgress

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
_AFTER_THE_STEP = 49  # as in mmdetection: the average moves before anything looks at it
ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class Attempt:
    """What one attempt does beyond what was requested.

    Args:
        request: What to train on what.
        device: Where; with several processes this is that of the first.
        batch_size: Images a step, of all processes together.
        resume_from: Step checkpoint to go on from, already checked, or None.
        weights: Where to start from otherwise; None for random weights.
    """

    request: TrainRequest
    device: torch.device
    batch_size: int
    resume_from: Path | None
    weights: InitialWeights | None


def run_attempt(attempt: Attempt, on_progress: OnProgress | None, should_stop: ShouldStop | None) -> None:
    """Train to the end and leave the final checkpoint in the request's ``work_dir``.

    Raises:
        RoundCancelled: ``should_stop`` said so; a checkpoint is on disk.
        OutOfMemory: A step does not fit into memory.
        DetectorError: A diverging loss, or an operation that is not deterministic where that was asked for.
    """
    request = attempt.request
    name = f"ppal-{uuid.uuid4().hex}"
    with ExitStack() as stack:
        stack.enter_context(memory_errors(request.detector, attempt.batch_size, attempt.device))
        stack.enter_context(isolated(name, Path(request.work_dir) / LOG_NAME if is_main_process() else None))
        stack.enter_context(deterministic(request.deterministic))
        _Training(attempt, name).run(on_progress, should_stop)


class _Training:
    """The parts of a training, put together."""

    def __init__(self, attempt: Attempt, name: str) -> None:
        self._attempt, self._name = attempt, name
        self._request, self._folder = attempt.request, Path(attempt.request.work_dir)
        self._entry = find_entry(self._request.detector, self._request.zoo_root)
        self._records = read_coco(self._request.train_json, self._request.classes)
        self._slicing = choose(self._request.slices, self._records, self._entry.input_size)
        self._prompts = Prompts.of(self._entry, self._request.classes, self._request.known, self._request.weights_dir)
        self._guard = LossGuard()
        self._rival = None if self._request.rival is None else find_rival(self._request.rival)
        reads = self._request.difficulty and (self._rival is None or self._rival.reads_difficulty)
        self._difficulty = DifficultyHook(
            DifficultyEMA(len(self._request.classes), self._request.momentum, self._request.absent), self._request.xi
        ) if reads else None  # fmt: skip

    def run(self, on_progress: OnProgress | None, should_stop: ShouldStop | None) -> None:
        """Train, and save the result."""
        started = time.monotonic()
        config = self._config()
        runner, teaching = self._runner(config)
        if is_main_process():
            write_json(self._folder / CONFIG_NAME, config.to_dict())
        validation = self._validation(config)
        progress = ProgressHook(
            self._guard, on_progress, should_stop, lambda: None if validation is None else validation.latest
        )
        steps = RepeatableSteps(self._request.seed)
        late = [LateL1Loss(config.late_from_step)] if config.get("late_l1") else []
        hooks = [steps, self._difficulty, *teaching, *late, self._guard, validation, progress, PlainCheckpoints()]
        if "weight_average" in config:
            runner.register_hook(dict(config.weight_average), priority=_AFTER_THE_STEP)
        for hook in hooks:
            if hook is not None:
                runner.register_hook(hook)
        try:
            model = runner.train()
        except BaseException:
            runner.visualizer.close()  # mmengine does so at the end of a training only
            raise
        finally:
            steps.detach()
            if self._difficulty is not None:
                self._difficulty.detach()
            if is_main_process():
                remove_if_empty(Path(runner.log_dir))
        if is_main_process():
            with averaged_weights(runner):
                self._save(model, validation, runner.iter, time.monotonic() - started)

    def _config(self) -> Config:
        workers = self._request.workers
        if workers is None:
            workers = 0 if self._attempt.device.type == "cpu" else min(4, os.cpu_count() or 1)
        config = build_config(
            self._entry,
            self._request.classes,
            train_images=len(self._records),
            max_iterations=self._request.max_iterations,
            trained_backbone=not starts_random(self._request, self._entry),
            workers=workers,
            batch_size=self._attempt.batch_size,
            prompts=self._prompts,
        )
        if self._rival is not None and self._rival.learns_from_unlabelled:
            config.unlabelled_pipeline, config.unlabelled_ratio = list(config.train_pipeline), 1
        for name in ("train_pipeline", "late_train_pipeline"):
            if name in config and self._slicing.tile is not None:
                config[name] = slice_steps(config[name], self._slicing.tile)
            if name in config:
                config[name] = with_image_cache(config[name], self._records, self._folder / FOLDER)
        return config

    def _runner(self, config: Config) -> tuple[TrainingRunner, list[Any]]:
        request = self._request
        data = training_stream(config, self._records, request.classes, request.seed, request.unlabelled)
        torch.manual_seed(request.seed)
        model = build_model(config, request.rival)
        self._set_precision(config, model)
        teaching = prepare_teacher(model, config.train_cfg.max_iters, unlabelled=bool(request.unlabelled))
        if self._rival is not None:
            teaching += self._rival.hooks(self._attempt.batch_size)
        resumes = self._attempt.resume_from is not None
        runner = build_runner(
            config,
            data,
            model,
            device=self._attempt.device,
            name=self._name,
            work_dir=self._folder,
            seed=request.seed,
            resume_from=self._attempt.resume_from,
            initialise=initialiser(None if resumes else self._attempt.weights, config, request.classes, self._records),
            visualizer=visualizer_config(request.tracking, self._folder),
        )
        runner.visualizer.add_config(Config({**config.to_dict(), "work_dir": str(self._folder)}))
        return runner, teaching

    def _set_precision(self, config: Config, model: torch.nn.Module) -> None:
        """Mixed precision where it was allowed, and what the file says about it left out where there is no GPU."""
        device, wrapper = self._attempt.device, dict(config.optim_wrapper)
        wanted = self._request.mixed_precision
        half = half_precision(model, self._entry.head_family, device) if wanted else None
        config.optim_wrapper = device_optimizer(wrapper, device.type, half)
        if device.type != "cuda" and wrapper["type"] == "AmpOptimWrapper":
            logger.info("mixed precision is left out: it needs a GPU, and this is %s", device)

    def _validation(self, config: Config) -> ValidationHook | None:
        request = self._request
        records = read_coco(request.val_json, request.classes) if request.val_json else ()
        if not any(record.instances for record in records):
            return None
        steps = validation_steps(config.train_cfg.max_iters, self._attempt.batch_size, self._views(records))
        if not steps:
            return None
        evaluate = _evaluation(
            self._entry, config, records, request.classes, self._attempt.device, self._facts_of_slicing()
        )
        path = self._folder / BEST_NAME
        return ValidationHook(evaluate, steps, path, request.detector, request.classes, request.patience)

    def _views(self, records: Sequence[ImageRecord]) -> int:
        """How many pictures an evaluation on these images looks at."""
        tile = self._slicing.tile
        return len(records) + sum(0 if tile is None else len(windows(r.width, r.height, tile)) for r in records)

    def _facts_of_slicing(self) -> dict[str, Any]:
        """What the checkpoint says of tiles; nothing where they were switched off."""
        if self._request.slices == "off":
            return {}
        return {"slices": self._slicing.tile, "why_slices": self._slicing.reason}

    def _save(self, model: torch.nn.Module, validation: ValidationHook | None, iterations: int, seconds: float) -> None:
        """Write the final checkpoint.

        The weights are the best ones; the difficulty is that of the end of the training whichever weights are the
        best, since it is an average over all steps (Eq. 2), made to say how hard the classes were to learn.
        """
        best = None if validation is None else validation.best
        state = None if validation is None else validation.weights(iterations)
        meta = {
            "detector": self._request.detector,
            "classes": list(self._request.classes),
            "difficulty": None if self._difficulty is None else self._difficulty.ema.difficulty.tolist(),
            "iterations": iterations,
            "final_loss": self._guard.mean,
            "seconds": seconds,
            "seed": self._request.seed,
            **({} if self._rival is None else {"rival": self._rival.name}),
            **({} if self._prompts is None else self._prompts.meta),
            **({} if best is None else {"best_step": best.step, "best_map": best.map}),
            **self._facts_of_slicing(),
        }
        save_final(self._folder / FINAL_NAME, predicting_part(model).state_dict() if state is None else state, meta)


def _evaluation(
    entry: ZooEntry,
    config: Config,
    records: tuple[ImageRecord, ...],
    classes: tuple[str, ...],
    device: torch.device,
    meta: dict[str, Any],
) -> Callable[[torch.nn.Module], float]:
    pipeline = build_pipeline(config.test_pipeline)

    def evaluate(model: torch.nn.Module) -> float:
        known = FinalCheckpoint({}, entry.name, classes, None, meta)
        found = evaluate_loaded(LoadedDetector(model, entry, config, known, device, pipeline), records).map
        return 0.0 if found is None else found

    return evaluate


_SIGNS = ("out of memory", "defaultcpuallocator", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or numpy says that memory is short, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def memory_errors(detector: str, batch_size: int, device: torch.device) -> Iterator[None]:
    """Turn every way of being short of memory into one error that people can act upon.

    Args:
        detector: Name in the zoo, for the message.
        batch_size: Images a step, for the message.
        device: Where the training runs, for the message.

    Raises:
        OutOfMemory: In place of what torch raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"the memory of {device} does not hold a training step of {detector} with a batch size of {batch_size}; "
            f"close other programs that use it, choose a smaller detector (ppal zoo list), or lower the batch_size "
            f"of the detector's schedule in zoo.toml"
        ) from error


def free_memory() -> None:
    """Give back what a failed attempt held; call it when its error is out of scope."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
