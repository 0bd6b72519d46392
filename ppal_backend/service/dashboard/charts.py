"""Line and scatter charts as numbers for an inline SVG: pure geometry, drawn by ``chart.html``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 560.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 16.0, 14.0, 44.0
TICKS = 5


@dataclass(frozen=True)
class Mark:
    """A value to draw, with the text that appears when it is pointed at. ``name`` is written beside it; ``interval``
    (low and high) becomes a line through it."""

    x: float
    y: float
    title: str
    name: str = ""
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """Marks, joined by a line unless ``joined`` is false. ``style`` names a CSS class."""

    marks: Sequence[Mark]
    style: str = "main"
    joined: bool = True


@dataclass(frozen=True)
class Band:
    """An interval over x: rows of x, low and high. ``style`` names a CSS class."""

    rows: Sequence[tuple[float, float, float]]
    title: str
    style: str = "band"


@dataclass(frozen=True)
class Axis:
    """Where values lie: ``ticks`` are pairs of pixel and text, rising."""

    label: str
    low: float
    high: float
    start_px: float
    end_px: float
    ticks: Sequence[tuple[float, str]] = ()

    def px(self, value: float) -> float:
        """Pixel of a value, one decimal."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start_px + share * (self.end_px - self.start_px), 1)


@dataclass(frozen=True)
class Drawn:
    """A series in pixels: the line's path; x, y, title and name of each mark; x, low and high of the intervals."""

    style: str
    path: str
    dots: Sequence[tuple[float, float, str, str]]
    whiskers: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Outline:
    """A band in pixels."""

    style: str
    path: str
    title: str


@dataclass(frozen=True)
class Chart:
    """All that the template draws; ``summary`` says in words what is seen."""

    title: str
    summary: str
    x: Axis
    y: Axis
    drawn: Sequence[Drawn]
    bands: Sequence[Outline] = ()
    width: float = field(default=WIDTH)
    height: float = field(default=HEIGHT)


def chart(
    title: str, summary: str, x_label: str, y_label: str, series: Sequence[Series], bands: Sequence[Band] = ()
) -> Chart:
    """Lay a chart out; both axes start at 0.

    Raises:
        ValueError: there is no mark at all.
    """
    marks = [mark for one in series for mark in one.marks]
    if not marks:
        raise ValueError("expected at least one mark to draw, got none")
    rows = [row for band in bands for row in band.rows]
    tops = [mark.interval[1] for mark in marks if mark.interval is not None]
    x = axis(x_label, max([m.x for m in marks] + [r[0] for r in rows]), LEFT, WIDTH - RIGHT)
    y = axis(y_label, max([m.y for m in marks] + [r[2] for r in rows] + tops), HEIGHT - BOTTOM, TOP)
    return Chart(
        title=title,
        summary=summary,
        x=x,
        y=y,
        drawn=[_drawn(one, x, y) for one in series],
        bands=[Outline(band.style, _outline(band.rows, x, y), band.title) for band in bands if band.rows],
    )


def axis(label: str, highest: float, start_px: float, end_px: float) -> Axis:
    """An axis from 0 to the first round number at or above ``highest``."""
    step = _step(highest)
    count = max(1, math.ceil(highest / step - 1e-9))
    bare = Axis(label, 0.0, count * step, start_px, end_px)
    ticks = [(bare.px(i * step), f"{i * step:.10g}") for i in range(count + 1)]
    return Axis(label, bare.low, bare.high, start_px, end_px, ticks)


def sparkline(values: Sequence[float], width: float = 90.0, height: float = 22.0) -> str:
    """Path of a small line over values in [0, 1]; empty for fewer than two."""
    if len(values) < 2:
        return ""
    points = [(i / (len(values) - 1) * (width - 4) + 2, height - 2 - v * (height - 4)) for i, v in enumerate(values)]
    return _path([(round(x, 1), round(y, 1)) for x, y in points])


def _step(highest: float) -> float:
    if highest <= 0:
        return 1.0
    size = 10.0 ** math.floor(math.log10(highest / TICKS))
    return next(size * f for f in (1, 2, 2.5, 5, 10) if size * f * TICKS >= highest * (1 - 1e-9))


def _drawn(one: Series, x: Axis, y: Axis) -> Drawn:
    dots = [(x.px(m.x), y.px(m.y), m.title, m.name) for m in one.marks]
    path = _path([(px, py) for px, py, _, _ in dots]) if one.joined and len(dots) > 1 else ""
    whiskers = [(x.px(m.x), y.px(m.interval[0]), y.px(m.interval[1])) for m in one.marks if m.interval is not None]
    return Drawn(one.style, path, dots, whiskers)


def _outline(rows: Sequence[tuple[float, float, float]], x: Axis, y: Axis) -> str:
    upper = [(x.px(at), y.px(high)) for at, _, high in rows]
    lower = [(x.px(at), y.px(low)) for at, low, _ in reversed(rows)]
    return _path(upper + lower) + "Z"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{px:g} {py:g}" for px, py in points)
