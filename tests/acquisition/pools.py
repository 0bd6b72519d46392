"""Synthetic detections and contexts for the acquisition tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from ppal_backend.structures import Detections, QueryContext


def image(
    image_id: int,
    scores: Any,
    classes: Any,
    embeddings: Any | None = None,
    boxes: Any | None = None,
    **extra: Any,
) -> Detections:
    """One image; embeddings default to zeros-free unit vectors, boxes to 100 px squares."""
    scores = np.asarray(scores, dtype=np.float32)
    n = len(scores)
    if embeddings is None:
        embeddings = np.ones((n, 4))
    if boxes is None:
        boxes = np.tile([0.0, 0.0, 100.0, 100.0], (n, 1))
    return Detections(
        image_id,
        np.asarray(boxes, dtype=np.float32).reshape(n, 4),
        scores,
        np.asarray(classes, dtype=np.int64),
        np.asarray(embeddings, dtype=np.float32).reshape(n, -1) if n else np.zeros((0, 4), np.float32),
        **extra,
    )


def random_image(
    rng: np.random.Generator, image_id: int, classes: int, most: int, dim: int = 8, least: int = 0
) -> Detections:
    """An image with ``least`` to ``most`` random detections, some below the score threshold."""
    n = int(rng.integers(least, most + 1))
    corner = rng.uniform(0, 300, (n, 2))
    scores = np.round(rng.random(n), 2)  # ties happen
    return Detections(
        image_id,
        np.concatenate([corner, corner + rng.uniform(5, 200, (n, 2))], 1).astype(np.float32),
        scores.astype(np.float32),
        rng.integers(0, classes, n),
        rng.normal(size=(n, dim)).astype(np.float32),
        rng.dirichlet(np.ones(classes + 1), n).astype(np.float32),
        softmax=True,
        pre_nms_counts=rng.integers(1, 30, n),
        true_positive=rng.random(n) < scores,
    )


def random_pool(
    rng: np.random.Generator, images: int, classes: int, most: int, dim: int = 8, first_id: int = 0
) -> list[Detections]:
    """A pool with ids that are not positions."""
    return [random_image(rng, first_id + 7 * k, classes, most, dim) for k in range(images)]


def mixture_summaries(rng: np.random.Generator, images: int) -> np.ndarray:
    """Count, then largest, sum and sum of squares of four uncertainties; every fifth image has no detection."""
    rows = []
    for image in range(images):
        values = rng.random((0 if image % 5 == 4 else int(rng.integers(1, 6)), 4))
        largest = values.max(0) if len(values) else np.zeros(4)
        rows.append(np.concatenate([[len(values)], largest, values.sum(0), (values**2).sum(0)]))
    return np.asarray(rows)


def context(seed: int = 0, images: int = 30, classes: int = 5, most: int = 6, labelled: int = 6) -> QueryContext:
    """Everything any strategy asks for."""
    rng = np.random.default_rng(seed)
    pool = random_pool(rng, images, classes, most)
    known = random_pool(rng, labelled, classes, most, first_id=100_000)
    return QueryContext(
        pool=pool,
        num_classes=classes,
        difficulty=rng.random(classes),
        class_counts=rng.integers(0, 50, classes),
        labelled=known,
        image_features={
            "global": rng.normal(size=(images, 6)),
            "fpn": rng.normal(size=(images, 10)),
            "learnloss": np.random.default_rng([seed, 1]).normal(size=(images, 1)),
            "mial": np.random.default_rng([seed, 3]).random((images, 1)),
            "mdn": mixture_summaries(np.random.default_rng([seed, 2]), images),
        },
        labelled_features={"global": rng.normal(size=(labelled, 6)), "fpn": rng.normal(size=(labelled, 10))},
    )
