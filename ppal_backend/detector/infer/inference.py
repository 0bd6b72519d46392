"""One pass over a pool of images: boxes, probabilities, levels, embeddings and image features."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from ppal_backend.detector.data import ImageRecord
from ppal_backend.detector.heads import inference_family
from ppal_backend.detector.heads.base import COUNT_FIELD, EMBEDDING_FIELD
from ppal_backend.detector.infer.embeddings import image_features, levels_of_size, same_width, sample_embeddings
from ppal_backend.detector.infer.prediction import (
    OnError,
    Views,
    batch_size_for,
    images_at_once,
    merge_views,
    predict_packed,
    read_batches,
    readable,
    workers_for,
)
from ppal_backend.detector.models import HalfPrecisionOverflow, LoadedDetector, load_detector
from ppal_backend.detector.rivals import find_rival
from ppal_backend.detector.runtime import isolated, pick_device
from ppal_backend.structures.detections import Detections, to_numpy
from ppal_backend.structures.round import OnProgress, Progress

log = logging.getLogger(__name__)

Embedding = Literal["query", "sampled"]
Levels = Literal["provenance", "scale"]
Maps = dict[str, tuple[torch.Tensor, ...]]


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
        features: ``global`` and ``fpn`` as ``[d]`` float32 vectors; of a detector that a rival changed what it says of
            the image, by the rival's name.
    """

    detections: Detections
    features: Mapping[str, np.ndarray] = field(default_factory=dict)


class PoolInference:
    """A trained detector ready to run over a pool.

    Boxes and scores are those of mmdet's own ``test_step``; probabilities, levels and embeddings come from the
    same pass. The detector is left as it was after every run. At most three batches of images are in memory.

    Args:
        detector: Name in the zoo.
        checkpoint: Final checkpoint of a training.
        classes: Labels in the order of the class indices.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        zoo_root: Folder of the zoo; None for the packaged one.
        amp: Half precision on CUDA; without effect on a CPU.
        workers: Threads that read images ahead; None for none on a CPU and up to 4 on a GPU.
        embedding: What describes a detection of a detector with object queries (DETR's relatives): its ``query``, or
            the feature maps ``sampled`` at the centre of its box and averaged over the levels. Other detectors
            always sample a map of the pyramid.
        levels: Which one: that of the level the detection came from (``provenance``), or the one that a box of its
            size belongs to (``scale``).
        count: Whether detections tell how many boxes before suppression they stand for (``pre_nms_counts``), which
            the strategy ``pal`` reads; dense heads and YOLOX only.

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
        *,
        amp: bool = True,
        workers: int | None = None,
        embedding: Embedding = "query",
        levels: Levels = "provenance",
        count: bool = False,
    ) -> None:
        if embedding not in get_args(Embedding):
            raise ValueError(f"expected embedding to be one of {get_args(Embedding)}, got {embedding!r}")
        if levels not in get_args(Levels):
            raise ValueError(f"expected levels to be one of {get_args(Levels)}, got {levels!r}")
        with isolated(f"ppal-{uuid.uuid4().hex}"):
            self._loaded = load_detector(detector, Path(checkpoint), classes, pick_device(device), zoo_root)
            self._family, self._count = inference_family(self._loaded.model), count
        self._rival = None if self._loaded.rival is None else find_rival(self._loaded.rival)
        self._amp, self._embedding, self._levels = amp, embedding, levels
        self._workers = workers_for(self._loaded.device, workers)

    @property
    def loaded(self) -> LoadedDetector:
        """The detector with its pipeline, configuration and device."""
        return self._loaded

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
        done = 0
        at_once, tile = images_at_once(self._loaded, size), self._loaded.tile
        for batch in read_batches(self._loaded.pipeline, records, at_once, self._workers, tile):
            kept, packed = readable(batch, on_error)
            if packed:
                yield from (self._look if tile is None else self._slices)(kept, packed, size, features)
            done += len(batch)
            if on_progress is not None:
                on_progress(Progress("infer", done, len(records)))

    def _look(
        self, records: Sequence[ImageRecord], packed: Sequence[Any], batch_size: int, features: bool
    ) -> Iterator[PoolResult]:
        """One pass over a batch at most; half precision ends with the first batch it has too small a range for."""
        restore, read = (None, None) if self._rival is None else self._rival.watch(self._loaded.model)
        samples = None
        try:
            with self._capturing() as maps:
                samples = predict_packed(self._loaded, packed, self._amp)
        except HalfPrecisionOverflow:
            if not self._amp:
                raise
            log.warning("%s overflows in half precision; it goes on in full", self._loaded.entry.name)
            self._amp = False
        finally:
            if restore is not None:
                restore()
        if samples is None:
            yield from self._look(records, packed, batch_size, features)
            return
        said = None if read is None or not features else read(samples)
        yield from self._unpack(records, samples, maps, features, said)

    def _slices(
        self, records: Sequence[ImageRecord], images: Sequence[Views], batch_size: int, features: bool
    ) -> Iterator[PoolResult]:
        """All views of the images, in batches; then each image with what is left of its views."""
        views = [(record, packed) for record, own in zip(records, images, strict=True) for packed in own.packed]
        found: list[PoolResult] = []
        for start in range(0, len(views), batch_size):
            part = views[start : start + batch_size]
            found += self._look([r for r, _ in part], [p for _, p in part], batch_size, features)
        rest = iter(found)
        for own in images:
            yield _merged(own, list(islice(rest, len(own.packed))), self._loaded.most_detections)

    @contextmanager
    def _capturing(self) -> Iterator[Maps]:
        """Trace the head and keep the maps of backbone and neck, for the duration of one batch."""
        model, maps = self._loaded.model, Maps()

        def keep(name: str) -> Any:
            return lambda module, inputs, output: maps.__setitem__(name, tuple(output))

        restore = self._family.trace_inference(model, self._count)
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
        maps: Maps,
        features: bool,
        said: torch.Tensor | None = None,
    ) -> Iterator[PoolResult]:
        """Results of a batch. What the images have in common is computed and fetched from the device once."""
        found = [sample.pred_instances for sample in samples]
        counts = [len(item.scores) for item in found]
        names = [name for name, value in found[0].items() if isinstance(value, torch.Tensor)]  # others name labels
        joined = {name: torch.cat([item[name] for item in found]) for name in names}
        padded = tuple(samples[0].batch_input_shape)
        neck = maps.get("neck", maps["backbone"])
        joined["embeddings"] = self._embeddings(joined, counts, neck, (padded[0], padded[1]))
        values = {name: _rows(value, counts) for name, value in joined.items()}
        described: dict[str, np.ndarray] = {}
        if features:
            shapes = [tuple(sample.img_shape) for sample in samples]
            vectors = image_features(maps["backbone"], neck, shapes, (padded[0], padded[1]))
            described = {name: _host(vector) for name, vector in vectors.items()}
        if said is not None and self._rival is not None:
            described[self._rival.name] = _host(said)
        softmax = self._family.is_softmax(self._loaded.model)
        for index, record in enumerate(batch):
            own = {name: rows[index] for name, rows in values.items()}
            height, width = samples[index].ori_shape[:2]
            detections = Detections(
                image_id=record.image_id,
                boxes_xyxy=own["bboxes"],
                scores=own["scores"],
                class_indices=own["labels"],
                embeddings=own["embeddings"],
                class_probs=own["ppal_probs"],
                levels=None if EMBEDDING_FIELD in own else own["ppal_levels"],
                softmax=softmax,
                pre_nms_counts=own.get(COUNT_FIELD),
                image_size=(width, height),
            )
            yield PoolResult(detections, {name: vectors[index] for name, vectors in described.items()})

    def _embeddings(
        self,
        joined: Mapping[str, torch.Tensor],
        counts: Sequence[int],
        neck: Sequence[torch.Tensor],
        padded: tuple[int, int],
    ) -> torch.Tensor:
        """``[n, d]`` embeddings of all detections of a batch; d is 0 for a detector that has none to compare."""
        if EMBEDDING_FIELD in joined and self._embedding == "query":
            return joined[EMBEDDING_FIELD]
        boxes, levels = joined["ppal_boxes"], joined["ppal_levels"]
        if not same_width(neck):
            return boxes.new_zeros(len(boxes), 0)
        if self._levels == "scale":
            levels = levels_of_size(neck, boxes, padded)
        images = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(boxes.device)
        return sample_embeddings(neck, images, boxes, levels, padded)


def _merged(views: Views, results: Sequence[PoolResult], most: int | None) -> PoolResult:
    """The image with the detections of all its views; what describes one comes from the view it was found in.

    Features of the image are those of the whole.
    """
    seen = [result.detections for result in results]
    boxes, kept = merge_views(
        views,
        [to_numpy(d.boxes_xyxy) for d in seen],
        [to_numpy(d.scores) for d in seen],
        [to_numpy(d.class_indices) for d in seen],
        most,
    )
    joined: dict[str, Any] = {
        name: None
        if getattr(seen[0], name) is None
        else np.concatenate([to_numpy(getattr(d, name)) for d in seen])[kept]
        for name in ("scores", "class_indices", "embeddings", "class_probs", "levels", "pre_nms_counts")
    }
    return PoolResult(replace(seen[0], boxes_xyxy=boxes[kept], **joined), results[0].features)


def _host(value: torch.Tensor) -> np.ndarray:
    return (value.float() if value.is_floating_point() else value).detach().cpu().numpy()


def _rows(value: torch.Tensor, counts: Sequence[int]) -> list[np.ndarray]:
    """Rows of each image, in arrays of their own."""
    return [part.copy() for part in np.split(_host(value), np.cumsum(counts)[:-1])]
