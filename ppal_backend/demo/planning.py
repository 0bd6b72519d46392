"""What every image of a set shows: scene kinds, bursts and labels, before anything is placed or drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppal_backend.demo.families import SCENE_KINDS, GlyphFamily

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
