"""One pass over a pool of images: boxes, probabilities, levels, embeddings and image features."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppal_backend.detector.data import ImageRecord
from ppal_backend.detector.embeddings import image_features, same_width, sample_embeddings
from ppal_backend.detector.models import load_detector
from ppal_backend.detector.prediction import OnError, batch_size_for, predict_batch
from ppal_backend.detector.runtime import isolated, pick_device
from ppal_backend.detector.tracers import find_tracer
from ppal_backend.detector.tracers.base import EMBEDDING_FIELD
from ppal_backend.structures.detections import Detections
from ppal_backend.structures.progress import OnProgress, Progress


@dataclass(frozen=True)
class PoolImage:
    """One image of the pool: its id (the Label Studio task id) and its file."""

    image_id: int
    path: Path | str


@dataclass(frozen=True)
class PoolResult:
    """What one pass says about one image.

    Args:
        detections: Detections after suppression, boxes in pixels of the image as displayed.
        features: ``global`` and ``fpn`` as ``[d]`` float32 vectors.
    """

    detections: Detections
    features: Mapping[str, np.ndarray] = field(default_factory=dict)


class PoolInference:
    """A trained detector ready to run over a pool.

    Boxes and scores are those of mmdet's own ``test_step``; probabilities, levels and embeddings come from the
    same pass. The detector is left as it was after every run.

    Args:
        detector: Name in the zoo.
        checkpoint: Final checkpoint of a training.
        classes: Labels in the order of the class indices.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        zoo_root: Folder of the zoo; None for the packaged one.

    Raises:
        UnknownDetector: The zoo has no such detector.
        CheckpointError: The checkpoint is damaged or belongs to something else.
        UnsupportedHead: The detector cannot be traced in one pass.
    """

    def __init__(
        self,
        detector: str,
        checkpoint: Path,
        classes: Sequence[str],
        device: str = "auto",
        zoo_root: Path | None = None,
    ) -> None:
        with isolated(f"ppal-{uuid.uuid4().hex}"):
            self._loaded = load_detector(detector, Path(checkpoint), classes, pick_device(device), zoo_root)
            self._tracer = find_tracer(self._loaded.model)

    @property
    def model(self) -> Any:
        """The detector itself, in evaluation mode."""
        return self._loaded.model

    def run(
        self,
        images: Iterable[PoolImage],
        batch_size: int | None = None,
        on_progress: OnProgress | None = None,
        on_error: OnError | None = None,
    ) -> Iterator[Detections]:
        """Detections of every image, in order; see :meth:`run_with_features`."""
        for result in self._results(images, batch_size, on_progress, on_error, features=False):
            yield result.detections

    def run_with_features(
        self,
        images: Iterable[PoolImage],
        batch_size: int | None = None,
        on_progress: OnProgress | None = None,
        on_error: OnError | None = None,
    ) -> Iterator[PoolResult]:
        """Detections and image features of every image, in order, streamed batch by batch.

        Args:
            images: The pool.
            batch_size: Images at once; None for the zoo's choice for this kind of device.
            on_progress: Called once a batch with ``Progress("infer", images, all images)``.
            on_error: Called with id and error for an image that cannot be read, which then yields nothing.

        Raises:
            ImageError: An image cannot be read and there is no ``on_error``.
        """
        return self._results(images, batch_size, on_progress, on_error, features=True)

    def _results(
        self,
        images: Iterable[PoolImage],
        batch_size: int | None,
        on_progress: OnProgress | None,
        on_error: OnError | None,
        features: bool,
    ) -> Iterator[PoolResult]:
        records = [ImageRecord(int(image.image_id), str(image.path), 0, 0, ()) for image in images]
        size = batch_size_for(self._loaded, batch_size)
        for start in range(0, len(records), size):
            chunk = records[start : start + size]
            with self._capturing() as maps:
                batch, samples = predict_batch(self._loaded, chunk, on_error)
            if batch:
                yield from self._unpack(batch, samples, maps, features)
            if on_progress is not None:
                on_progress(Progress("infer", start + len(chunk), len(records)))

    @contextmanager
    def _capturing(self) -> Iterator[dict[str, tuple[torch.Tensor, ...]]]:
        """Trace the head and keep the maps of backbone and neck, for the duration of one batch."""
        model, maps = self._loaded.model, dict[str, tuple[torch.Tensor, ...]]()

        def keep(name: str) -> Any:
            return lambda module, inputs, output: maps.__setitem__(name, tuple(output))

        restore = self._tracer.attach(model)
        handles = [model.backbone.register_forward_hook(keep("backbone"))]
        if getattr(model, "with_neck", False):
            handles.append(model.neck.register_forward_hook(keep("neck")))
        try:
            yield maps
        finally:
            for handle in handles:
                handle.remove()
            restore()

    def _unpack(
        self,
        batch: Sequence[ImageRecord],
        samples: Sequence[Any],
        maps: Mapping[str, tuple[torch.Tensor, ...]],
        features: bool,
    ) -> Iterator[PoolResult]:
        backbone = maps["backbone"]
        neck = maps.get("neck", backbone)
        softmax = self._tracer.is_softmax(self._loaded.model)
        for index, (record, sample) in enumerate(zip(batch, samples, strict=True)):
            own_neck = [level[index] for level in neck]
            padded = tuple(sample.batch_input_shape)
            described: dict[str, np.ndarray] = {}
            if features:
                vectors = image_features([level[index] for level in backbone], own_neck, sample.img_shape, padded)
                described = {name: _numpy(vector) for name, vector in vectors.items()}
            yield PoolResult(_detections(record.image_id, sample.pred_instances, own_neck, padded, softmax), described)


def _detections(
    image_id: int, instances: Any, levels: Sequence[torch.Tensor], padded: tuple[int, ...], softmax: bool
) -> Detections:
    own = instances.get(EMBEDDING_FIELD)
    if own is not None:
        embeddings = own
    elif same_width(levels):
        embeddings = sample_embeddings(levels, instances.ppal_boxes, instances.ppal_levels, (padded[0], padded[1]))
    else:
        embeddings = instances.ppal_boxes.new_zeros(len(instances.scores), 0)
    return Detections(
        image_id=image_id,
        boxes_xyxy=_numpy(instances.bboxes),
        scores=_numpy(instances.scores),
        class_indices=instances.labels.cpu().numpy(),
        embeddings=_numpy(embeddings),
        class_probs=_numpy(instances.ppal_probs),
        levels=None if own is not None else instances.ppal_levels.cpu().numpy(),
        softmax=softmax,
    )


def _numpy(value: torch.Tensor) -> np.ndarray:
    return value.detach().float().cpu().numpy()
