"""The forecast: it finds a known curve, says how sure it is, and is silent when there is nothing to say."""

import csv
from pathlib import Path

import numpy as np
import pytest

from ppal_backend.service.dashboard.forecast import COVERED, HORIZON, LEAST_SCATTER, Forecast, can_forecast

IMAGES = [50, 100, 150, 200, 300, 400, 500]


def curve(n, a=0.8, b=2.0, c=0.5):
    return a - b * np.asarray(n, float) ** -c


def reference(images, values, n):
    """Quantiles of mAP at ``n`` by brute force over curves, told by their values at the first and the last round.

    With a prior of 1/s the scatter s integrates to (sum of squares)^(-k/2). Scatter must be above the least one.
    """
    images, grid = np.asarray(images, float), np.linspace(-0.08, 0.08, 121)
    first, last = (g.ravel() for g in np.meshgrid(values[0] + grid, values[-1] + grid))
    at, weights = [], []
    for c in np.geomspace(0.05, 2.0, 40):
        x = images**-c
        slope = (last - first) / (x[-1] - x[0])
        intercept = first - slope * x[0]
        squares = ((intercept[:, None] + slope[:, None] * x - values) ** 2).sum(1)
        possible = (slope <= 0) & (intercept >= 0) & (intercept <= 1)
        at.append((intercept + slope * n**-c)[possible])
        weights.append((squares ** (-len(images) / 2))[possible])
    order = np.argsort(np.concatenate(at))
    summed = np.cumsum(np.concatenate(weights)[order])
    quantiles = [(1 - COVERED) / 2, 0.5, (1 + COVERED) / 2]
    return np.concatenate(at)[order][np.searchsorted(summed / summed[-1], quantiles)]


@pytest.mark.parametrize("n", [520, 2000])
def test_it_is_what_brute_force_over_all_curves_gives(n):
    values = curve(IMAGES) + np.random.default_rng(0).normal(0, 0.015, len(IMAGES))
    found = Forecast(IMAGES, values).at(n)
    assert [found.low, found.middle, found.high] == pytest.approx(reference(IMAGES, values, n), abs=0.003)


def test_points_of_a_power_law_are_continued_along_it():
    forecast = Forecast(IMAGES, curve(IMAGES))
    for n in (600, 1000):
        found = forecast.at(n)
        assert found.middle == pytest.approx(curve(n), abs=0.01) and found.low < curve(n) < found.high
    gain = forecast.gain(500, 500)
    assert gain.middle == pytest.approx(curve(1000) - curve(500), abs=0.01)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = {520: [], 1500: []}
    for _ in range(120):
        forecast = Forecast(IMAGES, curve(IMAGES) + rng.normal(0, 0.01, len(IMAGES)))
        for n, held in hits.items():
            found = forecast.at(n)
            held.append(found.low < curve(n) < found.high)
    for n, held in hits.items():
        assert np.mean(held) == pytest.approx(COVERED, abs=0.1), n


def test_it_is_less_sure_far_away_and_with_more_scatter():
    near, far = (Forecast(IMAGES, curve(IMAGES)).at(n) for n in (520, 5000))
    assert far.high - far.low > 2 * (near.high - near.low)
    wild = Forecast(IMAGES, curve(IMAGES) + np.array([1, -1, 1, -1, 1, -1, 1]) * 0.03).at(520)
    assert wild.high - wild.low > 2 * (near.high - near.low)


def test_points_that_lie_on_a_curve_by_chance_do_not_make_it_certain():
    found = Forecast(IMAGES[:4], curve(IMAGES[:4])).at(200)
    assert found.high - found.low > LEAST_SCATTER


def test_the_same_points_give_the_same_forecast():
    assert Forecast(IMAGES, curve(IMAGES)).at(700) == Forecast(IMAGES, curve(IMAGES)).at(700)


def test_too_few_different_numbers_of_images_are_refused():
    assert not can_forecast([10, 20, 30, 30]) and not can_forecast([0, 10, 20, 30]) and can_forecast([10, 20, 30, 40])
    with pytest.raises(ValueError, match="at least 4 different numbers of images, got 3"):
        Forecast([10, 20, 30, 30], [0.1, 0.2, 0.3, 0.3])


def test_falling_map_is_no_growth():
    assert not Forecast([10, 20, 30, 40, 50], [0.5, 0.45, 0.4, 0.35, 0.3]).is_growing
    assert Forecast(IMAGES, curve(IMAGES)).is_growing


def test_what_is_shown_held_what_came_on_the_simulators_curves():
    """The curves' own interval held 60 % one round on and 44 % two rounds on, of the 80 % that it said."""
    held = {False: [], True: []}
    for path in sorted(Path(__file__).parents[3].glob("docs/results/*/rounds.csv")):
        with path.open() as file:
            rows = sorted(csv.DictReader(file), key=lambda row: int(row["round"]))
        for key in {(row["strategy"], row["seed"]) for row in rows}:
            curve_ = [(int(r["labelled_images"]), float(r["map"])) for r in rows if (r["strategy"], r["seed"]) == key]
            images, values = ([point[k] for point in curve_] for k in (0, 1))
            for known in range(4, len(curve_)):
                forecast = Forecast(images[:known], values[:known])
                if forecast.is_growing:
                    for at in range(known, min(known + HORIZON, len(curve_))):
                        for widened in held:
                            found = forecast.at(images[at]).widened() if widened else forecast.at(images[at])
                            held[widened].append(found.low <= values[at] <= found.high)
    assert len(held[True]) >= 75
    assert 0.75 <= np.mean(held[True]) <= 0.90 and np.mean(held[False]) < 0.65
