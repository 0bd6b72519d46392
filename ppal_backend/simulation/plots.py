"""Plots of a report, as SVG and PNG; the same results give the same files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ppal_backend.files import atomic_file, read_json
from ppal_backend.simulation.data import POOL
from ppal_backend.simulation.folder import Results, Round

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F7F", "#BCBD22")
MARKERS = "osD^vP*Xdh"
_STYLE: Any = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "ppal",
    "svg.fonttype": "none",
    "figure.dpi": 110,
}
_SIZE = (6.2, 4.0)
_PHOTOGRAPHS = frozenset({"retrieval-examples"})


def file_of(name: str) -> str:
    """File of a plot to show in the report."""
    return f"{name}.png" if name in _PHOTOGRAPHS else f"{name}.svg"


def draw_all(results: Results, folder: Path) -> list[str]:
    """Draw every plot that the results allow.

    Args:
        results: What to draw.
        folder: Where to put ``NAME.svg`` and ``NAME.png``.

    Returns:
        Names of the plots drawn, in the order of the report; those of photographs are PNG only.
    """
    drawn = []
    for name, draw in _PLOTS.items():
        with rc_context(_STYLE):
            figure = Figure(figsize=_SIZE, layout="constrained")
            if draw(results, figure):
                _save(figure, folder / name, photographs=name in _PHOTOGRAPHS)
                drawn.append(name)
    return drawn


def draw_sweep(points: Mapping[str, Sequence[tuple[float, float, float]]], option: str, path: Path) -> None:
    """Final mAP against the values of one option (Fig. 7): per strategy, value with mean and deviation."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 3.2), layout="constrained")
        axes = figure.subplots()
        for k, (strategy, rows) in enumerate(sorted(points.items())):
            values, means, spreads = (np.array(column) for column in zip(*sorted(rows), strict=True))
            colour = COLOURS[k % len(COLOURS)]
            axes.errorbar(values, 100 * means, 100 * spreads, marker="o", color=colour, capsize=3, label=strategy)
        axes.set(xlabel=option, ylabel="mAP of the last round")
        axes.legend()
        _save(figure, path)


def _curves(
    results: Results, axes: Axes, value: str | Callable[[Round], float | None], x: str = "labelled_images"
) -> None:
    """Mean over seeds with a band of one standard deviation."""
    for k, name in enumerate(results.names):
        table, places = 100 * results.table(name, value), results.table(name, x)
        shown = ~np.isnan(table).all(0)
        if not shown.any():
            continue
        table, places = table[:, shown], places[:, shown]
        mean, at = np.nanmean(table, 0), np.nanmean(places, 0)
        spread = np.array([np.nanstd(c, ddof=1) if np.isfinite(c).sum() > 1 else 0.0 for c in table.T])
        colour = COLOURS[k % len(COLOURS)]
        axes.plot(at, mean, marker=MARKERS[k % len(MARKERS)], ms=4, color=colour, label=name)
        axes.fill_between(at, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)


def _curve_plot(value: str, ylabel: str, x: str, xlabel: str) -> Callable[[Results, Figure], bool]:
    def draw(results: Results, figure: Figure) -> bool:
        axes = figure.subplots()
        _curves(results, axes, value, x)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.legend()
        return True

    return draw


def _boxes(results: Results, figure: Figure) -> bool:
    axes = figure.subplots()
    _curves(results, axes, lambda found: found["labelled_boxes"] / 100.0)  # curves are drawn in hundredths
    axes.set(xlabel="labelled images", ylabel="labelled boxes")
    axes.legend()
    return True


def _tail_and_head(results: Results, figure: Figure) -> bool:
    figure.set_size_inches(9.0, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (group, labels) in zip(panels, results.class_groups().items(), strict=True):
        _curves(results, axes, results.group_map(labels))
        axes.set(title=f"{group}: {len(labels)} classes", xlabel="labelled images")
    panels[0].set_ylabel("mean AP")
    handles = panels[-1].get_legend_handles_labels()
    if handles[0]:
        figure.legend(*handles, loc="outside lower center", ncols=4)
    return True


def _difficulty(results: Results, figure: Figure) -> bool:
    """Fig. 2: difficulty, sorted, and AP of each class; one panel a round, mean over seeds."""
    name = "ppal" if "ppal" in results.names else results.names[0]
    seeds = [s for s in results.plan.seeds if any(r["difficulty"] for r in results.rounds[name, s])]
    if not seeds:
        return False
    shown = min(4, min(len(results.rounds[name, s]) for s in seeds))
    figure.set_size_inches(10.0, 1.0 + 2.2 * shown)
    labels = [label for label, c in zip(results.facts["labels"], results.facts["class_counts"], strict=True) if c]
    for number, axes in enumerate(np.atleast_1d(figure.subplots(shown, 1))):
        found = [results.rounds[name, s][number] for s in seeds]
        difficulty = np.array([np.mean([r["difficulty"][c] for r in found]) for c in labels])
        ap = np.array([np.mean([r["per_class"].get(c, np.nan) for r in found]) for c in labels])
        order = np.argsort(-difficulty, kind="stable")
        axes.bar(range(len(labels)), ap[order], color=COLOURS[5], label="AP")
        axes.plot(range(len(labels)), difficulty[order], color=COLOURS[1], marker="o", ms=3, label="difficulty")
        axes.set_xticks(range(len(labels)), [labels[k] for k in order], rotation=60, ha="right", fontsize=7)
        axes.set(title=f"{name}, round {number}", ylim=(0, 1))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def _duplicates(results: Results, figure: Figure) -> bool:
    axes = figure.subplots()
    width = 0.8 / max(1, len(results.names))
    drawn = False
    for k, name in enumerate(results.names):
        tables = results.near_duplicates(name)
        if not tables or np.isnan(tables["inside"]).all():
            continue
        drawn = True
        mean = np.array([np.nanmean(c) if np.isfinite(c).any() else 0.0 for c in tables["inside"].T])
        axes.bar(np.arange(len(mean)) + k * width, mean, width, color=COLOURS[k % len(COLOURS)], label=name)
    if not drawn:
        return False
    axes.set_xticks(np.arange(results.plan.rounds) + 0.4 - width / 2, [str(k) for k in range(results.plan.rounds)])
    axes.set(xlabel="query after round", ylabel="near-duplicates in the query")
    axes.legend()
    return True


def _retrieval_points(results: Results, figure: Figure) -> bool:
    """Fig. 9: mean similarity of the images retrieved against their mean Jaccard index."""
    found = _retrieval(results)
    if found is None or "global" not in found:
        return False
    figure.set_size_inches(8.0, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, title) in zip(panels, (("global", "global similarity"), ("ccms", "CCMS")), strict=True):
        points = np.array(found[name]["points"])
        low, high = points[:, 0].min(), points[:, 0].max()
        scaled = (points[:, 0] - low) / max(high - low, 1e-12)
        axes.scatter(scaled, points[:, 1], s=8, alpha=0.5, color=COLOURS[0], lw=0)
        rho = found[name]["spearman"]
        correlation = "" if rho is None else f", rank correlation {rho:.2f}"
        axes.set(title=f"{title}: Jaccard {found[name]['jaccard']:.3f}{correlation}", xlabel="mean similarity, scaled")
    panels[0].set_ylabel("mean Jaccard of the true classes")
    return True


def _retrieval_images(results: Results, figure: Figure) -> bool:
    """Fig. 8: anchors and what both similarities find for them."""
    found = _retrieval(results)
    if found is None or "global" not in found:
        return False
    files = {image["id"]: image["file_name"] for image in read_json(results.root / "data" / POOL)["images"]}
    anchors = list(found["ccms"]["examples"])
    rows = [
        [int(anchor), *found["ccms"]["examples"][anchor], *found["global"]["examples"][anchor]] for anchor in anchors
    ]
    if not all(Path(files[i]).is_file() for row in rows for i in row):
        return False
    per_side = len(found["ccms"]["examples"][anchors[0]])
    titles = ["anchor", *["CCMS"] * per_side, *["global"] * per_side]
    figure.set_size_inches(1.3 * len(titles), 1.4 * len(rows))
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, panels in zip(rows, grid, strict=True):
        for image_id, axes in zip(row, panels, strict=True):
            with Image.open(files[image_id]) as picture:
                picture.thumbnail((160, 160))
                axes.imshow(np.asarray(picture.convert("RGB")))
            axes.set_axis_off()
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=8)
    return True


def _retrieval(results: Results) -> dict[str, Any] | None:
    """The last retrieval of the strategy of interest."""
    for name in ("ppal", *results.names):
        for seed in results.plan.seeds:
            found = [r["retrieval"] for r in results.rounds.get((name, seed), ()) if r["retrieval"]]
            if found:
                return dict(found[-1])
    return None


def _save(figure: Figure, path: Path, photographs: bool = False) -> None:
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {})):
        if photographs and suffix == ".svg":
            continue  # a vector file would hold the pixels uncompressed
        with atomic_file(path.with_suffix(suffix)) as file:
            figure.savefig(file, format=suffix[1:], metadata=metadata)


_PLOTS: Mapping[str, Callable[[Results, Figure], bool]] = {
    "map": _curve_plot("map", "mAP", "labelled_images", "labelled images"),
    "map50": _curve_plot("map50", "AP50", "labelled_images", "labelled images"),
    "map-by-boxes": _curve_plot("map", "mAP", "labelled_boxes", "labelled boxes"),
    "boxes": _boxes,
    "tail-and-head": _tail_and_head,
    "difficulty": _difficulty,
    "near-duplicates": _duplicates,
    "retrieval": _retrieval_points,
    "retrieval-examples": _retrieval_images,
}
