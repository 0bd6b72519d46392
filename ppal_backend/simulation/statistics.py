"""Figures that compare strategies (areas, label saving, a paired permutation test) and similarities (retrieval)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.acquisition.ccms import similarity_matrix
from ppal_backend.rounds.detections_store import StoredDetections
from ppal_backend.simulation.data import Benchmark

TOP = 20
"""Images retrieved for one."""
EXAMPLES = 4
NEIGHBOURS_SHOWN = 3
_EXACT_UP_TO = 18
_DRAWS = 100_000
_BATCH = 10_000


def area_under_curve(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Mean height of a curve: its trapezoid area over the width of its range.

    Args:
        x: Rising positions (labelled images).
        y: Heights (mAP).

    Returns:
        The mean height; for a single point, or a range of width 0, the mean of ``y``.

    Raises:
        ValueError: Lengths differ, there is no point, or ``x`` falls.
    """
    a, b = _curve(x, y)
    width = a[-1] - a[0]
    return float(np.trapezoid(b, a) / width) if width > 0 else float(b.mean())


def area_between(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, low: float, high: float) -> float:
    """Mean height of a curve over ``[low, high]``, linear between its points and flat beyond its ends."""
    a, b = _curve(x, y)
    within, (first, last) = (a >= low) & (a <= high), np.interp([low, high], a, b)
    return area_under_curve([low, *a[within], high], [first, *b[within], last])


def first_reached(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, level: float) -> float | None:
    """The first position at which a curve, linear between its points, is at ``level`` or above; None if never."""
    a, b = _curve(x, y)
    if b[0] >= level:
        return float(a[0])
    for k in range(1, len(a)):
        if b[k] >= level:
            share = (level - b[k - 1]) / (b[k] - b[k - 1])
            return float(a[k - 1] + share * (a[k] - a[k - 1]))
    return None


def label_savings(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    baseline_x: Sequence[float] | np.ndarray,
    baseline_y: Sequence[float] | np.ndarray,
) -> list[float | None]:
    """Shares of the baseline's labels that a strategy does without.

    Args:
        x: Labels of the strategy.
        y: Its mAP.
        baseline_x: Labels of the baseline.
        baseline_y: Its mAP.

    Returns:
        For the mAP of each of the baseline's models, 1 - n / N, where n and N are where the strategy and the baseline
        first reach it, so that a baseline whose curve dips saves nothing against itself; None if the strategy never
        does.
    """
    answer: list[float | None] = []
    for level in np.asarray(baseline_y, dtype=float):
        reached, needed = first_reached(x, y, level), first_reached(baseline_x, baseline_y, level)
        answer.append(None if reached is None or needed is None else 1.0 - reached / needed)
    return answer


def permutation_test(differences: Sequence[float | None] | np.ndarray, seed: int = 0) -> float | None:
    """Two-sided paired permutation test: how often random signs give a mean as far from 0 as the one observed.

    Exact for up to 18 differences, else 100,000 draws (the observed signs count as one of them).

    Args:
        differences: Paired differences; those that are NaN or None are left out.
        seed: Of the draws.

    Returns:
        p in (0, 1]; None without differences.
    """
    values = np.asarray(differences, np.float64).ravel()
    values = values[np.isfinite(values)]
    count = len(values)
    if count < 2:
        return 1.0 if count else None  # either sign of one difference is as far from 0
    from scipy import stats

    found = stats.permutation_test(
        (values,),
        lambda signed, axis: np.abs(signed.sum(axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=2**count if count <= _EXACT_UP_TO else _DRAWS,
        batch=_BATCH,
        rng=seed,
    )
    return float(found.pvalue)


def mean_std(values: Sequence[float | None] | np.ndarray) -> tuple[float, float] | None:
    """Mean and sample standard deviation (0 for one value) of what is not NaN or None; None of nothing."""
    kept = np.asarray(values, np.float64)
    kept = kept[np.isfinite(kept)]
    if not len(kept):
        return None
    return float(kept.mean()), float(kept.std(ddof=1)) if len(kept) > 1 else 0.0


def _curve(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"expected a curve of at least one point with as many x as y, got {a.shape} and {b.shape}")
    if (np.diff(a) < 0).any():
        raise ValueError(f"expected x that never falls, got {a.tolist()}; sort the points")
    if math.isnan(float(b.sum())):
        raise ValueError("expected heights without NaN; drop unfinished points first")
    return a, b


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
    seen = StoredDetections(folder, embeddings=False).image_ids
    ids = _one_of_each_group(sorted(i for i in seen if benchmark.class_sets[i]), benchmark.groups)
    if len(ids) > images:
        ids = sorted(np.random.default_rng([seed, 9]).choice(np.array(ids), images, replace=False).tolist())
    if len(ids) < 3:
        return None
    jaccard = _jaccard([benchmark.class_sets[i] for i in ids])
    drawn = StoredDetections(folder, ids)
    detections = {d.image_id: d for d in drawn[:]}  # one by one: iteration would keep whole shards alive
    similarities = {"ccms": np.asarray(similarity_matrix([detections[i] for i in ids])) / 2.0}
    stored = drawn.features("global")
    if stored is not None:
        row = {image_id: n for n, image_id in enumerate(drawn.image_ids)}
        features = np.asarray(stored, np.float64)[[row[i] for i in ids]]
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
    return [int(order[k]) for k in np.linspace(0, len(order) - 1, min(EXAMPLES, len(order))).round().astype(int)]


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
