"""What the model has learned, round by round, and whether labeling more is likely to pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import fmean
from typing import Literal

from ppal_backend.service.dashboard.forecast import FEWEST_POINTS, LEAST_SCATTER, Forecast, Range, can_forecast
from ppal_backend.service.dashboard.round_files import Query
from ppal_backend.store import RoundRecord

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
    return [_by_budget(images, goal), _by_plateau(gain, budget), _by_uncertainty(uncertainty)]


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


def _by_budget(images: int, goal: int) -> Advice:
    if images >= goal:
        return Advice("Budget", "stop", f"{images} of the {goal} images that were planned are labelled.")
    return Advice("Budget", "go on", f"{images} of {goal} images are labelled, {goal - images} are left.")


def _by_plateau(gain: Range | None, budget: int) -> Advice:
    if gain is None:
        return Advice("Plateau", "open", "Without a forecast nothing can be told.")
    told = f"The next {budget} images are expected to bring {_points(gain)} mAP points"
    if gain.high < WORTHWHILE:
        return Advice("Plateau", "stop", f"{told}: less than {_LEAST} even in the better case.")
    if gain.low >= WORTHWHILE:
        return Advice("Plateau", "go on", f"{told}: at least {_LEAST} even in the worse case.")
    return Advice("Plateau", "open", f"{told}: whether that is worth it, these rounds cannot tell.")


def _by_uncertainty(uncertainty: tuple[float, float] | None) -> Advice:
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
