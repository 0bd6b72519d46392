"""``ppal report``: summary.json, Markdown, CSV and plots from a simulation's folder, finished or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.errors import StateError
from ppal_backend.files import atomic_file, write_json
from ppal_backend.simulation import tables
from ppal_backend.simulation.cost import SHOWN_FROM, SLOW_DRAWING, AnnotationTime
from ppal_backend.simulation.folder import Results
from ppal_backend.simulation.plots import draw_all, draw_sweep, file_of
from ppal_backend.simulation.statistics import (
    area_between,
    area_under_curve,
    label_savings,
    mean_retrieval,
    mean_std,
    permutation_test,
    spearman,
)

REPORT, SUMMARY, CSV, DETECTORS = "report.md", "summary.json", "rounds.csv", "detectors.md"
_FAST = AnnotationTime()
_TIME = (
    f"An image {_FAST.image:g} s, a box drawn {_FAST.drawn:g} s (extreme clicking, ICCV 2017), moved or relabelled "
    f"{_FAST.moved:g} s, kept {_FAST.kept:g} s (verification, CVPR 2016), one of nothing deleted {_FAST.deleted:g} s; "
    f"pre-annotations from a score of {SHOWN_FROM:g}. The second saving of time is with {SLOW_DRAWING.drawn:g} s for a "
    f"box (ordinary drawing, HCOMP 2012)."
)
BASELINES = ("random", "ppal")
"""What others are compared with: the first of these that was run."""
SUBJECT = "ppal"
_CAPTIONS: Mapping[str, str] = {
    "map": "mAP against labelled images; bands are one standard deviation over seeds",
    "map50": "AP50 against labelled images",
    "map-by-boxes": "mAP against labelled boxes: what remains when boxes, not images, are paid for",
    "boxes": "boxes that come with the labelled images",
    "tail-and-head": "mean AP of the rarest and of the most frequent third of the classes",
    "difficulty": "class difficulty, sorted, and AP of the same class (the paper's Fig. 2)",
    "near-duplicates": "picks whose scene the same query holds already",
    "retrieval": "similarity of retrieved images against the Jaccard index of their true classes (Fig. 9)",
    "retrieval-examples": "the three most similar images by CCMS and by global features (Fig. 8)",
}


def write_report(folder: Path, out: Path | None = None, plots: bool = True) -> Path:
    """Write ``report.md``, ``summary.json``, ``rounds.csv`` and the plots.

    Args:
        folder: Folder of a simulation; an unfinished one is reported as far as it is.
        out: Where to write; ``folder/report`` by default.
        plots: Whether to draw; tables alone take no time.

    Returns:
        Path of ``report.md``.

    Raises:
        StateError: ``folder`` holds no simulation, or no finished round.
    """
    results = Results.read(Path(folder).resolve())
    out = results.root / "report" if out is None else Path(out)
    summary = summarise(results)
    write_json(out / SUMMARY, summary)
    _write_text(out / CSV, tables.long_csv(results))
    drawn = draw_all(results, out) if plots else []
    swept = _draw_sweeps(results, summary, out) if plots else []
    _write_text(out / REPORT, _markdown(results, summary, drawn, swept))
    return out / REPORT


def write_detectors(folders: Sequence[Path], out: Path) -> Path:
    """Write ``detectors.md``: Random and PPAL of several simulations, usually one a detector (the paper's Table 4).

    Args:
        folders: Folders of simulations, finished or not.
        out: Where to write.

    Returns:
        Path of the file.

    Raises:
        StateError: A folder holds no simulation, or none of them ran ``random`` or ``ppal``.
    """
    found = [Results.read(Path(folder).resolve()) for folder in folders]
    table = tables.detector_table([(summarise(results), results) for results in found])
    if not table:
        raise StateError("expected simulations of random or ppal, got none of the two; add one of them to a simulation")
    sources = "\n".join(f"- {results.plan.title or results.root.name}: {results.facts['source']}" for results in found)
    _write_text(Path(out) / DETECTORS, f"# Detectors\n\nmAP after each query.\n\n{table}\n\n{sources}\n")
    return Path(out) / DETECTORS


def _markdown(results: Results, summary: dict[str, Any], plots: list[str], swept: list[str]) -> str:
    parts = [f"# {results.plan.title}", _what_was_run(results), _headline(summary)]
    sections = (
        ("Comparison", tables.comparison(summary) + "\n\n" + _reading(summary)),
        (
            f"Saved until the mAP of each of `{summary['baseline']}`'s queries: images / boxes",
            tables.savings(summary, results),
        ),
        ("mAP by share of labelled images", tables.by_round(summary, results, "map")),
        ("AP50", tables.by_round(summary, results, "map50")),
        ("Mean AP of the tail (rarest third of the classes)", tables.by_round(summary, results, "tail_ap")),
        ("Mean AP of the head (most frequent third)", tables.by_round(summary, results, "head_ap")),
        ("Labelled images", tables.counts_by_round(summary, results, "labelled_images")),
        ("Labelled boxes", tables.counts_by_round(summary, results, "labelled_boxes")),
        (
            "Modelled hours of annotation",
            tables.counts_by_round(summary, results, "labelled_seconds", 3600, 1) + "\n\n" + _TIME,
        ),
        ("Near-duplicates per query: inside it / of labelled images", tables.near_duplicates(summary, results)),
        ("Rank correlation of class difficulty and AP", tables.correlation_by_round(summary, results)),
        ("Retrieval: Jaccard index of the true classes of the top 20", tables.retrieval(summary)),
        ("Seconds per step", tables.seconds_by_step(results)),
        ("Stages (form of the paper's Table 1)", tables.stages(summary, results)),
        ("Detector (form of the paper's Table 4)", tables.detector_table([(summary, results)])),
    )
    parts += [f"## {title}\n\n{text}" for title, text in sections if text]
    for option, groups in tables.sweeps(results).items():
        table = tables.sweep_table(option, groups, summary, results)
        parts.append(f"## {option} (form of the paper's Tables 2 and 3)\n\n{table}")
    if plots or swept:
        parts.append("## Plots")
    parts += [f"![{name}]({file_of(name)})\n\n*{_CAPTIONS[name]}*" for name in plots]
    parts += [f"![{name}]({name}.svg)" for name in swept]
    return "\n\n".join(parts) + "\n"


def _what_was_run(results: Results) -> str:
    plan, facts = results.plan, results.facts
    training = "the detector's schedule" if plan.max_iterations is None else f"at most {plan.max_iterations} iterations"
    text = (
        f"Detector `{plan.detector}` ({training}, {plan.init_weights} weights). Data: {facts['source']}; pool of "
        f"{facts['pool_images']} images with {facts['pool_boxes']} boxes of {len(facts['labels'])} classes, "
        f"{facts['test_images']} test images. Start {plan.start} images, {plan.budget} a round, {plan.rounds} rounds, "
        f"seeds {', '.join(map(str, plan.seeds))}. "
    )
    one_start = len({v.start for v in plan.variants}) == 1
    whoever = "every strategy" if one_start else "every random start, and every typical one,"
    sharing: dict[str, list[str]] = {}
    for variant in plan.variants:
        sharing.setdefault(variant.first_model, []).append(variant.name)
    groups = " | ".join(map(", ".join, sharing.values()))
    models = "the same first model" if len(sharing) == 1 else f"a first model that is shared by: {groups}"
    text += f"In a seed {whoever} begins with the same images and {models}."
    uneven = [v.name for v in plan.variants if not v.counts_images or v.budget not in (None, plan.budget)]
    if uneven:
        text += f" Other numbers of images than the columns say: {', '.join(uneven)} (see *Labelled images*)."
    if not results.complete:
        done = sum(len(found) for found in results.rounds.values())
        total = len(results.rounds) * (plan.rounds + 1)
        text += f"\n\n**Unfinished: {done} of {total} rounds.** Means are over the rounds that are there."
    if facts.get("notes"):
        text += "\n\nOf the data:\n\n" + "\n".join(f"- {note}" for note in facts["notes"])
    return text


def _headline(summary: Mapping[str, Any]) -> str:
    subject, baseline = summary["subject"], summary["baseline"]
    chosen = summary["strategies"].get(subject)
    if chosen is None or baseline is None or not chosen.get("compared_seeds"):
        return ""
    gap, saving = chosen["aulc_gap"], summary["label_saving"]
    saved = (
        f"It never reaches {baseline}'s last mAP."
        if saving is None
        else f"It reaches {baseline}'s last mAP with {100 * (1 - saving):.0f} % of the labels that {baseline} needs "
        f"for it: a saving of {100 * saving:.0f} %."
    )
    matched = summary["box_matched"].get(subject)
    same_boxes = (
        ""
        if matched is None
        else f" Against {matched['against']}, which has as many labelled boxes in every round (to within "
        f"{100 * matched['boxes_off']:.0f} %): {100 * matched['mean_gap']:+.1f} mAP in the mean, "
        f"p = {tables.figure(matched['p_value'], 4)}."
    )
    return (
        f"**{subject} against {baseline}:** {100 * gap['mean']:+.1f} mAP in the mean over the curve, "
        f"p = {tables.figure(summary['p_value'], 4)} over seeds × rounds. {saved}{same_boxes}"
    )


def _reading(summary: Mapping[str, Any]) -> str:
    baseline = summary["baseline"]
    if baseline is None:
        return "Neither `random` nor `ppal` was run, so there is nothing to compare with."
    return (
        f"AULC: mean mAP over the range of labelled images. Gaps are paired by seed against `{baseline}`. The "
        "permutation test over seeds × rounds flips the sign of every paired difference; rounds of one seed share "
        "images, so it says more than independent data would: the test over seeds alone (one difference each) is the "
        f"careful one and cannot fall below 2 / 2^seeds. Label saving: of the labels with which `{baseline}` first "
        "reaches its last mAP, the share that is not needed for it, on the mean curves, linear between rounds. Gap at "
        "equal boxes: mean gap over the range of labelled boxes that both curves cover."
    )


def _draw_sweeps(results: Results, summary: Mapping[str, Any], out: Path) -> list[str]:
    """One plot for every option whose values are numbers (Fig. 7)."""
    names = []
    for option, groups in tables.sweeps(results).items():
        points: dict[str, list[tuple[float, float, float]]] = {}
        for base, listed in groups.items():
            for value, name in listed:
                final = summary["strategies"][name]["final_map"]
                if isinstance(value, int | float) and final is not None:
                    points.setdefault(base, []).append((float(value), final["mean"], final["std"]))
        if points:
            draw_sweep(points, option, out / f"sweep-{option}")
            names.append(f"sweep-{option}")
    return names


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path, "w") as file:
        file.write(text)


def summarise(results: Results) -> dict[str, Any]:
    """All figures of a simulation.

    ``label_saving`` and ``p_value`` at the top are those of ``subject`` (``ppal``, or the strategy farthest above the
    baseline over the curve where it was not run or is the baseline) against ``baseline`` (``random``, or ``ppal`` where
    that was not run); they are None where one is missing.
    """
    baseline = next((name for name in BASELINES if name in results.names), None)
    strategies = {name: _strategy(results, name, baseline) for name in results.names}
    others = {name: s for name, s in strategies.items() if name != baseline}
    subject = SUBJECT if SUBJECT in others else _best(others, "aulc" if baseline is None else "aulc_gap")
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
    """Strategies against one with as many labelled boxes, of several ``random``; by name of the strategy."""
    answer: dict[str, Any] = {}
    for variant in sorted(results.plan.variants, key=lambda v: v.strategy != BASELINES[0]):
        if variant.match is None or variant.match in answer or variant.name not in results.names:
            continue
        seeds = results.complete_seeds(variant.match, variant.name)
        if not seeds:
            continue
        rows = [results.plan.seeds.index(seed) for seed in seeds]
        gaps = (results.table(variant.match, "map") - results.table(variant.name, "map"))[rows, 1:]
        boxes, wanted = (results.table(n, "labelled_boxes")[rows, 1:] for n in (variant.name, variant.match))
        answer[variant.match] = {
            "against": variant.name,
            "compared_seeds": seeds,
            "boxes_off": float((abs(boxes - wanted) / wanted).max()),
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
        "labelled_seconds": _means(results.table(name, "labelled_seconds")),
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
    for what, x in (
        ("label_saving", "labelled_images"),
        ("box_saving", "labelled_boxes"),
        ("time_saving", "labelled_seconds"),
        ("time_saving_slow", "labelled_seconds_slow"),
    ):
        if any(
            found[x] is None for seed in seeds for which in (name, baseline) for found in results.rounds[which, seed]
        ):
            continue  # a simulation from before people's work was counted
        mine, theirs = (_mean_curve(results, which, seeds, x) for which in (name, baseline))
        until_each = label_savings(*mine, *theirs)
        answer[what], answer[f"{what}_by_round"] = until_each[-1], until_each
        per_seed = (label_savings(*results.curve(name, seed, x), *results.curve(baseline, seed, x)) for seed in seeds)
        answer[f"{what}_per_seed"] = [found[-1] for found in per_seed]
    gaps = np.array([_round_gaps(results, name, baseline, seed) for seed in seeds])
    by_images = [_aulc_gap(results, name, baseline, seed, "labelled_images") for seed in seeds]
    by_boxes = [_aulc_gap(results, name, baseline, seed, "labelled_boxes") for seed in seeds]
    answer["map_gap"] = _means(gaps)
    answer["p_value"] = permutation_test(gaps)
    answer["p_value_seeds"] = permutation_test(by_images)
    answer["aulc_gap"] = _spread(by_images)
    answer["aulc_gap_by_boxes"] = _spread(by_boxes)
    answer["p_value_by_boxes_seeds"] = permutation_test(by_boxes)
    return answer


def _round_gaps(results: Results, name: str, baseline: str, seed: int) -> np.ndarray:
    """Height above the baseline at its numbers of images after each query, NaN where the strategy never had so many."""
    (x, y), (at, theirs) = (results.curve(which, seed, "labelled_images") for which in (name, baseline))
    return (np.interp(at, x, y, left=np.nan, right=np.nan) - theirs)[1:]


def _aulc_gap(results: Results, name: str, baseline: str, seed: int, x: str) -> float | None:
    """Mean height above the baseline over the range of ``x`` that both curves cover; None where there is none."""
    mine, theirs = results.curve(name, seed, x), results.curve(baseline, seed, x)
    low, high = max(mine[0][0], theirs[0][0]), min(mine[0][-1], theirs[0][-1])
    if high < low:
        return None
    return area_between(*mine, low, high) - area_between(*theirs, low, high)


def _mean_curve(results: Results, name: str, seeds: list[int], x: str) -> tuple[np.ndarray, np.ndarray]:
    curves = [results.curve(name, seed, x) for seed in seeds]
    return np.mean([c[0] for c in curves], axis=0), np.mean([c[1] for c in curves], axis=0)


def _means(table: np.ndarray) -> list[dict[str, float] | None]:
    """Mean and deviation of every column."""
    found = [mean_std(table[:, k]) for k in range(table.shape[1])]
    return [None if pair is None else {"mean": pair[0], "std": pair[1]} for pair in found]


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    pair = mean_std(values)
    return None if pair is None else {"mean": pair[0], "std": pair[1], "per_seed": list(values)}


def _best(strategies: dict[str, dict[str, Any]], by: str) -> str | None:
    rated = [(s[by]["mean"], name) for name, s in strategies.items() if s.get(by)]
    return max(rated)[1] if rated else None
