"""Valid objects of many images, packed flat: what matching similarities are computed from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ppal_backend.acquisition.arrays import as_tensor
from ppal_backend.acquisition.uncertainty import MAX_DETECTIONS
from ppal_backend.structures import Detections
from ppal_backend.structures.detections import is_tensor

logger = logging.getLogger(__name__)

METRICS = ("auto", "cosine", "kl")
_PROBABILITY_FLOOR = 1e-6


@dataclass(frozen=True, eq=False)
class PackedObjects:
    """M objects of N images, image after image.

    Args:
        left: ``[*, e]`` float32 features; the product of a ``left`` and a ``right`` row gives the raw similarity.
        right: ``[*, e]`` float32; the same tensor as ``left`` for cosine.
        classes: ``[M]`` int64 class of each object (CPU).
        images: ``[M]`` int64 position 0..N-1 of each object's image, ascending (CPU).
        weights: ``[M]`` float32 share of each object in its image, score / (2 * sum of scores): the two directions
            of Eq. 7 and their mean in one factor.
        num_images: N.
        metric: ``cosine`` or ``kl``.
        storage: ``[M]`` int64 row of each object's features (CPU), or None for the object's own number.
    """

    left: torch.Tensor
    right: torch.Tensor
    classes: torch.Tensor
    images: torch.Tensor
    weights: torch.Tensor
    num_images: int
    metric: str
    storage: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.classes)

    def to(self, device: torch.device | str) -> PackedObjects:
        """The same with features and weights on another device."""
        left = self.left.to(device)
        right = left if self.right is self.left else self.right.to(device)
        return replace(self, left=left, right=right, weights=self.weights.to(device))

    def of_images(self, positions: torch.Tensor) -> PackedObjects:
        """The objects of some images, whose positions are counted anew in the order given.

        Args:
            positions: ``[k]`` int64 (CPU) distinct positions of images; ``storage`` must be None.
        """
        counts = torch.bincount(self.images, minlength=self.num_images)
        lengths = counts[positions]
        firsts = (counts.cumsum(0) - counts)[positions] - (lengths.cumsum(0) - lengths)
        rows = torch.repeat_interleave(firsts, lengths) + torch.arange(int(lengths.sum()))
        there = rows.to(self.left.device)
        left = self.left[there]
        return replace(
            self,
            left=left,
            right=left if self.right is self.left else self.right[there],
            classes=self.classes[rows],
            images=torch.repeat_interleave(torch.arange(len(positions)), lengths),
            weights=self.weights[there],
            num_images=len(positions),
        )


def valid_rows(scores: np.ndarray, score_threshold: float, max_detections: int = MAX_DETECTIONS) -> np.ndarray:
    """Rows with score >= threshold and > 0, ascending; the ``max_detections`` best, ties to the lowest row."""
    rows = np.flatnonzero((scores >= score_threshold) & (scores > 0))
    if len(rows) > max_detections:
        rows = np.sort(rows[np.argsort(-scores[rows], kind="stable")[:max_detections]])
    return rows


def _host_scores(detections: Sequence[Detections]) -> list[np.ndarray]:
    """Scores of every image on the host, with one transfer."""
    if not detections:
        return []
    if not is_tensor(detections[0].scores):
        return [np.asarray(d.scores, dtype=np.float32) for d in detections]
    flat = torch.cat([as_tensor(d.scores).detach().float() for d in detections]).cpu().numpy()
    return np.split(flat, np.cumsum([len(d) for d in detections])[:-1])


def _gather(values: Sequence[Any], rows: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """Concatenate the given rows of every field into new memory; a leading run of rows is copied only once."""
    if not any(is_tensor(value) for value in values):
        cut = [v[: len(r)] if r[-1] == len(r) - 1 else v[r] for v, r in zip(values, rows, strict=True)]
        return torch.from_numpy(np.concatenate(cut)).to(device)
    parts = []
    for value, keep in zip(values, rows, strict=True):
        tensor = as_tensor(value).detach().to(device)
        prefix = bool(keep[-1] == len(keep) - 1)
        parts.append(tensor[: len(keep)] if prefix else tensor[torch.from_numpy(keep).to(device)])
    return torch.cat(parts)


def _check_widths(values: Sequence[object], ids: Sequence[int], what: str) -> None:
    widths = {int(value.shape[1]) for value in values}  # type: ignore[attr-defined]
    if len(widths) > 1:
        first = int(values[0].shape[1])  # type: ignore[attr-defined]
        other = next(k for k, v in enumerate(values) if int(v.shape[1]) != first)  # type: ignore[attr-defined]
        raise ValueError(
            f"expected {what} of one width for all images, got {first} for image {ids[0]} and "
            f"{int(values[other].shape[1])} for image {ids[other]}; "  # type: ignore[attr-defined]
            f"take them from one detector"
        )


def resolve_metric(detections: Iterable[Detections], metric: str) -> str:
    """Turn ``auto`` into ``cosine`` where objects have embeddings and ``kl`` where they only have probabilities."""
    if metric not in METRICS:
        raise ValueError(f"expected metric to be one of {METRICS}, got {metric!r}")
    if metric != "auto":
        return metric
    for d in detections:
        if len(d):
            return "cosine" if d.embeddings.shape[1] or d.class_probs is None else "kl"
    return "cosine"


def _cosine_features(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the rows in place (``raw`` is owned by the caller)."""
    values = raw.float()
    norms = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    zeros = int((norms == 0).sum())
    if zeros:
        logger.warning("%d of %d embeddings are zero vectors; their cosine is taken as 0", zeros, len(values))
    values /= norms.clamp(min=torch.finfo(torch.float32).tiny)
    return values, values


def kl_features(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose product is -2 times the symmetric KL divergence of two distributions.

    With h(p) = sum p log p, [p, log p, h, 1] . [log q, q, -1, -h] equals
    sum p log q + sum q log p - h(p) - h(q) = -(KL(p|q) + KL(q|p)).
    """
    p = raw.double().clamp(min=_PROBABILITY_FLOOR)
    p = p / p.sum(1, keepdim=True)
    log = p.log()
    h = (p * log).sum(1, keepdim=True)
    one = torch.ones_like(h)
    return torch.cat([p, log, h, one], 1).float(), torch.cat([log, p, -one, -h], 1).float()


def pack_objects(
    detections: Sequence[Detections],
    score_threshold: float = 0.05,
    device: torch.device | str | None = None,
    metric: str = "auto",
    max_detections: int = MAX_DETECTIONS,
) -> PackedObjects:
    """Collect the valid objects of all images.

    An object is valid when its score is at least ``score_threshold`` and above 0; an image counts its
    ``max_detections`` best.

    Args:
        detections: N images.
        score_threshold: In [0, 1].
        device: Where the features go; default: where the first image's scores are.
        metric: ``cosine`` of embeddings, ``kl`` of ``class_probs``, or ``auto``.
        max_detections: Per image, >= 1.

    Raises:
        ValueError: Images differ in embedding width, probabilities are missing for ``kl``, or an argument is out of
            range.
    """
    if not 0.0 <= score_threshold <= 1.0:
        raise ValueError(f"expected score_threshold in [0, 1], got {score_threshold}")
    metric = resolve_metric(detections, metric)
    example = as_tensor(detections[0].scores).device if detections else torch.device("cpu")
    target = torch.device(device) if device is not None else example
    scores = _host_scores(detections)
    rows = [valid_rows(s, score_threshold, max_detections) for s in scores]
    used = [k for k, r in enumerate(rows) if len(r)]
    if not used:
        empty, index = torch.zeros(0, 1, device=target), torch.zeros(0, dtype=torch.long)
        return PackedObjects(empty, empty, index, index, torch.zeros(0, device=target), len(detections), metric)
    picked = [detections[k] for k in used]
    kept = [rows[k] for k in used]
    features = _gather(_raw_features(picked, metric), kept, target)
    left, right = _cosine_features(features) if metric == "cosine" else kl_features(features)
    classes = _gather([d.class_indices for d in picked], kept, torch.device("cpu")).long()
    images = torch.from_numpy(np.repeat(np.asarray(used), [len(r) for r in kept]))
    weights = np.concatenate([_weights(scores[k][r]) for k, r in zip(used, kept, strict=True)])
    return PackedObjects(left, right, classes, images, torch.from_numpy(weights).to(target), len(detections), metric)


def _raw_features(picked: Sequence[Detections], metric: str) -> list[object]:
    ids = [d.image_id for d in picked]
    if metric == "cosine":
        raw: list[object] = [d.embeddings for d in picked]
        _check_widths(raw, ids, "embeddings")
        if picked[0].embeddings.shape[1] == 0:
            raise ValueError(
                "expected embeddings with shape (n, d), d >= 1, got d = 0; give embeddings or use metric='kl'"
            )
        return raw
    missing = [d.image_id for d in picked if d.class_probs is None]
    if missing:
        raise ValueError(f"expected class_probs with shape (n, k) for metric='kl', got None for images {missing[:5]}")
    raw = [d.class_probs for d in picked]
    _check_widths(raw, ids, "class_probs")
    return raw


def _weights(scores: np.ndarray) -> np.ndarray:
    values = scores.astype(np.float64)
    return (values / (2.0 * values.sum())).astype(np.float32)
