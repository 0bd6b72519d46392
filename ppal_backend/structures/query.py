"""What a query strategy is given and what it answers, as validated value objects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ppal_backend.structures.detections import Detections, to_numpy
from ppal_backend.structures.stream import StreamedImages, ids_of

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor

_BLOCK = 4096


def _check_unique(ids: Sequence[int], what: str) -> None:
    if len(set(ids)) != len(ids):
        raise ValueError(f"expected unique image ids in {what}, got {len(ids) - len(set(ids))} repeated; drop them")


def _check_utilities(utilities: Mapping[int, float]) -> None:
    bad = [image_id for image_id, value in utilities.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(f"expected finite utilities, got NaN or infinity for image ids {bad[:5]}")


def by_utility(ids: Iterable[int], utilities: Mapping[int, float]) -> list[int]:
    """Sort ids by falling utility; ties and ids without a utility go by lowest id, the latter last."""
    return sorted(ids, key=lambda image_id: (-utilities.get(image_id, -math.inf), image_id))


@dataclass(frozen=True, eq=False)
class QueryContext:
    """Everything a strategy may look at.

    Args:
        pool: Detections of every unlabelled image; image ids are unique. May be empty. A pool that lies on disk
            (:class:`~ppal_backend.structures.stream.StreamedImages`) is read as far as a strategy needs it.
        num_classes: C, number of classes (>= 1); every class index must lie below it.
        difficulty: ``[C]`` class difficulties in [0, 1] (Eq. 2), or None before they are known.
        class_counts: ``[C]`` annotated instances per class in the labelled set, >= 0, or None.
        labelled: Detections of labelled images (for strategies that look at them); ids not in the pool.
        image_features: Name ('global', 'fpn') to ``[N, d]`` features, rows in the order of ``pool``.
        labelled_features: Name to ``[L, d]`` features of labelled images. Rows follow ``labelled`` where that
            is given.

    Raises:
        ValueError: A shape or range is wrong, an id is repeated, or a value is NaN or infinite.
    """

    pool: Sequence[Detections]
    num_classes: int
    difficulty: Array | None = None
    class_counts: Array | None = None
    labelled: Sequence[Detections] = ()
    image_features: Mapping[str, Array] = field(default_factory=dict)
    labelled_features: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"expected num_classes >= 1, got {self.num_classes}")
        pool_ids, labelled_ids = self.pool_ids, ids_of(self.labelled)
        _check_unique(pool_ids, "pool")
        _check_unique(labelled_ids, "labelled")
        shared = set(pool_ids) & set(labelled_ids)
        if shared:
            raise ValueError(f"expected pool and labelled images to be disjoint, both hold {sorted(shared)[:5]}")
        self._check_classes(self.pool)
        self._check_classes(self.labelled)
        self._check_per_class("difficulty", 1.0)
        self._check_per_class("class_counts", math.inf)
        self._check_features("image_features", len(self.pool))
        self._check_features("labelled_features", len(self.labelled) if self.labelled else None)

    def _check_classes(self, images: Sequence[Detections]) -> None:
        if isinstance(images, StreamedImages):
            highest, image_id = images.highest_class()
        else:
            tops = ((int(d.class_indices.max()), d.image_id) for d in images if len(d))
            highest, image_id = max(tops, key=lambda top: top[0], default=(-1, -1))
        if highest >= self.num_classes:
            raise ValueError(
                f"expected class indices below num_classes={self.num_classes}, got {highest} for image {image_id}; "
                "check the label space"
            )

    def _check_per_class(self, name: str, high: float) -> None:
        value = getattr(self, name)
        if value is None:
            return
        array = to_numpy(value)
        if array.shape != (self.num_classes,):
            raise ValueError(f"expected {name} with shape ({self.num_classes},), got {array.shape}; one per class")
        if not (np.isfinite(array).all() and (array >= 0).all() and (array <= high).all()):
            raise ValueError(f"expected {name} in [0, {high}], got [{array.min()}, {array.max()}]")

    def _check_features(self, name: str, rows: int | None) -> None:
        for key, value in getattr(self, name).items():
            array = to_numpy(value)
            if array.ndim != 2 or (rows is not None and array.shape[0] != rows):
                raise ValueError(
                    f"expected {name}[{key!r}] with shape ({'L' if rows is None else rows}, d), got {array.shape}; "
                    f"give one row per image"
                )
            if not all(np.isfinite(array[k : k + _BLOCK]).all() for k in range(0, len(array), _BLOCK)):
                raise ValueError(f"expected finite {name}[{key!r}], got NaN or infinite values")

    @cached_property
    def pool_ids(self) -> tuple[int, ...]:
        """Image ids of the pool, in its order."""
        return ids_of(self.pool)


@dataclass(frozen=True)
class CandidatePool:
    """Answer of stage 1.

    Args:
        image_ids: Candidates by falling utility (or in the order drawn, for random candidates).
        utilities: Utility of every image of the pool, not only of the candidates.

    Raises:
        ValueError: An id is repeated or has no utility, or a utility is NaN or infinite.
    """

    image_ids: tuple[int, ...]
    utilities: Mapping[int, float]

    def __post_init__(self) -> None:
        _check_unique(self.image_ids, "CandidatePool")
        _check_utilities(self.utilities)
        missing = [i for i in self.image_ids if i not in self.utilities]
        if missing:
            raise ValueError(f"expected a utility for every candidate, got none for {missing[:5]}")

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True)
class ClassContribution:
    """Share of one predicted class in an image's utility.

    Args:
        class_index: 0..C-1.
        boxes: Number of boxes of that class that count.
        contribution: Summed weighted uncertainty of these boxes.
    """

    class_index: int
    boxes: int
    contribution: float


@dataclass(frozen=True)
class BoxContribution:
    """Share of one predicted box in an image's utility.

    Args:
        box_index: Row of the box in the image's ``Detections``.
        box_xyxy: Pixels of the image as displayed.
        class_index: 0..C-1.
        score: Detector confidence in [0, 1].
        contribution: Weighted uncertainty of the box.
        second_class: The class that is most likely beside its own; None where the detector tells no probabilities.
        second_share: Its probability as a share of the box's own class's, in [0, 1]; None likewise.
    """

    box_index: int
    box_xyxy: tuple[float, float, float, float]
    class_index: int
    score: float
    contribution: float
    second_class: int | None = None
    second_share: float | None = None


@dataclass(frozen=True)
class Explanation:
    """Why one image was chosen.

    Args:
        image_id: The chosen image.
        rank: Place in the labeling order, 0 first.
        utility: The image's stage-1 utility.
        utility_rank: Place of that utility in the whole pool, 0 highest.
        classes: Classes that contribute most to the utility, largest first.
        boxes: Boxes that contribute most to the utility, largest first.
        cluster_size: Candidates that the pick stands for, itself included; None without clustering.
        nearest_chosen: Image id, earlier in the labeling order, that is most similar (or a labelled image, for
            strategies that start from those; negative where its id is not known); None for the first pick and for
            strategies that compare no images.
        nearest_similarity: Similarity to ``nearest_chosen`` (CCMS: 0..2), or None where images are compared by a
            distance that has no upper bound.
        nearest_distance: Distance to ``nearest_chosen`` (CCMS: 2 - similarity), or None.
    """

    image_id: int
    rank: int
    utility: float
    utility_rank: int
    classes: tuple[ClassContribution, ...] = ()
    boxes: tuple[BoxContribution, ...] = ()
    cluster_size: int | None = None
    nearest_chosen: int | None = None
    nearest_similarity: float | None = None
    nearest_distance: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 0 or self.utility_rank < 0:
            raise ValueError(f"expected ranks >= 0, got rank={self.rank}, utility_rank={self.utility_rank}")

    def as_dict(self) -> dict[str, Any]:
        """Return the explanation as plain dicts, lists and numbers, ready for JSON."""
        plain = asdict(self)
        plain["classes"] = [dict(item) for item in plain["classes"]]
        plain["boxes"] = [{**item, "box_xyxy": list(item["box_xyxy"])} for item in plain["boxes"]]
        return plain


@dataclass(frozen=True)
class QuerySet:
    """Answer of a strategy.

    Args:
        image_ids: Chosen images in labeling order.
        utilities: Utility of every image of the pool.
        candidate_ids: Stage-1 candidates by falling utility; holds every chosen image.
        explanations: One for every chosen image.

    Raises:
        ValueError: Ids are repeated, not among the candidates, or without utility or explanation.
    """

    image_ids: tuple[int, ...]
    utilities: Mapping[int, float]
    candidate_ids: tuple[int, ...]
    explanations: Mapping[int, Explanation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_unique(self.image_ids, "QuerySet")
        _check_unique(self.candidate_ids, "QuerySet candidates")
        _check_utilities(self.utilities)
        outside = set(self.image_ids) - set(self.candidate_ids)
        if outside:
            raise ValueError(f"expected every chosen image among the candidates, got {sorted(outside)[:5]} outside")
        if set(self.explanations) - set(self.image_ids):
            raise ValueError("expected explanations of chosen images only; drop the others")

    def __len__(self) -> int:
        return len(self.image_ids)

    def queue(self, pool_ids: Iterable[int]) -> tuple[int, ...]:
        """Order a whole pool for labeling.

        The query set comes first in its own order, then the other candidates by falling utility, then the rest
        by falling utility; ties go to the lowest id. Ids that have no utility (images that came later) follow
        last; chosen images that left the pool are dropped.

        Args:
            pool_ids: Ids to order; repeated ids count once.

        Returns:
            Every id of ``pool_ids`` exactly once. Empty for an empty pool.
        """
        remaining = set(pool_ids)
        chosen = [i for i in self.image_ids if i in remaining]
        remaining -= set(chosen)
        candidates = by_utility(remaining & set(self.candidate_ids), self.utilities)
        remaining -= set(candidates)
        return (*chosen, *candidates, *by_utility(remaining, self.utilities))
