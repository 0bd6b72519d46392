"""``summary.json``: the figures of a simulation that other programs (and the report) read."""

from __future__ import annotations

from typing import Any

import numpy as np

from ppal_backend.simulation.results import Results
from ppal_backend.simulation.retrieval import mean_retrieval, spearman
from ppal_backend.simulation.statistics import (
    area_between,
    area_under_curve,
    label_saving,
    mean_std,
    permutation_test,
)

BASELINES = ("random", "ppal")
"""What others are compared with: the first of these that was run."""
SUBJECT = "ppal"


def summarise(results: Results) -> dict[str, Any]:
    """All figures of a simulation.

    ``label_saving`` and ``p_value`` at the top are those of ``subject`` (``ppal``, or the strategy with the largest
    area under the curve where it was not run or is the baseline) against ``baseline`` (``random``, or ``ppal`` where
    that was not run); they are None where one is missing.
    """
    baseline = next((name for name in BASELINES if name in results.names), None)
    strategies = {name: _strategy(results, name, baseline) for name in results.names}
    others = {name: s for name, s in strategies.items() if name != baseline}
    subject = SUBJECT if SUBJECT in others else _best(others)
    chosen = strategies.get(subject or "", {})
    return {
        "title": results.plan.title,
        "detector": results.plan.detector,
        "data": {k: v for k, v in results.facts.items() if k not in ("groups", "class_counts", "labels")},
        "seeds": list(results.plan.seeds),
        "rounds": results.plan.rounds,
        "start": results.plan.start,
        "budget": results.plan.budget,
        "complete": results.complete,
        "baseline": baseline,
        "subject": subject,
        "aulc": {name: s["aulc"]["mean"] if s["aulc"] else None for name, s in strategies.items()},
        "label_saving": chosen.get("label_saving"),
        "p_value": chosen.get("p_value"),
        "box_matched": box_matched(results),
        "strategies": strategies,
    }


def box_matched(results: Results) -> dict[str, Any]:
    """Strategies against a baseline with as many labelled boxes, round by round; by name of the strategy."""
    answer: dict[str, Any] = {}
    for variant in results.plan.variants:
        if variant.match is None or variant.name not in results.names:
            continue
        seeds = results.complete_seeds(variant.match, variant.name)
        if not seeds:
            continue
        rows = [results.plan.seeds.index(seed) for seed in seeds]
        gaps = (results.table(variant.match, "map") - results.table(variant.name, "map"))[rows, 1:]
        answer[variant.match] = {
            "against": variant.name,
            "compared_seeds": seeds,
            "map_gap": _means(gaps),
            "mean_gap": float(gaps.mean()),
            "p_value": permutation_test(gaps),
            "p_value_seeds": permutation_test(gaps.mean(axis=1)),
        }
    return answer


def difficulty_correlation(results: Results, name: str) -> np.ndarray:
    """``[seeds, rounds + 1]`` rank correlation of class difficulty with AP, NaN where it is not defined."""

    def get(found: Any) -> float | None:
        if not found["difficulty"]:
            return None
        labels = [label for label in found["difficulty"] if label in found["per_class"]]
        return spearman([found["difficulty"][c] for c in labels], [found["per_class"][c] for c in labels])

    return results.table(name, get)


def _strategy(results: Results, name: str, baseline: str | None) -> dict[str, Any]:
    seeds = results.complete_seeds(name)
    images = [results.curve(name, seed, "labelled_images") for seed in seeds]
    aulc = [area_under_curve(*curve) for curve in images]
    final = mean_std(results.table(name, "map")[:, -1])
    correlation = difficulty_correlation(results, name)
    retrievals = [found["retrieval"] for seed in results.plan.seeds for found in results.rounds[name, seed]]
    seconds = results.table(name, lambda found: sum(found["seconds"].values()))
    answer: dict[str, Any] = {
        "seeds": seeds,
        "aulc": _spread(aulc),
        "final_map": None if final is None else {"mean": final[0], "std": final[1]},
        "map": _means(results.table(name, "map")),
        "map50": _means(results.table(name, "map50")),
        "labelled_images": _means(results.table(name, "labelled_images")),
        "labelled_boxes": _means(results.table(name, "labelled_boxes")),
        "seconds_per_round": None if np.isnan(seconds).all() else float(np.nanmean(seconds)),
        "difficulty_spearman": _means(correlation),
        "retrieval": mean_retrieval(retrievals),
    }
    for group, labels in results.class_groups().items():
        answer[f"{group}_ap"] = _means(results.table(name, results.group_map(labels)))
    duplicates = results.near_duplicates(name)
    answer["near_duplicates"] = {kind: _means(table) for kind, table in duplicates.items()}
    if baseline is not None:
        answer.update(_against(results, name, baseline))
    return answer


def _against(results: Results, name: str, baseline: str) -> dict[str, Any]:
    """Paired figures over the seeds that both have finished."""
    seeds = results.complete_seeds(name, baseline)
    if not seeds or name == baseline:
        return {"label_saving": None, "box_saving": None, "p_value": None, "p_value_seeds": None}
    answer: dict[str, Any] = {"compared_seeds": seeds}
    for what, x in (("label_saving", "labelled_images"), ("box_saving", "labelled_boxes")):
        mine, theirs = (_mean_curve(results, which, seeds, x) for which in (name, baseline))
        answer[what] = label_saving(*mine, *theirs)
        each = [label_saving(*results.curve(name, seed, x), *results.curve(baseline, seed, x)) for seed in seeds]
        answer[f"{what}_per_seed"] = each
    rows = [results.plan.seeds.index(seed) for seed in seeds]
    gaps = (results.table(name, "map") - results.table(baseline, "map"))[rows, 1:]
    by_images = [_aulc_gap(results, name, baseline, seed, "labelled_images") for seed in seeds]
    by_boxes = [_aulc_gap(results, name, baseline, seed, "labelled_boxes") for seed in seeds]
    answer["map_gap"] = _means(gaps)
    answer["p_value"] = permutation_test(gaps)
    answer["p_value_seeds"] = permutation_test(by_images)
    answer["aulc_gap"] = _spread(by_images)
    answer["aulc_gap_by_boxes"] = _spread(by_boxes)
    answer["p_value_by_boxes_seeds"] = permutation_test(by_boxes)
    return answer


def _aulc_gap(results: Results, name: str, baseline: str, seed: int, x: str) -> float:
    """Mean height above the baseline over the range of ``x`` that both curves cover."""
    mine, theirs = results.curve(name, seed, x), results.curve(baseline, seed, x)
    low, high = max(mine[0][0], theirs[0][0]), min(mine[0][-1], theirs[0][-1])
    return area_between(*mine, low, high) - area_between(*theirs, low, high)


def _mean_curve(results: Results, name: str, seeds: list[int], x: str) -> tuple[np.ndarray, np.ndarray]:
    curves = [results.curve(name, seed, x) for seed in seeds]
    return np.mean([c[0] for c in curves], axis=0), np.mean([c[1] for c in curves], axis=0)


def _means(table: np.ndarray) -> list[dict[str, float] | None]:
    """Mean and deviation of every column."""
    found = [mean_std(table[:, k]) for k in range(table.shape[1])]
    return [None if pair is None else {"mean": pair[0], "std": pair[1]} for pair in found]


def _spread(values: list[float]) -> dict[str, Any] | None:
    pair = mean_std(values)
    return None if pair is None else {"mean": pair[0], "std": pair[1], "per_seed": list(values)}


def _best(strategies: dict[str, dict[str, Any]]) -> str | None:
    rated = [(s["aulc"]["mean"], name) for name, s in strategies.items() if s["aulc"]]
    return max(rated)[1] if rated else None
