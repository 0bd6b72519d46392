"""Running a loaded detector over images in batches, exactly as mmdet's own ``test_step`` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.dataset import pseudo_collate

from ppal_backend.detector.data import ImageRecord, data_info, run_pipeline
from ppal_backend.detector.models import LoadedDetector
from ppal_backend.errors import ImageError

OnError = Callable[[int, ImageError], None]


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


def predict_batch(
    loaded: LoadedDetector, records: Sequence[ImageRecord], on_error: OnError | None = None
) -> tuple[list[ImageRecord], list[Any]]:
    """Predict a batch of images.

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
    kept: list[ImageRecord] = []
    packed: list[dict[str, Any]] = []
    for record in records:
        try:
            packed.append(run_pipeline(loaded.pipeline, data_info(record)))
            kept.append(record)
        except ImageError as error:
            if on_error is None:
                raise
            on_error(record.image_id, error)
    if not packed:
        return [], []
    with torch.no_grad():
        return kept, list(loaded.model.test_step(pseudo_collate(packed)))
