"""Points of the curve, advice that follows from them, and the table of classes, whose weights rank the pool."""

from datetime import datetime, timedelta

import pytest

from ppal_backend.service.dashboard.forecast import Forecast
from ppal_backend.service.dashboard.learning import (
    Point,
    advice_of,
    class_rows,
    forecast_of,
    mean_utility,
    pace_per_hour,
    points_of,
    stretches_of,
    why_no_forecast,
)
from ppal_backend.service.dashboard.project import Query
from ppal_backend.store import RoundRecord
from ppal_backend.structures.round import describe_slicing

START = datetime(2026, 1, 1)


def record(number=1, kind="train", state="done", **metrics):
    known = {"map": 0.5, "labelled_images": 10, "labelled_boxes": 30, "images": 4, "version": "v"}
    return RoundRecord(
        number, 1, number, kind, state, "", 1, 0, "", "", {}, known | metrics, False, START, START, START
    )


def point(images, value, hours=0.0, interval=None):
    started = START + timedelta(hours=hours)
    return Point(1, "v", images, 3 * images, value, None, 4, started, interval=interval)


def growing(ceiling, images=(100, 200, 300, 400, 500)):
    return [point(n, ceiling - 3.0 / n) for n in images]


def verdicts(points, budget=50, goal=1000, uncertainty=None):
    forecast = forecast_of(points)
    return {a.criterion: a.verdict for a in advice_of(points, forecast, budget, goal, uncertainty)}


def test_only_complete_measured_trainings_are_points():
    rounds = [record(1), record(2, kind="rank"), record(3, state="failed"), record(4, map=None), record(5, map=0.7)]
    assert [(p.number, p.value, p.measured_on) for p in points_of(rounds)] == [(1, 0.5, 4), (5, 0.7, 4)]


def test_a_point_has_the_interval_that_its_round_kept():
    rounds = [record(1), record(2, map_interval=None), record(3, map_interval=[0.4, 0.7])]
    assert [p.interval for p in points_of(rounds)] == [None, None, (0.4, 0.7)]


def test_a_band_covers_rounds_in_a_row_that_have_an_interval():
    has = [True, True, False, True, False, True, True, True]
    points = [point(n, 0.5, interval=(0.4, 0.6) if known else None) for n, known in enumerate(has)]
    assert [[p.images for p in stretch] for stretch in stretches_of(points)] == [[0, 1], [5, 6, 7]]
    assert stretches_of([]) == []


def test_the_three_criteria_are_budget_plateau_and_uncertainty_floor():
    assert list(verdicts(growing(0.8))) == ["Budget", "Plateau", "Uncertainty floor"]


def test_budget_is_used_up_when_as_many_as_planned_are_labelled():
    points = growing(0.8)
    assert verdicts(points, goal=501)["Budget"] == "go on" and verdicts(points, goal=500)["Budget"] == "stop"


def test_plateau_needs_a_gain_below_what_two_trainings_differ_by():
    flat = [point(n, 0.6 + n * 1e-6) for n in range(100, 2000, 100)]
    assert verdicts(flat, budget=10)["Plateau"] == "stop"
    steep = [point(n, 0.9 - 2.0 * n**-0.5) for n in (20, 40, 60, 80, 100, 120, 140)]
    assert verdicts(steep, budget=200)["Plateau"] == "go on"
    assert verdicts(steep[:3])["Plateau"] == "open", "three rounds tell nothing"


def test_uncertainty_is_compared_with_the_first_round():
    points = growing(0.8)
    assert verdicts(points, uncertainty=(10.0, 1.9))["Uncertainty floor"] == "stop"
    assert verdicts(points, uncertainty=(10.0, 2.1))["Uncertainty floor"] == "go on"
    assert (
        verdicts(points)["Uncertainty floor"] == "open"
        and verdicts(points, uncertainty=(0.0, 1.0))["Uncertainty floor"] == "open"
    )


def test_why_there_is_no_forecast_is_told():
    assert "there is 1. 3 more" in why_no_forecast([point(10, 0.1)])
    falling = [point(n, 0.9 - n / 1000) for n in (100, 200, 300, 400, 500)]
    assert forecast_of(falling) is None and "has not grown" in why_no_forecast(falling)
    assert isinstance(forecast_of(growing(0.8)), Forecast) and forecast_of([]) is None


def test_pace_is_that_of_the_last_two_trainings():
    assert pace_per_hour([point(10, 0.1), point(20, 0.2, 1), point(80, 0.3, 4)]) == pytest.approx(20.0)
    assert pace_per_hour([point(10, 0.1)]) is None and pace_per_hour([point(10, 0.1), point(10, 0.1, 2)]) is None


def test_mean_utility_is_that_of_the_chosen_images():
    query = Query("ppal", (1, 2), (1, 2, 3), (1, 2, 3), {1: 4.0, 2: 2.0, 3: 100.0})
    assert mean_utility(query) == 3.0
    assert mean_utility(None) is None and mean_utility(Query("random", (), (), ())) is None


def test_hard_and_rare_classes_are_named_and_the_hardest_come_first():
    rows = class_rows(
        ["cat", "dog", "owl", "yak"],
        [0.3, 0.3, 0.6, 0.2],
        {"cat": 0.5, "owl": 0.1},
        {"cat": 100, "dog": 120, "owl": 90, "yak": 18},
        {"cat": 1.13, "owl": 1.17},
    )
    assert [(r.label, r.is_hard, r.is_rare) for r in rows] == [
        ("owl", True, False), ("cat", False, False), ("dog", False, False), ("yak", False, True)]  # fmt: skip
    assert rows[0].ap == 0.1 and rows[2].ap is None and rows[0].weight == 1.17 and rows[2].weight is None


def test_a_class_without_boxes_is_rare_and_few_boxes_are_however_few_others_have():
    rows = class_rows(["a", "b"], None, {}, {"a": 9}, None)
    assert [(r.label, r.boxes, r.is_rare) for r in rows] == [("a", 9, True), ("b", 0, True)]


def test_what_was_not_measured_stays_unknown():
    (row,) = class_rows(["a"], None, {}, None, None)
    assert (row.ap, row.difficulty, row.weight, row.boxes) == (None,) * 4 and not row.is_hard and not row.is_rare


def test_what_the_training_decided_about_tiles_is_told_with_its_reason():
    assert describe_slicing({}) == describe_slicing({"slices": None, "why_slices": ""}) == ""
    off = describe_slicing({"slices": None, "why_slices": "half of the 9 labelled boxes are 60 px or more"})
    assert off == "Images are not cut into tiles: half of the 9 labelled boxes are 60 px or more."
    on = describe_slicing({"slices": 416, "why_slices": "chosen in the settings"})
    assert "in tiles of 416 px" in on and on.endswith("chosen in the settings.")
