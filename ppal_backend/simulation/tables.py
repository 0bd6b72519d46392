"""Tables of a report in Markdown; AP figures are percentages, mean ± sample standard deviation over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ppal_backend.simulation.folder import QUERY_STEPS, Results
from ppal_backend.simulation.statistics import mean_std
from ppal_backend.simulation.variants import DIFFICULTY_OPTIONS, INFERENCE_OPTIONS, STARTS, Variant

STAGES: Mapping[str, tuple[str, str]] = {
    "random": ("Random", "Random"),
    "entropy": ("Entropy", "None"),
    "posterior": ("Posterior", "None"),
    "margin": ("Margin", "None"),
    "dcus": ("DCUS", "None"),
    "dfreq": ("D-Freq", "None"),
    "rand+ccms": ("Rand", "CCMS"),
    "entropy+ccms": ("Entropy", "CCMS"),
    "dfreq+ccms": ("D-Freq", "CCMS"),
    "dcus+rand": ("DCUS", "Rand"),
    "dcus+global": ("DCUS", "Global"),
    "dcus+fpn": ("DCUS", "FPN"),
    "dcus+jaccard": ("DCUS", "Jaccard"),
    "ppal": ("DCUS", "CCMS"),
}
"""Stages of the strategies of the paper's Table 1."""
SWEEPABLE = (
    *DIFFICULTY_OPTIONS,
    *INFERENCE_OPTIONS,
    "start",
    "alpha",
    "beta",
    "delta",
    "uncertainty",
    "refine",
    "unit",
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def percent(pair: Mapping[str, float] | None) -> str:
    """``51.5 ± 1.5``, or a dash."""
    return "–" if pair is None else f"{100 * pair['mean']:.1f} ± {100 * pair['std']:.1f}"


def share(value: float | None) -> str:
    """``48 %``, or a dash."""
    return "–" if value is None else f"{100 * value:.0f} %"


def figure(value: float | None, digits: int = 3) -> str:
    """A plain number, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def by_round(summary: Mapping[str, Any], results: Results, key: str) -> str:
    """A figure of every strategy, round by round."""
    header = ["strategy", *_round_headers(results)]
    rows = [[name, *(percent(pair) for pair in s[key])] for name, s in summary["strategies"].items()]
    return markdown(header, rows)


def counts_by_round(summary: Mapping[str, Any], results: Results, key: str, unit: float = 1.0, digits: int = 0) -> str:
    """A count of every strategy, round by round, in units of ``unit``."""
    rows = [
        [name, *("–" if pair is None else f"{pair['mean'] / unit:.{digits}f}" for pair in s[key])]
        for name, s in summary["strategies"].items()
    ]
    return markdown(["strategy", *(f"round {k}" for k in range(results.plan.rounds + 1))], rows)


def comparison(summary: Mapping[str, Any]) -> str:
    """Areas under the curve and everything against the baseline."""
    header = ["strategy", "AULC", "last mAP", "gap in AULC", "p (seeds × rounds)", "p (seeds)", "label saving",
              "box saving", "time saving", "with slow drawing", "gap at equal boxes"]  # fmt: skip
    rows = []
    for name, s in summary["strategies"].items():
        rows.append(
            [
                name,
                percent(s["aulc"]),
                percent(s["final_map"]),
                percent(s.get("aulc_gap")),
                figure(s.get("p_value"), 4),
                figure(s.get("p_value_seeds"), 4),
                share(s.get("label_saving")),
                share(s.get("box_saving")),
                share(s.get("time_saving")),
                share(s.get("time_saving_slow")),
                percent(s.get("aulc_gap_by_boxes")),
            ]
        )
    return markdown(header, rows)


def savings(summary: Mapping[str, Any], results: Results) -> str:
    """What each strategy saved until the mAP of each of the baseline's queries; empty where nothing is compared."""
    rows = []
    for name, s in summary["strategies"].items():
        pairs = zip(s.get("label_saving_by_round", ()), s.get("box_saving_by_round", ()), strict=True)
        if cells := [f"{share(images)} / {share(boxes)}" for images, boxes in pairs]:
            rows.append([name, *cells[1:]])
    header = ["strategy", *(f"query {k + 1}" for k in range(results.plan.rounds))]
    return markdown(header, rows) if rows else ""


def near_duplicates(summary: Mapping[str, Any], results: Results) -> str:
    """Near-duplicates per query; empty where the data name no groups."""
    rows = []
    for name, s in summary["strategies"].items():
        if s["near_duplicates"]:
            pairs = zip(s["near_duplicates"]["inside"], s["near_duplicates"]["labelled"], strict=True)
            rows.append([name, *(_two(inside, before) for inside, before in pairs)])
    header = ["strategy", *(f"query {k}" for k in range(results.plan.rounds))]
    return markdown(header, rows) if rows else ""


def seconds_by_step(results: Results) -> str:
    """Mean seconds of every step of a round after the shared first one; of looking and choosing where images were."""
    steps: dict[str, None] = {}
    for found in results.rounds.values():
        for r in found:
            steps.update(dict.fromkeys(r["seconds"]))
    rows = []
    for name in results.names:
        rounds = [r for s in results.plan.seeds for r in results.rounds[name, s][1:]]
        chose = [r for r in rounds if r["round"] < results.plan.rounds]
        taken = {step: chose if step in ("infer", *QUERY_STEPS) else rounds for step in steps}
        means = [mean_std([r["seconds"].get(step, 0.0) for r in among]) for step, among in taken.items()]
        rows.append([name, *(figure(pair and pair[0], 1) for pair in means)])
    return markdown(["strategy", *steps], rows)


def correlation_by_round(summary: Mapping[str, Any], results: Results) -> str:
    """Rank correlation of class difficulty with AP; empty without difficulties."""
    rows = [
        [name, *("–" if pair is None else f"{pair['mean']:.2f}" for pair in s["difficulty_spearman"])]
        for name, s in summary["strategies"].items()
    ]
    known = any(pair for s in summary["strategies"].values() for pair in s["difficulty_spearman"])
    return markdown(["strategy", *(f"round {k}" for k in range(results.plan.rounds + 1))], rows) if known else ""


def retrieval(summary: Mapping[str, Any]) -> str:
    """Mean Jaccard index of the true classes of the images retrieved; empty without."""
    rows = [
        [name, *(figure(s["retrieval"].get(kind)) for kind in ("ccms", "global", "chance"))]
        for name, s in summary["strategies"].items()
        if s["retrieval"]
    ]
    return markdown(["strategy", "CCMS", "global", "any image"], rows) if rows else ""


def stages(summary: Mapping[str, Any], results: Results) -> str:
    """The form of the paper's Table 1: stage 1, stage 2 and mAP after each query."""
    chosen = [name for name in STAGES if name in summary["strategies"]]
    rows = [[*STAGES[name], *(percent(pair) for pair in summary["strategies"][name]["map"][1:])] for name in chosen]
    return markdown(["stage 1", "stage 2", *_round_headers(results)[1:]], rows) if len(rows) > 1 else ""


def detector_table(pairs: Sequence[tuple[Mapping[str, Any], Results]]) -> str:
    """The form of the paper's Table 4: detector, Random and PPAL, mAP after each query.

    Args:
        pairs: Summary and results of one simulation each.

    Returns:
        The table; its columns are queries by number where the simulations label different shares of their pools.
    """
    rows, headers = [], []
    for summary, results in pairs:
        headers.append(tuple(_round_headers(results)[1:]))
        for name in ("random", "ppal"):
            if name in summary["strategies"]:
                cells = (percent(pair) for pair in summary["strategies"][name]["map"][1:])
                rows.append([summary["detector"], name, *cells])
    if not rows:
        return ""
    longest = max(map(len, headers))
    queries = list(headers[0]) if len(set(headers)) == 1 else [f"query {k}" for k in range(1, longest + 1)]
    rows = [[*row, *[percent(None)] * (2 + longest - len(row))] for row in rows]
    return markdown(["detector", "strategy", *queries], rows)


def sweeps(results: Results) -> dict[str, dict[str, list[tuple[Any, str]]]]:
    """Options that take several values: option, then strategy with its other options, then (value, variant name).

    A variant that leaves the option out stands for its default, where the default is known.
    """
    found: dict[str, dict[str, list[tuple[Any, str]]]] = {}
    for option in SWEEPABLE:
        groups: dict[str, list[tuple[Any, str]]] = {}
        for variant in (results.plan.variant(name) for name in results.names):
            chosen = {**variant.options, **variant.difficulty, **variant.inference, "start": variant.start}
            settings = {"delta": results.plan.delta, **_DEFAULTS, **chosen}
            groups.setdefault(_without(variant, option), []).append((settings[option], variant.name))
        several = {base: sorted(rows, key=str) for base, rows in groups.items() if len({str(v) for v, _ in rows}) > 1}
        if several:
            found[option] = several
    return found


def sweep_table(
    option: str, groups: Mapping[str, Sequence[tuple[Any, str]]], summary: Mapping[str, Any], results: Results
) -> str:
    """The form of the paper's Tables 2 and 3: mAP after each query for every value of an option."""
    rows = [
        [base, str(value), *(percent(pair) for pair in summary["strategies"][name]["map"][1:])]
        for base, listed in groups.items()
        for value, name in listed
    ]
    return markdown(["strategy", option, *_round_headers(results)[1:]], rows)


def long_csv(results: Results) -> str:
    """Every finished round as a line of CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    tail, head = (results.group_map(labels) for labels in results.class_groups().values())
    writer.writerow(
        ["strategy", "seed", "round", "labelled_images", "labelled_boxes", "map", "map50", "tail_ap", "head_ap",
         "near_duplicates", "near_duplicates_of_labelled", "seconds"]
    )  # fmt: skip
    for name in results.names:
        duplicates = results.near_duplicates(name)
        for row, seed in enumerate(results.plan.seeds):
            for r in results.rounds[name, seed]:
                k = int(r["round"])
                inside = [int(t[row, k]) if k < results.plan.rounds else "" for t in duplicates.values()] or ["", ""]
                basic = [name, seed, k, r["labelled_images"], r["labelled_boxes"], r["map"], r["map50"]]
                writer.writerow([*basic, tail(r), head(r), *inside, round(sum(r["seconds"].values()), 2)])
    return out.getvalue()


_DEFAULTS: Mapping[str, Any] = {
    "alpha": 0.3,
    "beta": 0.2,
    "xi": 0.6,
    "momentum": 0.99,
    "absent": "keep",
    "embedding": "query",
    "levels": "provenance",
    "uncertainty": "entropy",
    "refine": "kmedoids",
    "unit": "images",
}


def _without(variant: Variant, option: str) -> str:
    options = {k: v for k, v in variant.options.items() if k != option}
    difficulty = {k: v for k, v in variant.difficulty.items() if k != option}
    inference = {k: v for k, v in variant.inference.items() if k != option}
    budget = None if option == "unit" else variant.budget
    start = STARTS[0] if option == "start" else variant.start
    return Variant(variant.strategy, options, difficulty, variant.match, budget, inference, start).name


def _round_headers(results: Results) -> list[str]:
    plan = results.plan
    shares = [100 * (plan.start + k * plan.budget) / plan.pool_images for k in range(plan.rounds + 1)]
    return [f"{value:.1f} %" for value in shares]


def _two(inside: Mapping[str, float] | None, before: Mapping[str, float] | None) -> str:
    return "–" if inside is None or before is None else f"{inside['mean']:.1f} / {before['mean']:.1f}"
