"""What every image of a set shows and where it lies: scene kinds, bursts and labels, then a layout. No pixels.

Lengths are in units of the image's short side; x and y are centres; the origin is the top left corner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ppal_backend.synthetic.glyphs import SCENE_KINDS, GlyphFamily
from ppal_backend.synthetic.photographs import Backdrop, random_backdrop

OBJECTS = {"empty": (0, 0), "easy": (1, 3), "busy": (5, 9), "rare": (1, 3)}
"""Smallest and largest number of objects by scene kind."""
_MENU = {"easy": 3, "busy": 4, "rare": 3}


@dataclass(frozen=True)
class ScenePlan:
    """One image: ``frame`` of ``frames`` of its group, a scene that shows ``labels``."""

    group: int
    scene: str
    labels: tuple[str, ...]
    frame: int
    frames: int


def plan_scenes(
    images: int, family: GlyphFamily, burst_share: float, burst_frames: tuple[int, int], rng: np.random.Generator
) -> list[ScenePlan]:
    """Plan a set: exact shares of scene kinds, class counts near the family's weights, shuffled.

    Args:
        images: Number of images.
        family: Its scene shares, weights and look-alikes are used.
        burst_share: Share of the images of each kind that come in bursts, in [0, 1].
        burst_frames: Smallest and largest burst.
        rng: The set's generator.

    Returns:
        One plan per image, in file order.
    """
    groups: list[tuple[str, int, int]] = []
    kinds = [kind for kind in SCENE_KINDS if kind in family.scene_shares]
    for kind, count in zip(kinds, apportion(images, [family.scene_shares[kind] for kind in kinds]), strict=True):
        for frames in _burst_lengths(count, burst_share, burst_frames, rng):
            smallest, largest = OBJECTS[kind]
            groups.append((kind, frames, int(rng.integers(smallest, largest + 1))))
    labels = _assign_labels(groups, family, rng)
    plans = [
        ScenePlan(number, kind, labels[number - 1], frame, frames)
        for number, (kind, frames, _) in enumerate(groups, start=1)
        for frame in range(frames)
    ]
    return [plans[index] for index in rng.permutation(len(plans))]


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of ``shares`` that add up to ``total`` (largest remainder)."""
    exact = np.asarray(shares) * total
    counts = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return [int(count) for count in counts]


def _burst_lengths(count: int, share: float, frames: tuple[int, int], rng: np.random.Generator) -> list[int]:
    """Group sizes that add up to ``count``: bursts for about ``share`` of it, the rest single images."""
    left = round(count * share)
    lengths: list[int] = []
    while left >= frames[0]:
        length = int(rng.integers(frames[0], min(frames[1], left) + 1))
        lengths.append(length)
        left -= length
    return lengths + [1] * (count - sum(lengths))


def _assign_labels(
    groups: Sequence[tuple[str, int, int]], family: GlyphFamily, rng: np.random.Generator
) -> list[tuple[str, ...]]:
    """Labels of every group. Classes are drawn by what is left of their share of all objects, the long bursts and the
    rare scenes first, so that even a small set has the family's long tail. A burst is charged at most two thirds of
    what a class has left: no class shows up in one burst only."""
    weights = np.array([spec.weight for spec in family.classes])
    total = sum(frames * objects for _, frames, objects in groups)
    left = dict(zip(family.labels, (float(value) for value in total * weights / weights.sum()), strict=True))
    rare = tuple(spec.label for spec in family.rare)
    labels: list[tuple[str, ...]] = [()] * len(groups)
    order = sorted(range(len(groups)), key=lambda index: (-groups[index][1], groups[index][0] != "rare", index))
    for index in order:
        kind, frames, objects = groups[index]
        if objects == 0:
            continue
        chosen: list[str] = []
        if kind == "rare" and rare:
            chosen = _rare_start(rare, left, frames, objects, family, rng)
        cost = _keep(frames) * frames * objects / _MENU[kind]
        menu = [_draw(family.labels, left, cost, rng) for _ in range(_MENU[kind])]
        while len(chosen) < objects:
            chosen.append(menu[int(rng.integers(len(menu)))])
        for label, count in Counter(chosen).items():
            used = float(count * frames)
            left[label] -= used if frames == 1 else min(used, 2.0 * max(0.0, left[label]) / 3.0)
        labels[index] = tuple(chosen)
    return labels


def _rare_start(
    rare: tuple[str, ...],
    left: dict[str, float],
    frames: int,
    objects: int,
    family: GlyphFamily,
    rng: np.random.Generator,
) -> list[str]:
    """A rare class, sometimes twice, sometimes beside the class it is mistaken for."""
    focus = _draw(rare, left, _keep(frames) * frames, rng)
    chosen = [focus]
    if frames == 1 and rng.random() < 0.4:
        chosen.append(focus)
    partner = family.spec(focus).looks_like
    if partner is not None and rng.random() < 0.4:
        chosen.append(partner)
    return chosen[:objects]


def _keep(frames: int) -> int:
    """How many times its cost a class must have left; bursts go to classes that can spare them."""
    return 3 if frames > 1 else 1


def _draw(labels: Sequence[str], left: dict[str, float], cost: float, rng: np.random.Generator) -> str:
    """A label, drawn in proportion to what it has left after ``cost``; the richest one when none can afford it."""
    room = np.array([max(0.0, left[label] - cost) for label in labels])
    if room.sum() <= 0:
        return max(labels, key=lambda label: left[label])
    return labels[int(rng.choice(len(labels), p=room / room.sum()))]


SHAPES = ("@ellipse", "@bar", "@triangle")
"""Plain shapes that serve as clutter beside the clutter sprites."""


@dataclass(frozen=True)
class Item:
    """One thing in a scene; ``label`` is None for clutter."""

    glyph: str
    label: str | None
    x: float
    y: float
    size: float
    angle_deg: float
    mirrored: bool
    gains: tuple[float, float, float]
    opacity: float = 1.0
    camouflage: float = 0.0


@dataclass(frozen=True)
class Layout:
    """A backdrop and the items on it, from back to front."""

    backdrop: Backdrop
    items: tuple[Item, ...]
    noise: float = 0.0


@dataclass(frozen=True)
class _Mix:
    """How a kind of scene is filled: object size (short sides), number of clutter items, how close objects come."""

    size: tuple[float, float]
    clutter: tuple[int, int]
    spacing: float


_MIXES = {
    "empty": _Mix((0.2, 0.4), (0, 6), 0.9),
    "easy": _Mix((0.24, 0.46), (0, 2), 0.85),
    "busy": _Mix((0.15, 0.30), (2, 6), 0.62),
    "rare": _Mix((0.19, 0.40), (0, 3), 0.80),
}


def random_layout(
    kind: str, labels: Sequence[str], family: GlyphFamily, extent: tuple[float, float], rng: np.random.Generator
) -> Layout:
    """Place a scene.

    Args:
        kind: One of ``SCENE_KINDS``.
        labels: Labels of its objects; one for which there is no room is left out.
        family: Classes and clutter to draw from.
        extent: Width and height of the image in short sides.
        rng: The scene's own generator.

    Returns:
        The layout; without labels it has clutter only.
    """
    mix = _MIXES[kind]
    placed: list[Item] = []
    front: list[Item] = []
    for label in labels:
        spec = family.spec(label)
        size = float(rng.uniform(*mix.size) * rng.uniform(*spec.scale))
        spot = _free_spot(placed, size, mix.spacing, extent, rng)
        if spot is None:
            continue
        item = _item(spec.label, spec.label, spot, size, rng)
        item = replace(item, opacity=float(rng.uniform(*spec.opacity)), camouflage=float(rng.uniform(*spec.camouflage)))
        placed.append(item)
        if rng.random() < spec.occluded:
            front.append(_occluder(item, family, rng))
    behind: list[Item] = []
    for _ in range(int(rng.integers(mix.clutter[0], mix.clutter[1] + 1))):
        clutter = _clutter(family, extent, rng)
        (front if rng.random() < 0.2 else behind).append(clutter)
    noise = float(rng.uniform(1.5, 6.0))
    return Layout(random_backdrop(rng), tuple(behind + placed + front), noise)


def moved(layout: Layout, progress: float, heading_deg: float, rng: np.random.Generator) -> Layout:
    """The same scene a moment later: a near-duplicate.

    The camera pans along ``heading_deg`` by ``progress`` (0..1) times a tenth of the short side; every item wobbles
    a little, and the light flickers.
    """
    pan = 0.10 * progress
    shift_x, shift_y = pan * np.cos(np.radians(heading_deg)), pan * np.sin(np.radians(heading_deg))
    light = float(rng.normal(1.0, 0.03))
    items = tuple(
        replace(
            item,
            x=float(item.x + shift_x + rng.normal(0.0, 0.008)),
            y=float(item.y + shift_y + rng.normal(0.0, 0.008)),
            size=float(item.size * (1.0 + rng.normal(0.0, 0.02))),
            angle_deg=float(item.angle_deg + rng.normal(0.0, 2.0)),
        )
        for item in layout.items
    )
    back = layout.backdrop
    centre = (_inside(back.centre[0] - 0.5 * shift_x), _inside(back.centre[1] - 0.5 * shift_y))
    backdrop = replace(back, centre=centre, brightness=back.brightness * light)
    return Layout(backdrop, items, layout.noise)


def _inside(share: float) -> float:
    return float(min(1.0, max(0.0, share)))


def _free_spot(
    placed: Sequence[Item], size: float, spacing: float, extent: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float] | None:
    """A centre at least ``spacing`` times the mean size away from every placed item, or None after 40 tries."""
    margin = 0.42 * size
    for _ in range(40):
        x = float(rng.uniform(margin, extent[0] - margin))
        y = float(rng.uniform(margin, extent[1] - margin))
        if all(np.hypot(x - item.x, y - item.y) >= spacing * 0.5 * (size + item.size) for item in placed):
            return x, y
    return None


def _item(glyph: str, label: str | None, spot: tuple[float, float], size: float, rng: np.random.Generator) -> Item:
    light = rng.uniform(0.78, 1.12)
    gains = np.clip(light * rng.normal(1.0, 0.05, size=3), 0.6, 1.3)
    return Item(
        glyph=glyph,
        label=label,
        x=spot[0],
        y=spot[1],
        size=size,
        angle_deg=float(np.clip(rng.normal(0.0, 9.0), -25.0, 25.0)),
        mirrored=bool(rng.random() < 0.5),
        gains=(float(gains[0]), float(gains[1]), float(gains[2])),
    )


def _clutter(family: GlyphFamily, extent: tuple[float, float], rng: np.random.Generator) -> Item:
    spot = (float(rng.uniform(0.0, extent[0])), float(rng.uniform(0.0, extent[1])))
    size = float(rng.uniform(0.10, 0.30))
    if rng.random() < 0.3:
        return _shape(spot, size, rng)
    glyph = family.clutter[int(rng.integers(len(family.clutter)))]
    return replace(_item(glyph, None, spot, size, rng), angle_deg=float(rng.uniform(-180.0, 180.0)))


def _shape(spot: tuple[float, float], size: float, rng: np.random.Generator) -> Item:
    item = _item(SHAPES[int(rng.integers(len(SHAPES)))], None, spot, size, rng)
    colour = rng.uniform(0.15, 0.9, size=3)
    return replace(
        item,
        gains=(float(colour[0]), float(colour[1]), float(colour[2])),
        opacity=float(rng.uniform(0.5, 1.0)),
        angle_deg=float(rng.uniform(-180.0, 180.0)),
    )


def _occluder(item: Item, family: GlyphFamily, rng: np.random.Generator) -> Item:
    """Something that hides roughly a third to a half of the item, from a random side."""
    direction = float(rng.uniform(0.0, 2.0 * np.pi))
    reach = 0.36 * item.size
    spot = (float(item.x + reach * np.cos(direction)), float(item.y + reach * np.sin(direction)))
    size = float(item.size * rng.uniform(0.75, 0.95))
    if rng.random() < 0.5:
        return replace(_shape(spot, size, rng), glyph="@ellipse", opacity=1.0)
    solid = [name for name in family.clutter if name in ("rock", "wood", "sponge", "cloud", "broccoli")]
    glyph = solid[int(rng.integers(len(solid)))] if solid else "@ellipse"
    return _item(glyph, None, spot, size, rng)
