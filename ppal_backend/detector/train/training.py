"""Training a detector of the zoo: an mmengine Runner with an iteration loop that resumes exactly."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from ppal_backend.detector.data import read_coco
from ppal_backend.detector.infer.evaluation import Metrics, evaluate
from ppal_backend.detector.runtime import pick_device
from ppal_backend.detector.train.attempt import Attempt, free_memory, run_attempt
from ppal_backend.detector.train.distributed import check_processes, run_in_processes
from ppal_backend.detector.train.image_cache import FOLDER
from ppal_backend.detector.train.request import TrainRequest, TrainResult
from ppal_backend.detector.train.runner import require_tracker
from ppal_backend.detector.train.validation import BEST_NAME
from ppal_backend.detector.weights import (
    FINAL_NAME,
    load_final,
    newest_loadable,
    remove_training_checkpoints,
    training_checkpoints,
)
from ppal_backend.detector.weights.initial import find_weights
from ppal_backend.detector.zoo import ZooEntry, find_entry
from ppal_backend.errors import CheckpointError, DetectorError, OutOfMemory
from ppal_backend.files import read_json, write_json
from ppal_backend.structures.round import OnProgress

__all__ = ["Metrics", "TrainRequest", "TrainResult", "evaluate", "train"]

logger = logging.getLogger(__name__)

REQUEST_NAME = "request.json"
BATCH_NAME = "batch.json"


def train(
    request: TrainRequest,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train a detector, or finish a training that was cut off.

    When a step does not fit into memory, the training begins again with half the batch, half the learning rate and
    twice the steps (see :func:`config.with_batch_size`), once; what is resumed later keeps the smaller batch.

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
        UnsupportedHead: Difficulty is wanted and no head family reads it.
        OutOfMemory: Half the batch does not fit into memory either.
        DatasetError: The COCO file cannot be read.
        ImageError: An image cannot be read.
        DetectorError: No images, a diverging loss, a ``work_dir`` of another training, more processes than GPUs,
            or a tracker that is not installed.
    """
    entry = find_entry(request.detector, request.zoo_root)
    if not read_coco(request.train_json, request.classes):
        raise DetectorError(f"expected training images in {request.train_json}, found none; annotate images first")
    work_dir = Path(request.work_dir)
    _claim(work_dir, request)
    finished = work_dir / FINAL_NAME
    if finished.is_file():
        return _result(finished, request)
    require_tracker(request.tracking)
    try:
        _attempt(request, entry, on_progress, should_stop)
    except OutOfMemory as error:
        _halve_batch(request, entry, error)
    if not finished.is_file():
        free_memory()  # here the error, and with it everything that its traceback held, is gone
        _attempt(request, entry, on_progress, should_stop)
    _clean(work_dir)
    (work_dir / BATCH_NAME).unlink(missing_ok=True)
    return _result(finished, request)


def _attempt(
    request: TrainRequest,
    entry: ZooEntry,
    on_progress: OnProgress | None,
    should_stop: Callable[[], bool] | None,
) -> None:
    work_dir = Path(request.work_dir)
    device = pick_device(request.device)
    batch_size = _batch_size(work_dir, entry)
    check_processes(request.processes, batch_size, device)
    resume_from = newest_loadable(work_dir)
    weights = find_weights(request, entry) if resume_from is None else None
    attempt = Attempt(request, device, batch_size, resume_from, weights)
    run = run_attempt if request.processes == 1 else run_in_processes
    run(attempt, on_progress, should_stop)


def _batch_size(work_dir: Path, entry: ZooEntry) -> int:
    note = work_dir / BATCH_NAME
    return int(read_json(note)["batch_size"]) if note.is_file() else entry.schedule.batch_size


def _halve_batch(request: TrainRequest, entry: ZooEntry, error: OutOfMemory) -> None:
    """Note the smaller batch and make the folder ready for a new beginning.

    Raises:
        OutOfMemory: The batch was halved before, or cannot be.
    """
    work_dir = Path(request.work_dir)
    half = entry.schedule.batch_size // (2 * request.processes) * request.processes
    if half < 1 or (work_dir / BATCH_NAME).is_file():
        raise error
    logger.warning("%s; trying once more with a batch size of %d", error, half)
    _clean(work_dir)
    write_json(work_dir / BATCH_NAME, {"batch_size": half})


def _clean(work_dir: Path) -> None:
    remove_training_checkpoints(work_dir)
    (work_dir / BEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(work_dir / FOLDER, ignore_errors=True)


def _claim(work_dir: Path, request: TrainRequest) -> None:
    """Note in ``work_dir`` what is trained there; refuse a folder that holds another training."""
    work_dir.mkdir(parents=True, exist_ok=True)
    note = work_dir / REQUEST_NAME
    mine = request.fingerprint()
    begun = (work_dir / FINAL_NAME).is_file() or training_checkpoints(work_dir)
    other = read_json(note) if note.is_file() else None
    if other is None or not begun:
        if other != mine:  # what an attempt at something else has left is of no use
            (work_dir / BEST_NAME).unlink(missing_ok=True)
            (work_dir / BATCH_NAME).unlink(missing_ok=True)
        write_json(note, mine)
        return
    if other != mine:
        changed = sorted(key for key in mine if other.get(key) != mine[key])
        raise DetectorError(
            f"{work_dir} holds another training (it differs in {', '.join(changed)}); use a folder of its own"
        )


def _result(path: Path, request: TrainRequest) -> TrainResult:
    final = load_final(path, request.detector, request.classes)
    try:
        return TrainResult(
            checkpoint=path,
            difficulty=final.difficulty,
            iterations=final.meta["iterations"],
            final_loss=final.meta["final_loss"],
            seconds=final.meta["seconds"],
            best_step=final.meta.get("best_step"),
            best_map=final.meta.get("best_map"),
            slices=final.meta.get("slices"),
            why_slices=final.meta.get("why_slices", ""),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]!r}; delete it to train again") from error
