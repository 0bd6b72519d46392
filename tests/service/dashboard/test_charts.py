"""Charts: values end up at the right pixels, ticks are round and hold them all."""

import pytest

from ppal_backend.service.dashboard import charts
from ppal_backend.service.dashboard.charts import Band, Mark, Series, axis, chart, sparkline

LEFT, END, TOP, FLOOR = charts.LEFT, charts.WIDTH - charts.RIGHT, charts.TOP, charts.HEIGHT - charts.BOTTOM


@pytest.mark.parametrize(
    ("highest", "texts"),
    [
        (0.72, ["0", "0.2", "0.4", "0.6", "0.8"]),
        (1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (1289, ["0", "500", "1000", "1500"]),
        (10, ["0", "2", "4", "6", "8", "10"]),
        (0.0, ["0", "1"]),
    ],
)
def test_ticks_are_round_and_reach_the_highest_value(highest, texts):
    made = axis("n", highest, 0, 100)
    assert [text for _, text in made.ticks] == texts
    assert made.high >= highest and made.ticks[0][0] == 0 and made.ticks[-1][0] == 100


def test_values_lie_where_the_axes_say():
    made = chart("t", "s", "x", "y", [Series([Mark(0, 0, "a"), Mark(100, 0.5, "b"), Mark(50, 1.0, "c")])])
    (drawn,) = made.drawn
    middle = (LEFT + END) / 2
    assert [d[:2] for d in drawn.dots] == [
        (LEFT, FLOOR), (END, (TOP + FLOOR) / 2), (middle, TOP)]  # fmt: skip
    assert drawn.path.startswith(f"M{LEFT:g} {FLOOR:g}L") and drawn.path.count("L") == 2


def test_a_band_goes_up_and_back_and_fits_in():
    band = Band([(0, 0.1, 0.2), (10, 0.3, 1.9)], "interval")
    made = chart("t", "s", "x", "y", [Series([Mark(5, 0.5, "a")])], [band])
    (drawn,) = made.bands
    assert (drawn.style, drawn.title) == ("band", "interval")
    assert made.y.high >= 1.9 and made.x.high >= 10
    up = [made.y.px(0.2), made.y.px(1.9)]
    assert drawn.path == f"M{LEFT:g} {up[0]:g}L{END:g} {up[1]:g}L{END:g} " + (
        f"{made.y.px(0.3):g}L{LEFT:g} {made.y.px(0.1):g}Z"
    )


def test_a_mark_with_an_interval_has_a_line_through_it_that_fits_in():
    made = chart("t", "s", "x", "y", [Series([Mark(10, 0.5, "a", interval=(0.4, 1.3)), Mark(20, 0.6, "b")])])
    assert made.y.high >= 1.3
    assert made.drawn[0].whiskers == [(made.x.px(10), made.y.px(0.4), made.y.px(1.3))]


def test_points_that_are_not_joined_have_no_line():
    assert chart("t", "s", "x", "y", [Series([Mark(1, 1, "a"), Mark(2, 2, "b")], joined=False)]).drawn[0].path == ""


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="at least one mark"):
        chart("t", "s", "x", "y", [Series([])])


def test_a_sparkline_rises_with_its_values():
    assert sparkline([0.5]) == "" and sparkline([0.0, 1.0]) == "M2 20L88 2"
