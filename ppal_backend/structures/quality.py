"""What is measured of a detector, and how it is told: one place for every page, command and metric.

mAP is a number from 0 to 1 with three decimals everywhere, never a percentage: it counts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FEWEST_IMAGES = 10
"""Images from which a figure is told at all."""
FEWEST_BOXES = 5
FEWEST_IMAGES_OF_A_CLASS = 3
"""Annotated boxes, and images that hold any, from which a class counts as measured."""

Interval = tuple[float, float]
Verdict = Literal["better", "worse", "open"]


@dataclass(frozen=True)
class Measured:
    """What a set of images tells of a detector.

    Args:
        map: AP over IoU 0.50 to 0.95 in [0, 1], averaged over the classes that are measured; None without any.
        interval: Low and high that hold the mAP on all images like these in 95 % of cases; None for fewer than
            ``FEWEST_IMAGES`` images.
        classes: AP of the classes that are measured, by label.
        too_few: Boxes of the others, by label.
        images: Number of images.
    """

    map: float | None
    interval: Interval | None
    classes: Mapping[str, float]
    too_few: Mapping[str, int]
    images: int

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Measured:
        """The inverse of ``asdict``."""
        return cls(**{**value, "interval": _pair(value["interval"])})

    @property
    def is_reportable(self) -> bool:
        """Whether there is enough to tell a figure at all."""
        return self.map is not None and self.interval is not None


@dataclass(frozen=True)
class Difference:
    """mAP of a detector less that of another on the same images, and the interval of 95 % that it has."""

    map: float
    interval: Interval | None

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Difference:
        """The inverse of ``asdict``."""
        return cls(value["map"], _pair(value["interval"]))

    @property
    def verdict(self) -> Verdict:
        """Whether the detector is better; ``open`` where these images cannot tell."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "open"
        return "better" if self.interval[0] > 0 else "worse"


@dataclass(frozen=True)
class Quality:
    """What a round measured.

    Args:
        measured: Of its detector; None where nothing was measured, or by a release that measured otherwise.
        earlier: Of the detectors of earlier rounds on the same images, by round number.
        differences: Of its detector to theirs.
        active: The round whose detector was in force before.
        images_wanted: Size of the evaluation set when it is full.
        image_set: Tells the images from others.
        other_map: What an earlier release measured on other images.
        on_everything: Whether the detector was trained on the evaluation set too.
        stays: Whether the detector in force before stays so.
    """

    measured: Measured | None
    earlier: Mapping[int, Measured] = field(default_factory=dict)
    differences: Mapping[int, Difference] = field(default_factory=dict)
    active: int | None = None
    images_wanted: int = 0
    image_set: str = ""
    other_map: float | None = None
    on_everything: bool = False
    stays: bool = False

    @classmethod
    def of(cls, metrics: Mapping[str, Any]) -> Quality:
        """From a round's metrics."""
        measured, image_set = metrics.get("measured"), str(metrics.get("image_set") or "")
        if not measured or not image_set:
            return cls(
                None,
                other_map=metrics.get("map"),
                images_wanted=int(metrics.get("images_wanted") or 0),
                on_everything=bool(metrics.get("trained_on_everything")),
            )
        return cls(
            Measured.from_dict(measured),
            {int(n): Measured.from_dict(m) for n, m in (metrics.get("earlier") or {}).items()},
            {int(n): Difference.from_dict(d) for n, d in (metrics.get("differences") or {}).items()},
            metrics.get("active"),
            int(metrics.get("images_wanted") or 0),
            image_set,
            stays=bool(metrics.get("in_force")),
        )

    @property
    def figure(self) -> str:
        """mAP for a table; empty where it cannot be told."""
        return map_text(self.measured.map) if self.measured is not None and self.measured.is_reportable else ""

    @property
    def comparison(self) -> Difference | None:
        """The difference to the detector in force before."""
        return None if self.active is None else self.differences.get(self.active)

    @property
    def sentence(self) -> str:
        """How good the detector is, and how sure that is."""
        if self.on_everything:
            return "Not measured: this version was trained on the images that measure, too."
        if self.measured is None:
            return "Not measured on a random sample yet." if self.other_map is not None else "Not measured."
        images = self.measured.images
        if images < FEWEST_IMAGES:
            return f"Measured on {count(images, 'image')}: too few to tell{self._to_come}."
        if not self.measured.is_reportable:
            return f"Measured on {count(images, 'image')}, but no class has {FEWEST_BOXES} boxes there{self._to_come}."
        of = len(self.measured.classes) + len(self.measured.too_few)
        classes = f" and {len(self.measured.classes)} of {of} classes" if self.measured.too_few else ""
        return f"mAP {map_with_interval(self.measured)}, measured on {count(images, 'image')}{classes}."

    @property
    def _to_come(self) -> str:
        missing = self.images_wanted - (self.measured.images if self.measured is not None else 0)
        return f"; {missing} more come by themselves" if missing > 0 else ""

    @property
    def comparison_sentence(self) -> str:
        """Whether the detector is better than the one in force before; empty where there was none to compare with."""
        found = self.comparison
        if found is None or found.interval is None:
            return ""
        words = {"better": "Better", "worse": "Worse", "open": "Cannot tell whether it is better or worse"}
        told = f"{signed(found.map)} ({signed(found.interval[0])} to {signed(found.interval[1])})"
        text = f"{words[found.verdict]} than round {self.active}'s on the same images: {told} mAP."
        return f"{text} Round {self.active}'s stays in force." if self.stays else text


def map_text(value: float | None) -> str:
    """An mAP, an AP or a bound of one."""
    return "" if value is None else f"{value:.3f}"


def signed(value: float) -> str:
    """A difference of such values."""
    return f"{value:+.3f}".replace("-", "−")


def map_with_interval(measured: Measured) -> str:
    """An mAP and its interval of 95 %."""
    low, high = measured.interval or (0.0, 1.0)
    return f"{map_text(measured.map)} ({map_text(low)} to {map_text(high)})"


def percent(share: float) -> str:
    """A share in [0, 1], in whole percent."""
    return f"{100 * share:.0f} %"


def count(number: int, thing: str, things: str = "") -> str:
    """A number of things, in the singular for one."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def listed(values: Sequence[object], most: int = 5) -> str:
    """The first few of some values, with an ellipsis for the others."""
    return ", ".join(map(str, values[:most])) + (" …" if len(values) > most else "")


def _pair(value: Any) -> Interval | None:
    return None if value is None else (float(value[0]), float(value[1]))
