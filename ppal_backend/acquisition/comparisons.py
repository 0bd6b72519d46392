"""How stage 2 compares images: CCMS, global or pyramid features, predicted classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch

from ppal_backend.acquisition.arrays import as_tensor
from ppal_backend.acquisition.ccms import LazySimilarity, MakeSimilarity, similarity_matrix
from ppal_backend.acquisition.ccms.objects import pack_objects, resolve_metric
from ppal_backend.acquisition.distances import (
    CosineDistances,
    DenseDistances,
    Distances,
    EuclideanDistances,
    JaccardDistances,
    SimilarityDistances,
    anchors_behind,
    nearest_anchors,
)
from ppal_backend.acquisition.selection import Compare, Comparison
from ppal_backend.acquisition.uncertainty import BoxFilter
from ppal_backend.structures import Detections, QueryContext
from ppal_backend.structures.stream import ids_of

_GIB = float(1 << 30)
DENSE_GIB = 1.5
_ANCHOR_BATCH = 1024


def ccms_distances(
    images: Sequence[Detections],
    score_threshold: float = 0.05,
    device: torch.device | str | None = None,
    memory_gib: float | None = None,
    metric: str = "auto",
    max_detections: int = 100,
    lazy: MakeSimilarity = LazySimilarity,
) -> Distances:
    """Distances 2 - S, as a matrix while it fits and row by row beyond.

    Args:
        images: N images.
        score_threshold: Lowest score that counts.
        device: Where to compute.
        memory_gib: The matrix is held when it takes no more than half of this; default 3 GiB, so about 20,000
            images.
        metric: ``auto``, ``cosine`` or ``kl``.
        max_detections: Objects per image at most.
        lazy: Makes what computes similarities where the matrix does not fit.
    """
    allowed = DENSE_GIB if memory_gib is None else memory_gib / 2.0
    if 4.0 * len(images) ** 2 / _GIB > allowed:
        return SimilarityDistances(
            lazy(images, score_threshold, device, memory_gib, metric=metric, max_detections=max_detections)
        )
    matrix = as_tensor(
        similarity_matrix(images, score_threshold, device, memory_gib, metric=metric, max_detections=max_detections)
    )
    return DenseDistances.trusted(matrix.neg_().add_(2.0))


def compare_ccms(
    boxes: BoxFilter,
    device: torch.device | str | None = None,
    memory_gib: float | None = None,
    metric: str = "auto",
    labelled: bool = False,
    lazy: MakeSimilarity | None = None,
) -> Compare:
    """Compare by Category Conditioned Matching Similarity (Eq. 6 and 7); with ``labelled``, also with those images.

    Of K candidates and L labelled images K x (K + L) similarities are computed, of a few labelled images at a time.
    ``lazy`` makes what computes similarities of pools whose matrix does not fit; None for this process.
    """
    threshold, most = boxes.score_threshold, boxes.max_detections

    def compare(context: QueryContext, candidates: Sequence[int]) -> Comparison:
        images = [_compared(context.pool[p], boxes, metric) for p in candidates]
        others = context.labelled if labelled else ()
        common = resolve_metric(chain(images, others), metric) if others else metric
        distances = ccms_distances(images, threshold, device, memory_gib, common, most, lazy or LazySimilarity)
        if not others:
            return Comparison(distances, None, 2.0)
        if isinstance(distances, SimilarityDistances):
            similarity = distances.similarity
        else:
            similarity = LazySimilarity(images, threshold, device, memory_gib, metric=common, max_detections=most)

        def blocks() -> Iterator[torch.Tensor]:
            for start in range(0, len(others), _ANCHOR_BATCH):
                some = [_compared(d, boxes, common) for d in others[start : start + _ANCHOR_BATCH]]
                packed = pack_objects(some, threshold, similarity.device, common, most)
                yield similarity.against(packed).neg_().add_(2.0).to(distances.device)

        return Comparison(distances, nearest_anchors(blocks(), ids_of(others)), 2.0)

    return compare


def _compared(detections: Detections, boxes: BoxFilter, metric: str) -> Detections:
    """What of an image is compared: boxes that count, and probabilities only where no embeddings describe them."""
    counted = boxes.counted(detections)
    described = len(detections) and detections.embeddings.shape[1]
    drop = metric != "kl" and described and detections.class_probs is not None
    return replace(counted, class_probs=None) if drop else counted


def pool_features(context: QueryContext, name: str) -> torch.Tensor:
    """``[N, d]`` image features of the pool.

    Raises:
        ValueError: The context holds none of that name.
    """
    if name not in context.image_features:
        raise ValueError(
            f"expected image_features[{name!r}] with shape ({len(context.pool)}, d) in the context, got "
            f"{sorted(context.image_features) or 'none'}; ask the inference for them"
        )
    return as_tensor(context.image_features[name]).float()


def labelled_features(context: QueryContext, name: str) -> torch.Tensor | None:
    """``[L, d]`` image features of labelled images, or None."""
    if name not in context.labelled_features:
        return None
    features = as_tensor(context.labelled_features[name]).float()
    width = as_tensor(context.image_features[name]).shape[1]
    if features.shape[1] != width:
        raise ValueError(
            f"expected labelled_features[{name!r}] with shape (L, {width}), got {tuple(features.shape)}; "
            f"take both from one model"
        )
    return features


def compare_features(name: str, labelled: bool = False, euclidean: bool = False) -> Compare:
    """Compare by image features: cosine, or Euclidean distance as in the core-set paper."""

    def compare(context: QueryContext, candidates: Sequence[int]) -> Comparison:
        features = pool_features(context, name)[torch.as_tensor(list(candidates), dtype=torch.long)]
        kind = EuclideanDistances if euclidean else CosineDistances
        others = labelled_features(context, name) if labelled else None
        anchors = None
        if others is not None:
            known = list(ids_of(context.labelled)) or [-1 - k for k in range(len(others))]  # ids are not given
            anchors = anchors_behind(kind(torch.cat([features, others.to(features.device)])), len(features), known)
        return Comparison(kind(features), anchors, None if euclidean else 1.0)

    return compare


def compare_jaccard(boxes: BoxFilter) -> Compare:
    """Compare by predicted class sets."""

    def compare(context: QueryContext, candidates: Sequence[int]) -> Comparison:
        present = np.zeros((len(candidates), context.num_classes), dtype=bool)
        for k, position in enumerate(candidates):
            detections = context.pool[position]
            rows = boxes.valid_rows(detections)
            present[k, as_tensor(detections.class_indices)[rows].cpu().numpy()] = True
        return Comparison(JaccardDistances(present), None, 1.0)

    return compare
