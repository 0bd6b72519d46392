"""A map of the pool for people to look at: every image a point, on the two axes along which the images differ most."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from ppal_backend.rounds.ports import PoolEntry

MAP = "map.json"
FEATURE = "global"
FEWEST_LABELLED = 200
MOST_DRAWN = 20_000
_BLOCK = 4096
_DECIMALS = 4


@dataclass(frozen=True)
class Plane:
    """``[n, 2]`` points, and the share in [0, 1] of all variance that each of the two axes holds."""

    points: np.ndarray
    explained: tuple[float, float]


def principal_plane(features: np.ndarray) -> Plane:
    """Put images on the two axes along which their directions differ most.

    Vectors are brought to length 1 first, so that two images are as far apart as their cosine says; what the plane
    leaves out can only make them look nearer. An axis points to where its largest weight is positive: the same
    features give the same map.

    Args:
        features: ``[n, d]`` finite, one row an image; rows of zeros stay where they are.

    Returns:
        ``[n, 2]`` points around 0. All lie at 0, with nothing explained, where no two images differ.

    Source: principal component analysis.
    """
    if not len(features):
        return Plane(np.zeros((0, 2)), (0.0, 0.0))
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    rows = features / np.where(lengths > 0, lengths, 1.0)
    rows = np.pad(rows, ((0, 0), (0, max(0, 2 - rows.shape[1]))))
    rows = rows - rows.mean(axis=0, dtype=np.float64).astype(rows.dtype)
    width = rows.shape[1]
    scatter = np.zeros((width, width))
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK].astype(np.float64)
        scatter += block.T @ block
    total = float(np.trace(scatter))
    if total <= rows.size * np.finfo(rows.dtype).eps ** 2:
        return Plane(np.zeros((len(rows), 2)), (0.0, 0.0))
    values, axes = scipy.linalg.eigh(scatter, subset_by_index=[width - 2, width - 1])
    axes = axes[:, ::-1]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)
    first, second = (float(max(0.0, value)) / total for value in values[::-1])
    return Plane(rows @ axes, (first, second))


def labelled_to_draw(entries: Sequence[PoolEntry], pool_images: int) -> list[PoolEntry]:
    """The labelled images that a round looks at for its map alone: all, or an even sample of them by id.

    At most a tenth as many as the pool has, so that looking at them adds little; ``FEWEST_LABELLED`` are always fine.
    """
    most = max(FEWEST_LABELLED, pool_images // 10)
    ordered = sorted(entries, key=lambda entry: entry.image_id)
    if len(ordered) <= most:
        return ordered
    return [ordered[i * len(ordered) // most] for i in range(most)]


def pool_to_draw(image_ids: Sequence[int], chosen: Collection[int]) -> list[int]:
    """Rows of the pool's images that the map shows: all, or of more than :data:`MOST_DRAWN` an even sample by place.

    The query set is always among them.
    """
    if len(image_ids) <= MOST_DRAWN:
        return list(range(len(image_ids)))
    wanted = set(chosen)
    kept = [row for row, image_id in enumerate(image_ids) if image_id in wanted]
    others = [row for row, image_id in enumerate(image_ids) if image_id not in wanted]
    count = min(len(others), max(0, MOST_DRAWN - len(kept)))
    return sorted(kept + [others[k * len(others) // count] for k in range(count)])


def map_of(
    pool: Mapping[int, np.ndarray],
    labelled: Mapping[int, np.ndarray],
    entries: Sequence[PoolEntry],
    pool_images: int | None = None,
) -> dict[str, Any]:
    """The map as JSON.

    Args:
        pool: ``[d]`` features by image id of the pool's images to draw.
        labelled: ``[d]`` features by image id of the labelled images there are features of.
        entries: All labelled images.
        pool_images: Images of the pool in all; None where all of them are drawn.

    Returns:
        ``ids``, ``x`` and ``y`` of the pool; ``labelled``, of which each also names its file and size; how many
        ``labelled_images`` and ``pool_images`` there are in all;
        the ``feature`` and what both axes have ``explained`` of its variance.
    """
    known = [entry for entry in entries if entry.image_id in labelled]
    rows = [*pool.values(), *(labelled[entry.image_id] for entry in known)]
    plane = principal_plane(np.stack(rows) if rows else np.zeros((0, 2)))
    x, y = (np.round(plane.points[:, axis], _DECIMALS).tolist() for axis in (0, 1))
    return {
        "feature": FEATURE,
        "explained": list(plane.explained),
        "labelled_images": len(entries),
        "pool_images": len(pool) if pool_images is None else pool_images,
        "ids": list(pool),
        "x": x[: len(pool)],
        "y": y[: len(pool)],
        "labelled": [
            {"image_id": e.image_id, "path": e.path, "width": e.width, "height": e.height, "x": px, "y": py}
            for e, px, py in zip(known, x[len(pool) :], y[len(pool) :], strict=True)
        ],
    }
