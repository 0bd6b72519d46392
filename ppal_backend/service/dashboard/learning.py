"""What the model has learned: mAP round by round, class by class, and whether labeling more is likely to pay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import fmean, median
from typing import Any, Literal

from ppal_backend.service.dashboard.charts import Band, Chart, Mark, Series, chart, sparkline
from ppal_backend.service.dashboard.forecast import COVERED, FEWEST_POINTS, LEAST_SCATTER, Forecast, Range, can_forecast
from ppal_backend.service.dashboard.project import Project, Query
from ppal_backend.store import RoundRecord
from ppal_backend.structures.round import describe_slicing

CURVE_STEPS = 40
LOOK_AHEAD = 2.0
MEASURED = "95% of resamples of the held-out images"

WORTHWHILE = LEAST_SCATTER  # what two trainings on the same data differ by is no gain
UNCERTAINTY_FLOOR = 0.2
_LEAST = f"{WORTHWHILE * 100:g} points"
Verdict = Literal["go on", "stop", "open"]


@dataclass(frozen=True)
class Point:
    """A round that trained and was evaluated. ``value`` is mAP in [0, 1] on ``measured_on`` images it did not see,
    ``interval`` its low and high had other images been held out; None where the round kept none."""

    number: int
    version: str
    images: int
    boxes: int
    value: float
    map50: float | None
    measured_on: int
    started: datetime
    per_class: Mapping[str, float] = field(default_factory=dict)
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Advice:
    """What one criterion says about labeling on: a verdict and the reason in a sentence."""

    criterion: str
    verdict: Verdict
    text: str


def points_of(rounds: Sequence[RoundRecord]) -> list[Point]:
    """One point for every complete training with an mAP, oldest first."""
    return [
        Point(
            number=r.number,
            version=str(r.metrics.get("version", "")),
            images=int(r.metrics["labelled_images"]),
            boxes=int(r.metrics["labelled_boxes"]),
            value=float(r.metrics["map"]),
            map50=r.metrics.get("map50"),
            measured_on=int(r.metrics.get("images") or 0),
            started=r.created_at,
            per_class=dict(r.metrics.get("per_class") or {}),
            interval=_interval(r.metrics.get("map_interval")),
        )
        for r in rounds
        if r.state == "done" and r.kind == "train" and r.metrics.get("map") is not None
    ]


def forecast_of(points: Sequence[Point]) -> Forecast | None:
    """The forecast from the rounds so far; None when they are too few or tell nothing."""
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
            f"A curve with three unknowns needs at least {FEWEST_POINTS} trainings with different numbers of images; "
            f"there {'is' if different == 1 else 'are'} {different}. {missing} more and this page shows one."
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
        uncertainty: mean utility of the query set in the first and in the last round that had a model, or None.
    """
    images = points[-1].images
    gain = forecast.gain(images, budget) if forecast is not None else None
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


def _judge_budget(images: int, goal: int) -> Advice:
    if images >= goal:
        return Advice("Budget", "stop", f"{images} of the {goal} images that were planned are labelled.")
    return Advice("Budget", "go on", f"{images} of {goal} images are labelled, {goal - images} are left.")


def _judge_plateau(gain: Range | None, budget: int) -> Advice:
    if gain is None:
        return Advice("Plateau", "open", "Without a forecast nothing can be told.")
    told = f"The next {budget} images are expected to bring {_points(gain)} mAP points"
    if gain.high < WORTHWHILE:
        return Advice("Plateau", "stop", f"{told}: less than {_LEAST} even in the better case.")
    if gain.low >= WORTHWHILE:
        return Advice("Plateau", "go on", f"{told}: at least {_LEAST} even in the worse case.")
    return Advice("Plateau", "open", f"{told}: whether that is worth it, these rounds cannot tell.")


def _judge_uncertainty(uncertainty: tuple[float, float] | None) -> Advice:
    if uncertainty is None or uncertainty[0] <= 0:
        return Advice(
            "Uncertainty floor", "open", "Two rounds that ranked the pool with a model are needed to compare."
        )
    share = uncertainty[1] / uncertainty[0]
    told = (
        f"What the model finds most worth labeling is {share:.0%} as uncertain as in the first round "
        f"({uncertainty[1]:.2f} after {uncertainty[0]:.2f})"
    )
    if share < UNCERTAINTY_FLOOR:
        return Advice("Uncertainty floor", "stop", f"{told}: below {UNCERTAINTY_FLOOR:.0%}, little is left to ask.")
    return Advice("Uncertainty floor", "go on", f"{told}.")


def _interval(stored: Sequence[float] | None) -> tuple[float, float] | None:
    return None if stored is None else (float(stored[0]), float(stored[1]))


def _points(gain: Range) -> str:
    return f"{gain.middle * 100:+.1f} ({gain.low * 100:+.1f} to {gain.high * 100:+.1f})"


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
    points = points_of(project.rounds)
    slicing = describe_slicing(project.trained.metrics if project.trained else {})
    if not points:
        return {"points": [], "slicing": slicing}
    forecast = forecast_of(points)
    last, budget = points[-1], project.options.budget
    total = last.images + _pool_size(project.rounds)
    goal = goal or total
    pace = pace_per_hour(points)
    missing = max(0, budget - project.new_annotations)
    return {
        "points": points,
        "by_images": _map_chart(points, forecast, budget),
        "by_boxes": _boxes_chart(points),
        "class_rows": _class_lines(points),
        "forecast": forecast,
        "covered": COVERED,
        "next": forecast.at(last.images + budget) if forecast else None,
        "ceiling": forecast.ceiling() if forecast else None,
        "slicing": slicing,
        "why_none": "" if forecast else why_no_forecast(points),
        "advice": advice_of(points, forecast, budget, goal, _uncertainty(project)),
        "goal": goal,
        "total": total,
        "missing": missing,
        "hours": missing / pace if pace else None,
    }


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
    rows = class_rows(version.labels, version.difficulty, version.metrics.get("per_class") or {}, boxes, weights)
    return {
        "version": version,
        "rows": rows,
        "most_boxes": max((r.boxes or 0 for r in rows), default=0),
        "rare": [r.label for r in rows if r.is_rare],
        "hard": [r.label for r in rows if r.is_hard],
        "scatter": _scatter(rows),
    }


def _pool_size(rounds: Sequence[RoundRecord]) -> int:
    done = [r for r in rounds if r.state == "done" and "pool_images" in r.metrics]
    return int(done[-1].metrics["pool_images"]) if done else 0


def _uncertainty(project: Project) -> tuple[float, float] | None:
    """Mean utility of the query set of the first and of the last round that had a model and a strategy."""
    numbers = [v.round_number for v in project.versions if v.checkpoint]
    if len(numbers) < 2:
        return None
    first, last = (mean_utility(project.files(n).query()) for n in (numbers[0], numbers[-1]))
    return None if first is None or last is None else (first, last)


def _map_chart(points: Sequence[Point], forecast: Forecast | None, budget: int) -> Chart:
    marks = [
        Mark(p.images, p.value, _point_title(p, f"{p.images} images, {p.boxes} boxes"), "", p.interval) for p in points
    ]
    last = points[-1]
    summary = f"mAP of {len(points)} rounds, from {points[0].value:.3f} to {last.value:.3f}"
    measured = _bands(points, "images")
    if forecast is None:
        return chart("mAP by labelled images", summary, "labelled images", "mAP", [Series(marks)], measured)
    first = points[0].images
    end = max(last.images * LOOK_AHEAD, last.images + budget)
    at = [first + (end - first) * i / CURVE_STEPS for i in range(CURVE_STEPS + 1)]
    ranges = [forecast.at(n) for n in at]
    curve = [Mark(n, max(0.0, r.middle), "") for n, r in zip(at, ranges, strict=True)]
    rows = [(n, max(0.0, r.low), min(1.0, r.high)) for n, r in zip(at, ranges, strict=True)]
    bands = [Band(rows, f"{COVERED:.0%} of the curves that fit"), *measured]
    series = [Series(curve, "forecast"), Series(marks)]
    return chart("mAP by labelled images", summary + ", with forecast", "labelled images", "mAP", series, bands)


def _boxes_chart(points: Sequence[Point]) -> Chart:
    marks = [Mark(p.boxes, p.value, _point_title(p, f"{p.boxes} boxes"), "", p.interval) for p in points]
    summary = f"mAP of {len(points)} rounds by labelled boxes"
    bands = _bands(points, "boxes")
    return chart("mAP by labelled boxes", summary, "labelled boxes", "mAP", [Series(marks)], bands)


def _bands(points: Sequence[Point], by: str) -> list[Band]:
    return [
        Band([(getattr(p, by), *p.interval) for p in stretch if p.interval is not None], MEASURED, "measured")
        for stretch in stretches_of(points)
    ]


def _point_title(point: Point, having: str) -> str:
    spread = "" if point.interval is None else " ({:.3f} to {:.3f})".format(*point.interval)
    return f"round {point.number}: mAP {point.value:.3f}{spread} with {having}"


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
