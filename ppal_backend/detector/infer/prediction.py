"""Running a loaded detector over images in batches, exactly as mmdet's own ``test_step`` does."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from mmcv.transforms import Compose
from mmengine.dataset import pseudo_collate

from ppal_backend.detector.data import ImageRecord, data_info, run_pipeline
from ppal_backend.detector.models import LoadedDetector
from ppal_backend.errors import ImageError

OnError = Callable[[int, ImageError], None]
Packed = dict[str, Any]
_BATCHES_AHEAD = 2


def batch_size_for(loaded: LoadedDetector, batch_size: int | None) -> int:
    """The batch size to use: the caller's, or the zoo's for this kind of device.

    Raises:
        ValueError: The caller's is below 1.
    """
    if batch_size is None:
        return loaded.entry.batch_cuda if loaded.device.type == "cuda" else loaded.entry.batch_cpu
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    return batch_size


def workers_for(device: torch.device, workers: int | None) -> int:
    """How many threads decode images: the caller's number, or none beside a CPU and up to 4 beside a GPU.

    Raises:
        ValueError: The caller's is below 0.
    """
    if workers is None:
        return 0 if device.type == "cpu" else min(4, os.cpu_count() or 1)
    if workers < 0:
        raise ValueError(f"expected workers >= 0, got {workers}")
    return workers


def mixed_precision(device: torch.device, wanted: bool) -> AbstractContextManager[Any]:
    """Half precision where it is safe, on CUDA; on a CPU always full precision, as detectors fail or crawl there."""
    return torch.autocast("cuda", torch.float16) if wanted and device.type == "cuda" else nullcontext()


def read_batches(
    pipeline: Compose, records: Sequence[ImageRecord], batch_size: int, workers: int = 0
) -> Iterator[list[tuple[ImageRecord, Packed | ImageError]]]:
    """Read and pack images, in order.

    Args:
        pipeline: mmdet's test pipeline, built; its steps must keep no state, as several threads run them.
        records: Images; only id and path are used.
        batch_size: Images of a batch.
        workers: Threads that read ahead, by two batches at most; with 0 a batch is read when it is asked for.

    Yields:
        Batches of each image with what the detector takes, or with why it cannot be read.
    """
    if not workers:
        for start in range(0, len(records), batch_size):
            yield [(record, _read(pipeline, record)) for record in records[start : start + batch_size]]
        return
    waiting: deque[tuple[ImageRecord, Future[Packed | ImageError]]] = deque()
    rest = iter(records)
    with ThreadPoolExecutor(workers, "ppal-decode") as threads:
        try:
            for start in range(0, len(records), batch_size):
                for record in rest:
                    waiting.append((record, threads.submit(_read, pipeline, record)))
                    if len(waiting) == (1 + _BATCHES_AHEAD) * batch_size:
                        break
                due = [waiting.popleft() for _ in records[start : start + batch_size]]
                yield [(record, future.result()) for record, future in due]
        finally:
            for _, future in waiting:
                future.cancel()


def _read(pipeline: Compose, record: ImageRecord) -> Packed | ImageError:
    try:
        return run_pipeline(pipeline, data_info(record))
    except ImageError as error:
        return error


def readable(
    batch: Sequence[tuple[ImageRecord, Packed | ImageError]], on_error: OnError | None = None
) -> tuple[list[ImageRecord], list[Packed]]:
    """The images of a batch that could be read, and what the detector takes; the others go to ``on_error``.

    Raises:
        ImageError: An image cannot be read and there is no ``on_error``.
    """
    kept: list[ImageRecord] = []
    packed: list[Packed] = []
    for record, item in batch:
        if not isinstance(item, ImageError):
            kept.append(record)
            packed.append(item)
        elif on_error is None:
            raise item
        else:
            on_error(record.image_id, item)
    return kept, packed


def predict_packed(loaded: LoadedDetector, packed: Sequence[Packed], amp: bool = False) -> list[Any]:
    """Predict a batch of packed images.

    Args:
        loaded: Detector in evaluation mode.
        packed: What the pipeline made of the images, at least one.
        amp: Whether to use half precision on CUDA.

    Returns:
        mmdet's data samples, boxes in pixels of the original image.
    """
    with torch.no_grad(), mixed_precision(loaded.device, amp):
        return list(loaded.model.test_step(pseudo_collate(packed)))


def predict_batch(
    loaded: LoadedDetector, records: Sequence[ImageRecord], on_error: OnError | None = None
) -> tuple[list[ImageRecord], list[Any]]:
    """Read and predict a batch of images in full precision.

    Args:
        loaded: Detector in evaluation mode.
        records: Images; only id and path are used.
        on_error: Called with id and error for an image that cannot be read, which is then left out.

    Returns:
        The images that could be read, in order, and mmdet's data samples for them, boxes in pixels of the
        original image. Both are empty when none could be read.

    Raises:
        ImageError: An image cannot be read and there is no ``on_error``.
    """
    kept, packed = readable([(record, _read(loaded.pipeline, record)) for record in records], on_error)
    return kept, predict_packed(loaded, packed) if packed else []
