"""Points of the curve, advice that follows from them, and the table of classes, whose weights rank the pool."""

from datetime import datetime, timedelta

import pytest

from ppal_backend.service.dashboard.forecast import Forecast
from ppal_backend.service.dashboard.learning import (
    Curve,
    Point,
    advice_of,
    class_rows,
    curve_of,
    forecast_of,
    mean_utility,
    pace_per_hour,
    stretches_of,
    uncertainty_left,
    why_no_forecast,
)
from ppal_backend.service.dashboard.project import Query
from ppal_backend.store import ModelVersion, RoundRecord
from ppal_backend.structures.round import describe_slicing

START = datetime(2026, 1, 1)


def measured(value=0.5, images=12):
    interval = [value - 0.1, value + 0.1] if images >= 10 else None
    return {"map": value, "interval": interval, "classes": {"cat": value}, "too_few": {}, "images": images}


def record(number=1, kind="train", state="done", **metrics):
    known = {"map": 0.5, "labelled_images": 10 * number, "labelled_boxes": 30, "images": 12, "version": "v"}
    return RoundRecord(
        number, 1, number, kind, state, "", 1, 0, "", "", {}, known | metrics, False, START, START, START
    )


def point(images, value, hours=0.0, interval=None):
    started = START + timedelta(hours=hours)
    return Point(1, "v", images, 3 * images, value, 40, started, interval=interval)


def growing(ceiling, images=(100, 200, 300, 400, 500)):
    return [point(n, ceiling - 3.0 / n) for n in images]


def verdicts(points, budget=50, goal=1000, uncertainty=None):
    forecast = forecast_of(points)
    return {a.criterion: a.verdict for a in advice_of(points, forecast, budget, goal, uncertainty)}


def drawn(points):
    return [(p.number, p.value) for p in points]


def test_only_versions_that_were_measured_on_the_same_images_are_joined():
    rounds = [
        record(1),  # an earlier release: held out other images every time
        record(2, measured=measured(0.2), image_set="a"),
        record(3, measured=measured(0.3), image_set="a"),
        record(4, measured=measured(0.4), image_set="b", earlier={"3": measured(0.33)}),
        record(5, kind="rank"),
        record(6, state="failed"),
    ]
    curve = curve_of(rounds)
    assert drawn(curve.points) == [(3, 0.33), (4, 0.4)], "round 3 as it is on the images of round 4"
    assert drawn(curve.others) == [(1, 0.5), (2, 0.2)] and curve.quality.measured.map == 0.4
    assert [p.interval for p in curve.points] == [pytest.approx((0.23, 0.43)), pytest.approx((0.3, 0.5))]
    same = curve_of(rounds[:3])
    assert drawn(same.points) == [(2, 0.2), (3, 0.3)] and drawn(same.others) == [(1, 0.5)]


def test_few_images_give_no_point_but_a_sentence():
    curve = curve_of([record(1, measured=measured(0.125, 1), image_set="a", images_wanted=40),
                      record(2, measured=measured(0.045, 4), image_set="b", images_wanted=40)])  # fmt: skip
    assert curve.points == curve.others == []
    assert curve.quality.sentence == "Measured on 4 images: too few to tell; 36 more come by themselves."


def test_a_last_training_on_everything_is_marked_and_no_point():
    rounds = [record(1, measured=measured(0.2), image_set="a"), record(2, map=None, trained_on_everything=True)]
    curve = curve_of(rounds)
    assert drawn(curve.points) == [(1, 0.2)]
    assert curve.quality.sentence == "Not measured: this version was trained on the images that measure, too."
    assert curve_of([]) == Curve()


def test_a_band_covers_rounds_in_a_row_that_have_an_interval():
    has = [True, True, False, True, False, True, True, True]
    points = [point(n, 0.5, interval=(0.4, 0.6) if known else None) for n, known in enumerate(has)]
    assert [[p.images for p in stretch] for stretch in stretches_of(points)] == [[0, 1], [5, 6, 7]]
    assert stretches_of([]) == []


def test_the_three_criteria_are_budget_plateau_and_uncertainty_floor():
    assert list(verdicts(growing(0.8))) == ["Budget", "Plateau", "Uncertainty left"]


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
    assert verdicts(points, uncertainty=(10.0, 1.9))["Uncertainty left"] == "stop"
    assert verdicts(points, uncertainty=(10.0, 2.1))["Uncertainty left"] == "go on"
    assert (
        verdicts(points)["Uncertainty left"] == "open"
        and verdicts(points, uncertainty=(0.0, 1.0))["Uncertainty left"] == "open"
    )


def left(*rounds, detectors=None):
    """Of rounds given by strategy, options and mean utility; a round without a model has None."""
    queries = {n: Query(r[0], (1,), (1,), (1,), {1: r[2]}, options=r[1]) for n, r in enumerate(rounds) if r}
    versions = [
        ModelVersion(1, f"v{n}", n, detectors[n] if detectors else "d", "model.pth" if r else "", ("cat",), None, {})
        for n, r in enumerate(rounds)
    ]
    return uncertainty_left(versions, queries.get)


def test_uncertainty_is_compared_between_rounds_that_chose_in_the_same_way():
    ppal, wider, auto = ("ppal", {"delta": 4}), ("ppal", {"delta": 6}), ("auto", {"delta": 4})
    assert left(None, (*ppal, 8.0), (*ppal, 5.0), (*ppal, 2.0)) == (8.0, 2.0)
    assert left((*ppal, 8.0), (*auto, 0.2)) is None, "sums of entropies against gains for a cost"
    assert left((*ppal, 8.0), (*wider, 6.0)) is None
    assert left((*ppal, 8.0), (*auto, 0.4), (*wider, 6.0), (*auto, 0.3)) == (0.4, 0.3)
    assert left((*ppal, 8.0), (*ppal, 2.0), detectors=("retinanet", "dino")) is None
    assert left(("ppal", None, 8.0), ("ppal", None, 2.0)) == (8.0, 2.0), "rounds of a release that noted no options"
    assert left((*ppal, 8.0)) is None and left(None, None) is None
    again = [ModelVersion(1, name, 1, "d", "model.pth", ("cat",), None, {}) for name in ("v1", "v1-again")]
    query = Query("ppal", (1,), (1,), (1,), {1: 8.0}, options={"delta": 4})
    assert uncertainty_left(again, lambda _: query) is None, "a round that was gone back to is no second one"


@pytest.mark.parametrize("strategy", ["random", "rand+ccms", "typiclust"])
def test_strategies_that_do_not_ask_the_detector_tell_nothing_of_uncertainty(strategy):
    assert left((strategy, {}, 0.9), (strategy, {}, 0.1)) is None


def test_why_there_is_no_forecast_is_told():
    assert "there is 1. 3 more" in why_no_forecast([point(10, 0.1)])
    broken = [*growing(0.8), point(600, 0.3)]
    assert forecast_of(broken) is None and forecast_of(broken[:-1]) is not None
    assert "let expect an mAP of 0.79" in why_no_forecast(broken) and "and it is 0.300" in why_no_forecast(broken)
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
