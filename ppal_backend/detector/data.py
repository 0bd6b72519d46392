"""Training and test data for mmdet, read from COCO files without guesses about class order.

mmdet's own COCO data set takes class indices from the order of the *file*; here they come from the classes the
caller gives, by name. Augmentation is a pure function of (seed, position in the sample stream), so that a
resumed training sees exactly what an uninterrupted one would have seen. Detectors that learn from unlabelled images
too get them in the same stream.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import Compose
from mmdet.registry import TRANSFORMS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.dist import get_dist_info
from torch.utils.data import Dataset, Sampler

from ppal_backend.datasets.coco import CocoDataset
from ppal_backend.detector.recipe import type_name
from ppal_backend.errors import DetectorError, ImageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Instance:
    """One annotated box: ``[x1, y1, x2, y2]`` in pixels, its class index, and whether it marks a crowd."""

    box_xyxy: tuple[float, float, float, float]
    class_index: int
    crowd: bool = False


@dataclass(frozen=True)
class ImageRecord:
    """One image of a data set and its instances."""

    image_id: int
    path: str
    width: int
    height: int
    instances: tuple[Instance, ...]


def read_coco(path: Path, classes: Sequence[str]) -> tuple[ImageRecord, ...]:
    """Read a COCO file.

    Args:
        path: COCO json with absolute ``file_name``.
        classes: Labels in the order of the class indices. Annotations of other categories are left out (their
            number is logged), as are boxes without area.

    Returns:
        Images by rising id, those without instances included.

    Raises:
        DatasetError: The file cannot be read or lacks a required key.
    """
    found = CocoDataset.read(Path(path))
    index = {label: i for i, label in enumerate(classes)}
    class_of = {category.id: index.get(category.name) for category in found.categories}
    instances: dict[int, list[Instance]] = {image.id: [] for image in found.images}
    left_out = 0
    for row in found.annotations:
        class_index = class_of[row.category_id]
        x, y, width, height = row.bbox_xywh
        if class_index is None:
            left_out += 1
        else:
            instances[row.image_id].append(Instance((x, y, x + width, y + height), class_index, bool(row.iscrowd)))
    if left_out:
        logger.info("%s: left out %d annotations of other classes", path, left_out)
    images = sorted(found.images, key=lambda image: image.id)
    return tuple(ImageRecord(i.id, i.file_name, i.width, i.height, tuple(instances[i.id])) for i in images)


def data_info(record: ImageRecord) -> dict[str, Any]:
    """A record as the dictionary that mmdet's pipelines start from."""
    return {
        "img_path": record.path,
        "img_id": record.image_id,
        "height": record.height,
        "width": record.width,
        "instances": [
            {"bbox": list(item.box_xyxy), "bbox_label": item.class_index, "ignore_flag": int(item.crowd)}
            for item in record.instances
        ],
    }


def build_pipeline(steps: Sequence[dict[str, Any]], records: Sequence[ImageRecord] = ()) -> Compose:
    """Build a data pipeline; call it inside :func:`runtime.isolated`.

    Args:
        steps: Its steps.
        records: Images that steps which combine several may take.
    """
    pipeline = Compose([TRANSFORMS.build(dict(step)) for step in steps])
    for step in pipeline.transforms:
        if isinstance(step, CombineImages):
            step.draw_from(records)
    return pipeline


@TRANSFORMS.register_module()
class CombineImages:
    """Gives a step such as ``Mosaic`` or ``MixUp`` the other images that it combines with the one at hand.

    mmdetection's data sets keep a cache of earlier images for that, or read any of theirs. Here other images are drawn
    and augmented anew, with the random numbers of the item, so that an item depends on seed and position alone.

    Args:
        step: Step of mmdetection that asks for other images by ``get_indexes`` and takes them as ``mix_results``.
        source: Steps that read and prepare each other image.
        prob: How often the step is taken, in [0, 1].
    """

    def __init__(self, step: dict[str, Any], source: Sequence[dict[str, Any]], prob: float = 1.0) -> None:
        self._step, self._source, self._prob = TRANSFORMS.build(dict(step)), build_pipeline(source), prob
        self._records: tuple[ImageRecord, ...] = ()
        self._drawn: dict[int, dict[str, Any]] = {}

    def draw_from(self, records: Sequence[ImageRecord]) -> None:
        """Set the images to draw from, for the source's own steps too."""
        self._records = tuple(records)
        for step in self._source.transforms:
            if isinstance(step, CombineImages):
                step.draw_from(records)

    def __len__(self) -> int:
        """Images to draw from."""
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One of them, prepared; the same for the same index while one item is made."""
        if index not in self._drawn:
            self._drawn[index] = run_pipeline(self._source, data_info(self._records[index]))
        return self._drawn[index]

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Combine.

        Raises:
            ImageError: Another image cannot be read.
            DetectorError: There are no images to draw from.
        """
        if not self._records:
            raise DetectorError(
                f"expected images for {type(self._step).__name__} to draw from, got none; train with it"
            )
        if np.random.uniform() >= self._prob:
            return results
        self._drawn.clear()
        chosen = self._step.get_indexes(self)
        indexes = chosen if isinstance(chosen, Sequence) else [chosen]
        others = [copy.deepcopy(self[int(index)]) for index in indexes]
        self._drawn.clear()
        combined: dict[str, Any] = self._step({**results, "mix_results": others})
        combined.pop("mix_results", None)
        return combined


def run_pipeline(pipeline: Compose, info: dict[str, Any]) -> dict[str, Any]:
    """Run one image through a pipeline whose first step reads the file.

    Raises:
        ImageError: The image is gone, cannot be decoded, or nothing is left of it at the input size; the message names
            its id.
    """
    reader, *others = pipeline.transforms
    try:
        packed = reader(info)
    except (OSError, ValueError, AssertionError, AttributeError, TypeError, cv2.error) as error:
        # mmcv asserts, or fails on the None with which cv2 answers what it cannot decode
        raise ImageError(
            f"image {info['img_id']} ({info['img_path']}) cannot be read "
            f"({str(error) or type(error).__name__}); fetch it again or skip it"
        ) from error
    if packed is None:
        raise ImageError(f"image {info['img_id']} ({info['img_path']}) cannot be read; fetch it again or skip it")
    return run_steps(others, packed, info)


def run_steps(steps: Iterable[Callable[[Any], Any]], read: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """Run an image that was read through the other steps of a pipeline.

    Raises:
        ImageError: Nothing is left of it at the input size; the message names its id.
    """
    try:
        for step in steps:
            read = step(read)
    except cv2.error as error:
        raise ImageError(
            f"image {info['img_id']} ({info['img_path']}) cannot be brought to the input size; crop it or skip it"
        ) from error
    return read


class TrainingData(Dataset[dict[str, Any]]):
    """Endless training stream: item ``p`` is the image at position ``p`` of a seeded sequence of permutations.

    Args:
        records: Images, at least one.
        pipeline: mmdet's training pipeline, built.
        classes: Labels in the order of the class indices.
        seed: Seed of order and augmentation.
        late: Position from which another pipeline is used, and that pipeline; None for the same to the end.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        pipeline: Compose,
        classes: Sequence[str],
        seed: int,
        late: tuple[int, Compose] | None = None,
    ) -> None:
        self._records = tuple(records)
        self._pipeline, self._late = pipeline, late
        self._seed = seed
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        self.metainfo = {"classes": tuple(classes)}

    def __len__(self) -> int:
        return len(self._records)

    def record_at(self, position: int) -> ImageRecord:
        """The image at a position of the stream."""
        epoch, offset = divmod(position, len(self._records))
        if self._order[0] != epoch:
            order = np.random.default_rng((self._seed, 1, epoch)).permutation(len(self._records))
            self._order = (epoch, order)
        return self._records[self._order[1][offset]]

    def __getitem__(self, position: int) -> dict[str, Any]:
        info = data_info(self.record_at(position))
        numpy_state, python_state = np.random.get_state(), random.getstate()
        item_seed = int(np.random.SeedSequence((self._seed, 2, position)).generate_state(1)[0])
        try:
            np.random.seed(item_seed)
            random.seed(item_seed)
            return run_pipeline(self._pipeline_at(position), info)
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)

    def _pipeline_at(self, position: int) -> Compose:
        return self._pipeline if self._late is None or position < self._late[0] else self._late[1]


class StreamSampler(Sampler[int]):
    """Positions ``rank, rank + world, …`` of the stream for ever; ``skip`` resumes without loading anything."""

    def __init__(self, images: int) -> None:
        self._rank, self._world = get_dist_info()
        self._images = images
        self._start = 0

    def __len__(self) -> int:
        """Images in the data set; the stream itself has no end."""
        return self._images

    def skip(self, num_samples: int) -> None:
        """Start after ``num_samples`` samples of this process, counted from the beginning of the stream."""
        self._start = num_samples

    def __iter__(self) -> Iterator[int]:
        position = self._rank + self._start * self._world
        while True:
            yield position
            position += self._world


_LABELLED_BRANCH = "sup"


class MixedData(Dataset[list[dict[str, Any]]]):
    """Endless stream of groups: item ``p`` is the labelled image at ``p`` and the ``ratio`` unlabelled ones after it.

    Both kinds are seeded sequences of permutations of their own, and every augmentation depends on seed and position
    alone, so a stream that starts anywhere goes on as one from the beginning would. A batch of ``n`` groups holds
    ``n * (1 + ratio)`` images. An unlabelled image that cannot be read is replaced by the next one.

    Args:
        labelled: Stream of labelled images.
        unlabelled: Stream of unlabelled images.
        ratio: Unlabelled images for each labelled one, at least 1.
    """

    def __init__(self, labelled: TrainingData, unlabelled: TrainingData, ratio: int) -> None:
        if ratio < 1:
            raise ValueError(f"expected at least one unlabelled image for each labelled one, got {ratio}")
        self._labelled, self._unlabelled, self._ratio = labelled, unlabelled, ratio
        self._unreadable: set[str] = set()
        self.metainfo = labelled.metainfo

    def __len__(self) -> int:
        """Labelled images: they set the length of a training."""
        return len(self._labelled)

    def __getitem__(self, position: int) -> list[dict[str, Any]]:
        first = position * self._ratio
        return [self._labelled[position], *(self._unlabelled_at(first + step) for step in range(self._ratio))]

    def _unlabelled_at(self, position: int) -> dict[str, Any]:
        for later in range(len(self._unlabelled)):
            path = self._unlabelled.record_at(position + later).path
            try:
                return self._unlabelled[position + later]
            except ImageError as error:
                if path not in self._unreadable:
                    self._unreadable.add(path)
                    logger.warning("training goes on without an unlabelled image: %s", error)
        raise ImageError(
            f"expected unlabelled images that can be read, got none of {len(self._unlabelled)}; fetch them again"
        )


def training_stream(
    config: Config, records: Sequence[ImageRecord], classes: Sequence[str], seed: int, unlabelled: Sequence[Path | str]
) -> TrainingData | MixedData:
    """The images of a training; call it inside :func:`runtime.isolated`.

    Args:
        config: What :func:`config.build_config` made for a training.
        records: Labelled images, at least one.
        classes: Labels in the order of the class indices.
        seed: Seed of order and augmentation.
        unlabelled: Files of unlabelled images. They are left out when the detector does not learn from such images.

    Returns:
        A mixed stream for a semi-supervised detector with unlabelled images, else the labelled ones alone.
    """
    if "unlabelled_pipeline" not in config:
        late = None
        if "late_train_pipeline" in config:
            first = config.late_from_step * config.train_dataloader.batch_size
            late = (first, build_pipeline(config.late_train_pipeline, records))
        return TrainingData(records, build_pipeline(config.train_pipeline, records), classes, seed, late)
    if not unlabelled:
        steps = [_one_branch(step) for step in config.train_pipeline]
        return TrainingData(records, build_pipeline(steps), classes, seed)
    others = [ImageRecord(number, str(path), 0, 0, ()) for number, path in enumerate(unlabelled)]
    other_seed = int(np.random.SeedSequence((seed, 3)).generate_state(1)[0])
    return MixedData(
        TrainingData(records, build_pipeline(config.train_pipeline), classes, seed),
        TrainingData(others, build_pipeline(config.unlabelled_pipeline), classes, other_seed),
        config.unlabelled_ratio,
    )


def digest_of_names(paths: Sequence[Path | str]) -> str:
    """Hex digest of these files' names in this order; two trainings on other images differ in it."""
    return hashlib.sha256("\n".join(str(path) for path in paths).encode()).hexdigest()


def collate(batch: Sequence[Any]) -> Any:
    """Put samples, or groups of samples, into one batch as mmdetection's models take it."""
    if isinstance(batch[0], list):
        batch = [sample for group in batch for sample in group]
    return pseudo_collate(batch)


def _one_branch(step: dict[str, Any]) -> dict[str, Any]:
    """The branches of unlabelled images would be empty, which mmdetection's preprocessor does not take."""
    branches = {"branch_field": [_LABELLED_BRANCH]} if type_name(step) == "MultiBranch" else {}
    return {**step, **branches}
