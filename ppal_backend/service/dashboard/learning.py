"""What the model has learned: mAP round by round, class by class, and whether labeling more is likely to pay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import fmean, median
from typing import Any, Literal

from ppal_backend.service.dashboard.charts import Band, Chart, Mark, Series, chart, sparkline
from ppal_backend.service.dashboard.forecast import (
    COVERED,
    FEWEST_POINTS,
    HORIZON,
    LEAST_SCATTER,
    Forecast,
    Range,
    can_forecast,
)
from ppal_backend.service.dashboard.project import Project, Query
from ppal_backend.service.dashboard.quality import agreement_rows
from ppal_backend.store import ModelVersion, RoundRecord
from ppal_backend.structures.quality import FEWEST_IMAGES, Measured, Quality, count, map_text, percent, signed
from ppal_backend.structures.round import describe_slicing

CURVE_STEPS = 40
MEASURED = "95 % interval of what was measured"

WORTHWHILE = LEAST_SCATTER  # what two trainings on the same data differ by is no gain
UNCERTAINTY_FLOOR = 0.2
WITHOUT_UNCERTAINTY = frozenset({"random", "rand+ccms", "typiclust"})
"""Strategies whose utilities do not come from what a model says."""
_LEAST = map_text(WORTHWHILE)
Verdict = Literal["go on", "stop", "open"]


@dataclass(frozen=True)
class Point:
    """The detector of a round, measured. ``value`` is mAP in [0, 1] on ``measured_on`` images, ``interval`` its low and
    high for all images like these; None where too few images tell nothing."""

    number: int
    version: str
    images: int
    boxes: int
    value: float
    measured_on: int
    started: datetime
    per_class: Mapping[str, float] = field(default_factory=dict)
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """What is known of the detectors of a project.

    Args:
        points: measured on the same images, those of the last evaluation, oldest first; only these can be joined.
        others: measured on other images only, which are no part of the curve.
        quality: of the last training.
    """

    points: Sequence[Point] = ()
    others: Sequence[Point] = ()
    quality: Quality | None = None


@dataclass(frozen=True)
class Advice:
    """What one criterion says about labeling on: a verdict and the reason in a sentence."""

    criterion: str
    verdict: Verdict
    text: str


def curve_of(rounds: Sequence[RoundRecord]) -> Curve:
    """The detectors of all complete trainings, as far as they can be told."""
    trained = [r for r in rounds if r.state == "done" and r.kind == "train"]
    if not trained:
        return Curve()
    qualities = {r.number: Quality.of(r.metrics) for r in trained}
    last = next((q for r in reversed(trained) if (q := qualities[r.number]).measured is not None), None)
    newest = max((number for number, q in qualities.items() if q is last), default=0)
    points, others = [], []
    for record in trained:
        own = qualities[record.number]
        on_same = None
        if last is not None:
            on_same = own.measured if own.image_set == last.image_set else last.earlier.get(record.number)
            on_same = last.measured if record.number == newest else on_same
        if on_same is not None and on_same.is_reportable:
            points.append(_point(record, on_same))
        elif own.measured is not None and own.measured.is_reportable:
            others.append(_point(record, own.measured))
        elif own.other_map is not None:
            images = int(record.metrics.get("images") or 0)
            others.append(_point(record, Measured(own.other_map, None, {}, {}, images)))
    return Curve(points, others, qualities[trained[-1].number])


def _point(record: RoundRecord, measured: Measured) -> Point:
    return Point(
        number=record.number,
        version=str(record.metrics.get("version", "")),
        images=int(record.metrics["labelled_images"]),
        boxes=int(record.metrics["labelled_boxes"]),
        value=float(measured.map or 0.0),
        measured_on=measured.images,
        started=record.created_at,
        per_class=dict(measured.classes),
        interval=measured.interval,
    )


def forecast_of(points: Sequence[Point]) -> Forecast | None:
    """The forecast from the rounds so far; None when they are too few or tell nothing, or the last one missed."""
    forecast = _fitted(points)
    return None if forecast is None or missed(points) is not None else forecast


def missed(points: Sequence[Point]) -> Range | None:
    """What the rounds before the last one let expect of it, where that did not come true."""
    before = _fitted(points[:-1])
    if before is None:
        return None
    expected = before.at(points[-1].images).widened()
    return None if expected.low <= points[-1].value <= expected.high else expected


def _fitted(points: Sequence[Point]) -> Forecast | None:
    images = [p.images for p in points]
    if not points or not can_forecast(images):
        return None
    forecast = Forecast(images, [p.value for p in points])
    return forecast if forecast.is_growing else None


def why_no_forecast(points: Sequence[Point]) -> str:
    """Why there is none, in a sentence."""
    different = len({p.images for p in points})
    if different < FEWEST_POINTS:
        missing = FEWEST_POINTS - different
        return (
            f"A curve with three unknowns needs at least {FEWEST_POINTS} versions with different numbers of images, "
            f"measured on the same ones; there {'is' if different == 1 else 'are'} {different}. "
            f"{missing} more and this page shows one."
        )
    expected = missed(points)
    if expected is not None:
        return (
            f"The rounds before let expect an mAP of {_range_text(expected)} and it is {map_text(points[-1].value)}: "
            "this project's curve is not one that can be continued."
        )
    return "mAP has not grown with the number of images, so no curve of growth fits these rounds."


def pace_per_hour(points: Sequence[Point]) -> float | None:
    """Labelled images an hour between the last two trainings, nights included; None when that is unknown."""
    if len(points) < 2:
        return None
    before, last = points[-2:]
    hours = (last.started - before.started).total_seconds() / 3600
    return (last.images - before.images) / hours if hours > 0 and last.images > before.images else None


def advice_of(
    points: Sequence[Point], forecast: Forecast | None, budget: int, goal: int, uncertainty: tuple[float, float] | None
) -> list[Advice]:
    """What the three criteria say; advice only, nothing is halted by it.

    Args:
        points: the rounds so far, at least one.
        forecast: from them, or None.
        budget: images of a round.
        goal: how many images people are ready to label in all.
        uncertainty: see :func:`uncertainty_left`.
    """
    images = points[-1].images
    gain = forecast.gain(images, budget).widened() if forecast is not None else None
    return [_judge_budget(images, goal), _judge_plateau(gain, budget), _judge_uncertainty(uncertainty)]


def stretches_of(points: Sequence[Point]) -> list[list[Point]]:
    """Rounds in a row that have an interval, as a band can be drawn over two or more of them."""
    stretches: list[list[Point]] = [[]]
    for point in points:
        if point.interval is None:
            stretches.append([])
        else:
            stretches[-1].append(point)
    return [stretch for stretch in stretches if len(stretch) > 1]


def mean_utility(query: Query | None) -> float | None:
    """Mean utility of a query set; None without a query set or without utilities."""
    values = [query.utilities[i] for i in query.image_ids if i in query.utilities] if query is not None else []
    return fmean(values) if values else None


def uncertainty_left(
    versions: Sequence[ModelVersion], query_of: Callable[[int], Query | None]
) -> tuple[float, float] | None:
    """Mean utility of the query sets of the first and the last round whose utilities mean the same.

    Every strategy has a unit of its own, and every detector its number of boxes. So the last round that had a model is
    compared with the earliest of its detector, strategy and options; None where there is none, or where the strategy's
    utilities do not come from what the model says.
    """
    looked = [v for v in versions if v.checkpoint]
    last = query_of(looked[-1].round_number) if looked else None
    left = mean_utility(last)
    if last is None or left is None or last.strategy in WITHOUT_UNCERTAINTY:
        return None
    newest = looked[-1]
    earlier = (v for v in looked if v.round_number < newest.round_number and v.detector == newest.detector)
    queries = (query_of(v.round_number) for v in earlier)
    alike = (q for q in queries if q is not None and (q.strategy, q.options) == (last.strategy, last.options))
    first = next((mean for q in alike if (mean := mean_utility(q)) is not None), None)
    return None if first is None else (first, left)


def _judge_budget(images: int, goal: int) -> Advice:
    if images >= goal:
        return Advice("Budget", "stop", f"{images} of the {goal} images that were planned are labelled.")
    return Advice("Budget", "go on", f"{images} of {goal} images are labelled, {goal - images} are left.")


def _judge_plateau(gain: Range | None, budget: int) -> Advice:
    if gain is None:
        return Advice("Plateau", "open", "Without a forecast nothing can be told.")
    told = f"The next {budget} images are expected to bring {_gain_text(gain)} mAP"
    if gain.high < WORTHWHILE:
        return Advice("Plateau", "stop", f"{told}: less than {_LEAST} even in the better case.")
    if gain.low >= WORTHWHILE:
        return Advice("Plateau", "go on", f"{told}: at least {_LEAST} even in the worse case.")
    return Advice("Plateau", "open", f"{told}: whether that is worth it, these rounds cannot tell.")


def _judge_uncertainty(uncertainty: tuple[float, float] | None) -> Advice:
    if uncertainty is None or uncertainty[0] <= 0:
        return Advice(
            "Uncertainty left", "open",
            "It takes two rounds in which a model of the same detector chose by the same strategy and options, and a "
            "strategy that goes by what the model says.",
        )  # fmt: skip
    share = uncertainty[1] / uncertainty[0]
    told = (
        f"What the model finds most worth labeling is {percent(share)} as uncertain as in the first round "
        f"that chose in the same way ({uncertainty[1]:.2f} after {uncertainty[0]:.2f})"
    )
    if share < UNCERTAINTY_FLOOR:
        return Advice("Uncertainty left", "stop", f"{told}: below {percent(UNCERTAINTY_FLOOR)}, little is left to ask.")
    return Advice("Uncertainty left", "go on", f"{told}.")


def _gain_text(gain: Range) -> str:
    return f"{signed(gain.middle)} ({signed(gain.low)} to {signed(gain.high)})"


def _range_text(expected: Range) -> str:
    return f"{map_text(expected.middle)} ({map_text(max(0.0, expected.low))} to {map_text(expected.high)})"


FEW_BOXES = 10
RARE_SHARE = 0.2
HARD_ABOVE_MEAN = 0.1


@dataclass(frozen=True)
class ClassRow:
    """One class. ``ap`` and ``difficulty`` in [0, 1], ``weight`` w of Eq. 4; None where nobody measured it."""

    label: str
    ap: float | None
    difficulty: float | None
    weight: float | None
    boxes: int | None
    is_rare: bool = False
    is_hard: bool = False


def class_rows(
    labels: Sequence[str],
    difficulty: Sequence[float] | None,
    per_class: Mapping[str, float],
    boxes: Mapping[str, int] | None,
    weights: Mapping[str, float] | None,
) -> list[ClassRow]:
    """Classes by falling difficulty, those without one last, in the order of the labels among equals.

    Args:
        labels: in the order of the class indices.
        difficulty: ``[C]`` class difficulties in the same order, or None.
        per_class: AP by label.
        boxes: labelled boxes by label, or None.
        weights: what the round that ranked the pool gave each label (Eq. 4), or None.
    """
    hard_from = fmean(difficulty) + HARD_ABOVE_MEAN if difficulty else math.inf
    counts = list(boxes.values()) if boxes else []
    rare_below = max(FEW_BOXES, RARE_SHARE * median(counts)) if counts else 0
    rows = []
    for index, label in enumerate(labels):
        d = difficulty[index] if difficulty else None
        count = boxes.get(label, 0) if boxes else None
        rows.append(
            ClassRow(
                label=label,
                ap=per_class.get(label),
                difficulty=d,
                weight=(weights or {}).get(label),
                boxes=count,
                is_rare=count is not None and count < rare_below,
                is_hard=d is not None and d >= hard_from,
            )
        )
    return sorted(rows, key=lambda row: (row.difficulty is None, -(row.difficulty or 0.0)))


def learning_page(project: Project, goal: int | None) -> dict[str, Any]:
    """mAP over labels, the forecast, the advice."""
    curve = curve_of(project.rounds)
    points = curve.points
    slicing = describe_slicing(project.trained.metrics if project.trained else {})
    if not points:
        before = before_labels(project)
        return {"points": [], "others": curve.others, "quality": curve.quality, "slicing": slicing, "before": before}
    forecast = forecast_of(points)
    uncertainty = uncertainty_left(project.versions, lambda number: project.files(number).query())
    last, budget = points[-1], project.options.budget
    total = last.images + _pool_size(project.rounds)
    goal = goal or total
    pace = pace_per_hour(points)
    return {
        "points": points,
        "others": curve.others,
        "quality": curve.quality,
        "quality_round": last.number,
        "by_images": _map_chart(curve, forecast, budget),
        "by_boxes": _boxes_chart(curve),
        "class_rows": _class_lines(points),
        "forecast": forecast,
        "covered": COVERED,
        "next": _range_text(forecast.at(last.images + budget).widened()) if forecast else None,
        "slicing": slicing,
        "before": before_labels(project),
        "why_none": "" if forecast else why_no_forecast(points),
        "advice": advice_of(points, forecast, budget, goal, uncertainty),
        "goal": goal,
        "total": total,
        "missing": project.missing,
        "hours": project.missing / pace if pace else None,
    }


def before_labels(project: Project) -> Chart | None:
    """How much of each version's pre-annotations people left as they were, on images that nobody had labelled then.

    These are images that were asked for because the detector was unsure of them: harder than the project, and others
    for every version. None where no version had enough of them.
    """
    trained = [r for r in project.rounds if r.state == "done" and r.kind == "train"]
    _, facts = project.snapshot or (0, {})
    images = {str(r.metrics.get("version", "")): int(r.metrics["labelled_images"]) for r in trained}
    rows = agreement_rows(facts.get("agreement") or {}, list(images))
    shown = [r for r in rows if r.version in images and r.tasks >= FEWEST_IMAGES]
    if not shown:
        return None
    marks = [
        Mark(images[r.version], share, f"{r.version}: {percent(share)} of boxes right as shown, on {r.tasks} images")
        for r in shown
        if (share := r.saved) is not None
    ]
    title = "Right before they were labelled: hard images"
    summary = f"share of boxes that needed no hand, for {count(len(shown), 'version')}"
    return chart(title, summary, "labelled images", "share of boxes", [Series(marks, joined=False)])


def classes_page(project: Project) -> dict[str, Any]:
    """Difficulty beside AP."""
    version = project.trained
    if version is None:
        return {"version": None, "rows": []}
    marks = project.files(version.round_number).marks()
    boxes, weights = (
        marks[step].facts.get(fact) if step in marks else None
        for step, fact in (("dataset", "labelled_per_class"), ("candidates", "class_weights"))
    )
    measured = Quality.of(version.metrics).measured
    told = measured.classes if measured is not None and measured.is_reportable else {}
    rows = class_rows(version.labels, version.difficulty, told, boxes, weights)
    return {
        "version": version,
        "rows": rows,
        "most_boxes": max((r.boxes or 0 for r in rows), default=0),
        "rare": [r.label for r in rows if r.is_rare],
        "hard": [r.label for r in rows if r.is_hard],
        "unmeasured": [r.label for r in rows if r.ap is None],
        "scatter": _scatter(rows),
    }


def _pool_size(rounds: Sequence[RoundRecord]) -> int:
    done = [r for r in rounds if r.state == "done" and "pool_images" in r.metrics]
    return int(done[-1].metrics["pool_images"]) if done else 0


def _map_chart(curve: Curve, forecast: Forecast | None, budget: int) -> Chart:
    points = curve.points
    last = points[-1]
    summary = f"mAP of {len(points)} versions on the same images, {map_text(points[0].value)} to {map_text(last.value)}"
    measured, series = _bands(points, "images"), _measured_series(curve, "images")
    if forecast is None:
        return chart("mAP by labelled images", summary, "labelled images", "mAP", series, measured)
    first, end = points[0].images, last.images + HORIZON * budget
    at = [first + (end - first) * i / CURVE_STEPS for i in range(CURVE_STEPS + 1)]
    line = [Mark(n, max(0.0, forecast.at(n).middle), "") for n in at]
    ahead = [(n, forecast.at(n).widened()) for n in at if n >= last.images]
    rows = [(n, max(0.0, r.low), r.high) for n, r in ahead]
    bands = [Band(rows, f"{percent(COVERED)} of forecasts hold"), *measured]
    return chart(
        "mAP by labelled images", summary + ", with forecast", "labelled images", "mAP",
        [Series(line, "forecast"), *series], bands,
    )  # fmt: skip


def _boxes_chart(curve: Curve) -> Chart:
    summary = f"mAP of {len(curve.points)} versions on the same images by labelled boxes"
    series = _measured_series(curve, "boxes")
    return chart("mAP by labelled boxes", summary, "labelled boxes", "mAP", series, _bands(curve.points, "boxes"))


def _measured_series(curve: Curve, by: str) -> list[Series]:
    """Points that were measured on the same images, joined; and the others, which are not."""
    marks = [Mark(getattr(p, by), p.value, _point_title(p), "", p.interval) for p in curve.points]
    others = [Mark(getattr(p, by), p.value, f"{_point_title(p)}, on other images") for p in curve.others]
    return [Series(marks), *([Series(others, "elsewhere", joined=False)] if others else [])]


def _bands(points: Sequence[Point], by: str) -> list[Band]:
    return [
        Band([(getattr(p, by), *p.interval) for p in stretch if p.interval is not None], MEASURED, "measured")
        for stretch in stretches_of(points)
    ]


def _point_title(point: Point) -> str:
    spread = "" if point.interval is None else f" ({map_text(point.interval[0])} to {map_text(point.interval[1])})"
    having = f"{count(point.images, 'image')}, {point.boxes} box{'' if point.boxes == 1 else 'es'}"
    return f"round {point.number}: mAP {map_text(point.value)}{spread} with {having}"


def _class_lines(points: Sequence[Point]) -> list[dict[str, Any]]:
    """AP by class over the rounds, the classes that gained least in front."""
    rows = []
    for label in dict.fromkeys(label for p in points for label in p.per_class):
        values = [p.per_class[label] for p in points if label in p.per_class]
        gain = values[-1] - values[-2] if len(values) > 1 else None
        rows.append({"label": label, "path": sparkline(values), "first": values[0], "last": values[-1], "gain": gain})
    return sorted(rows, key=lambda row: row["last"])


def _scatter(rows: Sequence[ClassRow]) -> Chart | None:
    marks = [
        Mark(
            r.difficulty, r.ap, f"{r.label}: difficulty {r.difficulty:.2f}, AP {r.ap:.3f}", r.label if r.is_hard else ""
        )
        for r in rows
        if r.difficulty is not None and r.ap is not None
    ]
    if not marks:
        return None
    summary = f"{len(marks)} classes: AP on held-out images by training difficulty"
    return chart("Difficulty and AP", summary, "difficulty", "AP", [Series(marks, "points", joined=False)])
