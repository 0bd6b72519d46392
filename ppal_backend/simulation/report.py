"""``ppal report``: Markdown, CSV, plots and ``summary.json`` from a simulation's folder, finished or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppal_backend.errors import StateError
from ppal_backend.files import atomic_file, write_json
from ppal_backend.simulation import tables
from ppal_backend.simulation.plots import draw_all, draw_sweep, file_of
from ppal_backend.simulation.results import Results
from ppal_backend.simulation.summary import summarise

REPORT, SUMMARY, CSV, DETECTORS = "report.md", "summary.json", "rounds.csv", "detectors.md"
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
        ("mAP by share of labelled images", tables.by_round(summary, results, "map")),
        ("AP50", tables.by_round(summary, results, "map50")),
        ("Mean AP of the tail (rarest third of the classes)", tables.by_round(summary, results, "tail_ap")),
        ("Mean AP of the head (most frequent third)", tables.by_round(summary, results, "head_ap")),
        ("Labelled images", tables.counts_by_round(summary, results, "labelled_images")),
        ("Labelled boxes", tables.counts_by_round(summary, results, "labelled_boxes")),
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
        f"seeds {', '.join(map(str, plan.seeds))}. Every strategy of a seed begins with the same images and the same "
        f"first model."
    )
    if not results.complete:
        done = sum(len(found) for found in results.rounds.values())
        total = len(results.rounds) * (plan.rounds + 1)
        text += f"\n\n**Unfinished: {done} of {total} rounds.** Means are over the rounds that are there."
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
        else f"It reaches {baseline}'s last mAP with {100 * (1 - saving):.0f} % of the labels: a saving of "
        f"{100 * saving:.0f} %."
    )
    matched = summary["box_matched"].get(subject)
    same_boxes = (
        ""
        if matched is None
        else f" Against {matched['against']}, which has as many labelled boxes in every round: "
        f"{100 * matched['mean_gap']:+.1f} mAP in the mean, p = {tables.figure(matched['p_value'], 4)}."
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
        f"careful one and cannot fall below 2 / 2^seeds. Label saving: share of `{baseline}`'s labels not needed to "
        "reach its last mAP, on the mean curves, linear between rounds. Gap at equal boxes: mean gap over the range "
        "of labelled boxes that both curves cover."
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
