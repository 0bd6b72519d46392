"""Running a loaded detector over images in batches, exactly as mmdet's own ``test_step`` does.

A detector that learned from tiles looks at an image in several views: the whole, then every tile.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.dataset import pseudo_collate
from mmengine.structures import InstanceData

from ppal_backend.detector.data import ImageRecord, data_info, run_pipeline, run_steps
from ppal_backend.detector.infer.relabelling import iou_threshold_of
from ppal_backend.detector.models import LoadedDetector
from ppal_backend.detector.slices import Window, cut_by_window, merge, windows
from ppal_backend.errors import ImageError

OnError = Callable[[int, ImageError], None]
Packed = dict[str, Any]
_BATCHES_AHEAD = 2
_SLICED_SHARE = 4  # a batch of sliced images holds so many times fewer: each is several views


@dataclass(frozen=True)
class Views:
    """An image as a detector that slices looks at it.

    Args:
        size: Width and height of the image in pixels.
        windows: What each view shows of it; the first shows all.
        packed: What the detector takes for each.
    """

    size: tuple[int, int]
    windows: tuple[Window, ...]
    packed: tuple[Packed, ...]


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


def images_at_once(loaded: LoadedDetector, batch_size: int) -> int:
    """Images to read for a batch: fewer where each is several views, so that memory does not grow with the tiles."""
    return batch_size if loaded.tile is None else max(1, batch_size // _SLICED_SHARE)


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
    pipeline: Compose, records: Sequence[ImageRecord], batch_size: int, workers: int = 0, tile: int | None = None
) -> Iterator[list[tuple[ImageRecord, Any]]]:
    """Read and pack images, in order.

    Args:
        pipeline: mmdet's test pipeline, built; its steps must keep no state, as several threads run them.
        records: Images; only id and path are used.
        batch_size: Images of a batch.
        workers: Threads that read ahead, by two batches at most; with 0 a batch is read when it is asked for.
        tile: Side of the tiles in pixels, for a detector that slices.

    Yields:
        Batches of each image with what the detector takes (:class:`Views` with a ``tile``), or with why it cannot be
        read.
    """
    if not workers:
        for start in range(0, len(records), batch_size):
            yield [(record, _read(pipeline, record, tile)) for record in records[start : start + batch_size]]
        return
    waiting: deque[tuple[ImageRecord, Future[Packed | Views | ImageError]]] = deque()
    rest = iter(records)
    with ThreadPoolExecutor(workers, "ppal-decode") as threads:
        try:
            for start in range(0, len(records), batch_size):
                for record in rest:
                    waiting.append((record, threads.submit(_read, pipeline, record, tile)))
                    if len(waiting) == (1 + _BATCHES_AHEAD) * batch_size:
                        break
                due = [waiting.popleft() for _ in records[start : start + batch_size]]
                yield [(record, future.result()) for record, future in due]
        finally:
            for _, future in waiting:
                future.cancel()


def _read(pipeline: Compose, record: ImageRecord, tile: int | None = None) -> Packed | Views | ImageError:
    try:
        if tile is None:
            return run_pipeline(pipeline, data_info(record))
        return _views(pipeline, record, tile)
    except ImageError as error:
        return error


def _views(pipeline: Compose, record: ImageRecord, tile: int) -> Views:
    """Read an image once, and prepare the whole and every tile as the pipeline prepares an image."""
    reader, *others = pipeline.transforms
    info = data_info(record)
    read = run_pipeline(Compose([reader]), info)
    height, width = read["img"].shape[:2]
    shown: tuple[Window, ...] = ((0, 0, width, height), *windows(width, height, tile))
    packed = []
    for x1, y1, x2, y2 in shown:
        part = {**read, "img": read["img"][y1:y2, x1:x2], "instances": []}
        part.update(img_shape=(y2 - y1, x2 - x1), ori_shape=(y2 - y1, x2 - x1), height=y2 - y1, width=x2 - x1)
        packed.append(run_steps(others, part, info))
    return Views((width, height), shown, tuple(packed))


def readable(
    batch: Sequence[tuple[ImageRecord, Any]], on_error: OnError | None = None
) -> tuple[list[ImageRecord], list[Any]]:
    """The images of a batch that could be read, and what the detector takes; the others go to ``on_error``.

    Raises:
        ImageError: An image cannot be read and there is no ``on_error``.
    """
    kept: list[ImageRecord] = []
    packed: list[Any] = []
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
        mmdet's data samples, boxes in pixels of the original image, labels those of ``loaded.checkpoint.classes``.

    Raises:
        HalfPrecisionOverflow: Half precision has too small a range for this detector; full precision serves.
    """
    with torch.no_grad():
        with mixed_precision(loaded.device, amp):
            samples = list(loaded.model.test_step(pseudo_collate(packed)))
        if loaded.relabelling is not None:
            threshold = iou_threshold_of(loaded.model)
            for sample in samples:
                sample.pred_instances = loaded.relabelling.apply(sample.pred_instances, threshold)
    return samples


def predict_batch(loaded: LoadedDetector, records: Sequence[ImageRecord]) -> list[Any]:
    """Read and predict a batch of images in full precision.

    Args:
        loaded: Detector in evaluation mode.
        records: Images; only id and path are used.

    Returns:
        mmdet's data samples of the images, in order, boxes in pixels of the original image.

    Raises:
        ImageError: An image cannot be read.
    """
    _, packed = readable([(record, _read(loaded.pipeline, record, loaded.tile)) for record in records])
    if loaded.tile is None:
        return predict_packed(loaded, packed) if packed else []
    return [_predict_views(loaded, views) for views in packed]


def _predict_views(loaded: LoadedDetector, views: Views) -> Any:
    """The data sample of the whole image, with what all views show."""
    size = batch_size_for(loaded, None)
    samples = [
        sample for start in range(0, len(views.packed), size)
        for sample in predict_packed(loaded, views.packed[start : start + size])
    ]  # fmt: skip
    found = [sample.pred_instances.numpy() for sample in samples]
    boxes, kept = merge_views(
        views,
        [item.bboxes for item in found],
        [item.scores for item in found],
        [item.labels for item in found],
        loaded.most_detections,
    )
    whole = samples[0]
    whole.pred_instances = InstanceData(
        bboxes=torch.from_numpy(boxes[kept]),
        scores=torch.from_numpy(np.concatenate([item.scores for item in found])[kept]),
        labels=torch.from_numpy(np.concatenate([item.labels for item in found])[kept]),
    )
    return whole


def merge_views(
    views: Views,
    boxes: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    most: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Put the detections of all views of an image into one frame, and count every object once.

    Args:
        views: The image.
        boxes: ``[n, 4]`` of each view, in pixels of the view.
        scores: ``[n]`` of each view.
        labels: ``[n]`` class indices of each view.
        most: How many may stay; None for any number.

    Returns:
        ``[m, 4]`` boxes of all views in pixels of the image, and ``[k]`` which of them stay, by falling score.
    """
    moved = [
        own + np.asarray([window[0], window[1]] * 2, own.dtype)
        for own, window in zip(boxes, views.windows, strict=True)
    ]
    cut = [cut_by_window(own, window, views.size) for own, window in zip(moved, views.windows, strict=True)]
    number = np.repeat(np.arange(len(moved)), [len(own) for own in moved])
    joined = np.concatenate(moved)
    kept = merge(joined, np.concatenate(scores), np.concatenate(labels), number, np.concatenate(cut))
    return joined, kept[:most]
