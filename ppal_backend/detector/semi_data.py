"""Labelled and unlabelled images in one training stream that resumes exactly."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch.utils.data import Dataset

from ppal_backend.detector.data import ImageRecord, TrainingData
from ppal_backend.detector.models import build_pipeline
from ppal_backend.errors import ImageError

logger = logging.getLogger(__name__)

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
        return TrainingData(records, build_pipeline(config.train_pipeline), classes, seed)
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
    branches = {"branch_field": [_LABELLED_BRANCH]} if step["type"] == "MultiBranch" else {}
    return {**step, **branches}
