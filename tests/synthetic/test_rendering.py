"""Visible boxes against a slow reference that looks at one pixel at a time."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ppal_backend.synthetic.glyphs import GlyphSheet, glyph_family
from ppal_backend.synthetic.layout import Item, Layout, random_layout
from ppal_backend.synthetic.photographs import PHOTOGRAPHS, Backdrop, Photographs, random_backdrop
from ppal_backend.synthetic.rendering import MIN_VISIBLE, render

BACKDROP = Backdrop("moon.png", 0.5, (0.5, 0.5), False, (1.0, 1.0, 1.0), 1.0, 1.0, 0.0)


@pytest.fixture(scope="module")
def photographs():
    return Photographs.load()


@pytest.fixture(scope="module")
def squares():
    """A sheet of solid squares, so that visibility can be worked out by hand."""
    names = ("a", "b", "c")
    return GlyphSheet({name: Image.new("RGBA", (96, 96), (255, 0, 0, 255)) for name in names}, "")


def item(glyph="a", label="a", x=0.5, y=0.5, size=0.25, **more):
    fields = {"angle_deg": 0.0, "mirrored": False, "gains": (1.0, 1.0, 1.0), **more}
    return Item(glyph, label, x, y, size, **fields)


def draw(items, sheet, photographs, width=64, height=64):
    rng = np.random.default_rng(0)
    return render(Layout(BACKDROP, tuple(items), 0.0), width, height, sheet, photographs, rng)


def slow_boxes(items, width, height):
    """Boxes of axis-aligned solid squares, back to front, by walking over every pixel."""
    short = min(width, height)
    kept = list(items)
    while True:
        owner = {}
        areas = []
        for index, thing in enumerate(kept):
            side = round(thing.size * short)
            left, top = round(thing.x * short - side / 2), round(thing.y * short - side / 2)
            areas.append(side * side)
            for y in range(top, top + side):
                for x in range(left, left + side):
                    if 0 <= x < width and 0 <= y < height:
                        owner[x, y] = index
        shares = [sum(1 for who in owner.values() if who == i) / areas[i] for i in range(len(kept))]
        worst = min((i for i in range(len(kept)) if kept[i].label), key=lambda i: shares[i], default=None)
        if worst is None or shares[worst] >= MIN_VISIBLE:
            break
        del kept[worst]
    boxes = []
    for index, thing in enumerate(kept):
        if thing.label is not None:
            xs = [x for (x, _), who in owner.items() if who == index]
            ys = [y for (_, y), who in owner.items() if who == index]
            boxes.append((thing.label, (min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1)))
    return tuple(boxes)


def test_a_box_is_exactly_where_the_object_is(squares, photographs):
    drawn = draw([item(x=0.5, y=0.25, size=0.25)], squares, photographs)
    assert drawn.objects == (("a", (24, 8, 16, 16)),)
    red = (drawn.pixels[..., 0] == 255) & (drawn.pixels[..., 1] == 0)
    rows, columns = np.nonzero(red)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (24, 8, 39, 23)


def test_what_lies_in_front_shrinks_the_box_behind(squares, photographs):
    drawn = draw([item(x=0.5), item("b", "b", x=0.5 + 0.125)], squares, photographs)
    assert drawn.objects == (("a", (24, 24, 8, 16)), ("b", (32, 24, 16, 16)))


def test_clutter_hides_and_has_no_box(squares, photographs):
    drawn = draw([item(x=0.5), item("c", None, x=0.5 + 0.125)], squares, photographs)
    assert drawn.objects == (("a", (24, 24, 8, 16)),)


def test_a_hidden_object_is_left_out_of_truth_and_picture(squares, photographs):
    front = item("c", None, x=0.5 + 0.06)
    hidden = draw([item(x=0.5), front], squares, photographs)
    assert hidden.objects == ()
    assert np.array_equal(hidden.pixels, draw([front], squares, photographs).pixels)


def test_an_object_across_the_border_counts_what_is_outside_as_hidden(squares, photographs):
    assert draw([item(x=0.0)], squares, photographs).objects == (("a", (0, 24, 8, 16)),)
    assert draw([item(x=-0.05)], squares, photographs).objects == ()
    assert draw([item(x=-2.0)], squares, photographs).objects == ()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64), (64, 80)])
def test_boxes_of_random_piles_equal_the_slow_reference(squares, photographs, seed, width, height):
    rng = np.random.default_rng(seed)
    labels = ["a", "b", "c", None]
    items = [
        item("abc"[n % 3], labels[int(rng.integers(4))], float(rng.uniform(0, width / 64)),
             float(rng.uniform(0, height / 64)), float(rng.uniform(0.15, 0.5)))
        for n in range(8)
    ]  # fmt: skip
    assert draw(items, squares, photographs, width, height).objects == slow_boxes(items, width, height)


def test_a_faint_object_keeps_its_box(squares, photographs):
    assert draw([item(opacity=0.3)], squares, photographs).objects == (("a", (24, 24, 16, 16)),)


def test_camouflage_brings_an_object_closer_to_its_background(squares, photographs):
    bare = draw([], squares, photographs).pixels.astype(float)
    contrast = [
        np.abs(draw([item(opacity=0.9, camouflage=level)], squares, photographs).pixels - bare).sum()
        for level in (0.0, 0.4, 0.8)
    ]
    assert contrast[0] > 1.3 * contrast[1] > 1.3 * 1.3 * contrast[2] > 0


def test_a_turned_sprite_has_the_box_of_its_visible_pixels(photographs):
    sheet = GlyphSheet.load()
    drawn = draw([item("football", "football", size=0.6, angle_deg=30.0, gains=(9.0, 9.0, 9.0))], sheet, photographs)
    ((_, (x, y, w, h)),) = drawn.objects
    outside = drawn.pixels.copy()
    outside[y : y + h, x : x + w] = 0
    assert (drawn.pixels[y : y + h, x : x + w].min(axis=2) > 200).any(axis=0).sum() >= w - 2
    assert (outside.min(axis=2) > 200).sum() == 0


@pytest.mark.parametrize("name", sorted(PHOTOGRAPHS))
@pytest.mark.parametrize("centre", [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_every_view_of_every_photograph_is_valid(photographs, name, centre):
    view = photographs.render(replace(BACKDROP, photograph=name, crop=1.0, centre=centre), 96, 64)
    assert view.shape == (64, 96, 3) and np.isfinite(view).all() and view.max() <= 255 and view.min() >= 0


def test_backgrounds_vary():
    rng = np.random.default_rng(0)
    assert len({random_backdrop(rng).photograph for _ in range(200)}) == len(PHOTOGRAPHS)


@pytest.mark.parametrize("kind", ["easy", "busy", "rare", "empty"])
def test_a_layout_places_the_labels_it_was_given(kind):
    family = glyph_family("demo")
    labels = {"empty": (), "easy": ("dog", "car"), "busy": ("dog",) * 6, "rare": ("wolf", "dog")}[kind]
    for seed in range(20):
        layout = random_layout(kind, labels, family, (1.0, 1.0), np.random.default_rng(seed))
        placed = [thing.label for thing in layout.items if thing.label is not None]
        assert placed == list(labels)[: len(placed)] or set(placed) <= set(labels)
        assert len(placed) >= 0.6 * len(labels)
        assert all(0 < thing.x < 1 and 0 < thing.y < 1 for thing in layout.items)


def test_hidden_classes_get_something_in_front():
    family = glyph_family("second")
    behind = 0
    for seed in range(40):
        layout = random_layout("easy", ("owl",), family, (1.0, 1.0), np.random.default_rng(seed))
        position = next(i for i, thing in enumerate(layout.items) if thing.label == "owl")
        owl = layout.items[position]
        near = [o for o in layout.items[position + 1 :] if np.hypot(o.x - owl.x, o.y - owl.y) < 0.5 * owl.size]
        behind += bool(near)
    assert behind >= 24
