"""Which similarity finds images that show the same things: CCMS or global features (Fig. 8 and 9 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.acquisition.ccms import similarity_matrix
from ppal_backend.rounds.detections_store import read_detections
from ppal_backend.simulation.benchmark import Benchmark

TOP = 20
SHOWN = 4
NEIGHBOURS_SHOWN = 3


def compare_retrieval(folder: Path, benchmark: Benchmark, images: int, seed: int = 0) -> dict[str, Any] | None:
    """Compare both similarities on images of the pool.

    Images without true boxes are left out, as they have no classes to share; so are all but the first image of every
    group of near-duplicates, which any similarity finds.

    Args:
        folder: Detections of the pool.
        benchmark: For the true classes.
        images: How many images to draw, the same ones for the same pool.
        seed: Of the draw.

    Returns:
        For ``ccms`` and ``global``: the mean Jaccard index of the true class sets of an image and the ``TOP`` most
        similar ones, the rank correlation over anchors of mean similarity and mean Jaccard, the points themselves
        (similarity scaled to [0, 1]) and a few examples; ``chance`` is the mean Jaccard of all pairs. None with too
        few images for that.
    """
    stored = {d.image_id: (d, f) for d, f in read_detections(folder)}
    ids = _one_of_each_group(sorted(i for i in stored if benchmark.class_sets[i]), benchmark.groups)
    if len(ids) > images:
        ids = sorted(np.random.default_rng([seed, 9]).choice(np.array(ids), images, replace=False).tolist())
    if len(ids) < 3:
        return None
    jaccard = _jaccard([benchmark.class_sets[i] for i in ids])
    similarities = {"ccms": np.asarray(similarity_matrix([stored[i][0] for i in ids])) / 2.0}
    if all("global" in stored[i][1] for i in ids):
        features = np.stack([np.asarray(stored[i][1]["global"], np.float64) for i in ids])
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        similarities["global"] = (features @ features.T + 1.0) / 2.0
    off = ~np.eye(len(ids), dtype=bool)
    answer: dict[str, Any] = {"images": len(ids), "top": min(TOP, len(ids) - 1), "chance": float(jaccard[off].mean())}
    for name, similarity in similarities.items():
        answer[name] = _retrieve(similarity, jaccard, ids)
    return answer


def _one_of_each_group(ids: Sequence[int], groups: Mapping[int, int]) -> list[int]:
    kept: dict[Any, int] = {}
    for image_id in ids:
        kept.setdefault(groups.get(image_id, ("alone", image_id)), image_id)
    return list(kept.values())


def _retrieve(similarity: np.ndarray, jaccard: np.ndarray, ids: Sequence[int]) -> dict[str, Any]:
    own = similarity.copy()
    np.fill_diagonal(own, -np.inf)
    top = min(TOP, len(ids) - 1)
    order = np.argsort(-own, axis=1, kind="stable")[:, :top]
    rows = np.arange(len(ids))[:, None]
    near, shared = own[rows, order].mean(1), jaccard[rows, order].mean(1)
    examples = {int(ids[k]): [int(ids[j]) for j in order[k, :NEIGHBOURS_SHOWN]] for k in _anchors(jaccard)}
    return {
        "jaccard": float(shared.mean()),
        "spearman": spearman(near, shared),
        "points": [[round(float(a), 4), round(float(b), 4)] for a, b in zip(near, shared, strict=True)],
        "examples": {str(anchor): found for anchor, found in examples.items()},
    }


def _anchors(jaccard: np.ndarray) -> list[int]:
    """Examples worth showing: evenly spread over how many images share classes with them."""
    order = np.argsort(jaccard.sum(1), kind="stable")
    return [int(order[k]) for k in np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)]


def _jaccard(sets: Sequence[frozenset[int]]) -> np.ndarray:
    classes = sorted(set().union(*sets))
    present = np.array([[c in members for c in classes] for members in sets], dtype=np.float64)
    shared = present @ present.T
    sizes = present.sum(1)
    return np.asarray(shared / np.maximum(sizes[:, None] + sizes[None, :] - shared, 1.0))


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float | None:
    """Rank correlation in [-1, 1]; None for fewer than three pairs or where one side is constant."""
    from scipy.stats import spearmanr

    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


def mean_retrieval(results: Sequence[Mapping[str, Any] | None]) -> dict[str, float]:
    """Mean Jaccard index of each similarity over several rounds; empty without any."""
    found = [r for r in results if r]
    names = [name for name in ("ccms", "global") if found and all(name in r for r in found)]
    means = {name: float(np.mean([r[name]["jaccard"] for r in found])) for name in names}
    return {**means, "chance": float(np.mean([r["chance"] for r in found]))} if found else {}
