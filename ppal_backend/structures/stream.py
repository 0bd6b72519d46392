"""Detections of a pool that need not fit into memory: image by image where asked for, else in batches of boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ppal_backend.structures.detections import Detections


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Boxes of several images, image after image, without embeddings.

    Args:
        image_ids: ``[m]`` int64.
        counts: ``[m]`` int64 boxes of each image, >= 0; together one for each row of ``joined``.
        joined: The boxes of all images as if they were one image's, checked once for all of them.
        image_sizes: ``[m, 2]`` width and height in px, or None where not all are known.
    """

    image_ids: np.ndarray
    counts: np.ndarray
    joined: Detections
    image_sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def images(self) -> Iterator[Detections]:
        """Each image's boxes (views), with embeddings of width 0."""
        ends = np.cumsum(self.counts).tolist()
        sizes = [None] * len(self) if self.image_sizes is None else [tuple(s) for s in self.image_sizes.tolist()]
        start = 0
        for image_id, end, size in zip(self.image_ids.tolist(), ends, sizes, strict=True):
            yield self.joined.part(image_id, slice(start, end), size)
            start = end


@runtime_checkable
class StreamedImages(Protocol):
    """A sequence of :class:`Detections` whose images are read when they are asked for."""

    @property
    def image_ids(self) -> Sequence[int]:
        """Ids of all images, in order."""

    def __len__(self) -> int:
        """Images."""

    def __getitem__(self, position: Any) -> Any:
        """One image with everything that the reader asked for, or a list of images for a slice."""

    def __iter__(self) -> Iterator[Detections]:
        """All images with everything that the reader asked for, shard by shard."""

    def highest_class(self) -> tuple[int, int]:
        """The highest class index of any box and the image it is in; (-1, -1) without boxes."""

    def batches(self) -> Iterator[ImageBatch]:
        """All images in order, without embeddings: at most one batch has to be in memory."""

    def without_embeddings(self) -> Iterator[Detections]:
        """All images in order, without embeddings."""


def ids_of(images: Sequence[Detections]) -> tuple[int, ...]:
    """Image ids in order, without reading what lies on disk."""
    return tuple(images.image_ids) if isinstance(images, StreamedImages) else tuple(d.image_id for d in images)


def without_embeddings(images: Sequence[Detections]) -> Iterator[Detections]:
    """The images in order for those who read no embeddings, which then stay on disk."""
    return images.without_embeddings() if isinstance(images, StreamedImages) else iter(images)
