"""Boxes around polygons, ellipses and brush masks, against every pixel of the shape."""

import math
import random
from pathlib import Path

import numpy as np
import pytest

from ppal_backend.datasets.images import ImageInfo
from ppal_backend.datasets.label_studio_json import annotations_to_coco
from ppal_backend.label_studio.schema import parse_label_config
from ppal_backend.label_studio.shapes import hull_of
from ppal_backend.label_studio.source import annotations_problem

WIDTH, HEIGHT = 64, 48
SCHEMA = parse_label_config(
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="Cat"/>'
    '<Label value="Dog"/></RectangleLabels><BrushLabels name="mask" toName="image"><Label value="Cat"/></BrushLabels>'
    "</View>"
)
IMAGES = {1: ImageInfo(1, Path("1.jpg"), WIDTH, HEIGHT)}


def region(kind, label="Cat", **value):
    shape = {kind: [label], **value}
    return {"type": kind, "from_name": "mask", "to_name": "image", "original_width": WIDTH, "original_height": HEIGHT,
            "value": shape}  # fmt: skip


def encoded(mask):
    """The code of a mask as the editor writes it: a header, then runs of equal bytes (all four channels of a pixel)."""
    from label_studio_sdk.converter.brush import mask2rle

    return mask2rle((mask * 255).astype(np.uint8))


def ellipse(x, y, a, b, degrees=0.0):
    return region("ellipselabels", x=x / WIDTH * 100, y=y / HEIGHT * 100, radiusX=a / WIDTH * 100,
                  radiusY=b / HEIGHT * 100, rotation=degrees)  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_an_ellipse_touches_its_box_on_all_sides(seed):
    rng = random.Random(seed)
    x, y, a, b, degrees = 32, 24, rng.uniform(2, 15), rng.uniform(2, 15), rng.uniform(0, 360)
    turn = math.radians(degrees)
    rim = [
        (x + a * math.cos(t) * math.cos(turn) - b * math.sin(t) * math.sin(turn),
         y + a * math.cos(t) * math.sin(turn) + b * math.sin(t) * math.cos(turn))
        for t in np.linspace(0, 2 * math.pi, 20_000)
    ]  # fmt: skip
    xs, ys = zip(*rim, strict=True)
    assert hull_of(ellipse(x, y, a, b, degrees), WIDTH, HEIGHT) == pytest.approx(
        (min(xs), min(ys), max(xs), max(ys)), abs=1e-3
    )


def test_a_polygon():
    points = [[10, 50], [50, 25], [75, 100], [20, 90]]
    found = hull_of(region("polygonlabels", points=points), WIDTH, HEIGHT)
    assert found == pytest.approx((6.4, 12.0, 48.0, 48.0))


@pytest.mark.parametrize("seed", range(6))
def test_a_mask_by_its_outermost_pixels(seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for _ in range(3):
        x, y = rng.integers(0, WIDTH - 8), rng.integers(0, HEIGHT - 8)
        mask[y : y + rng.integers(1, 8), x : x + rng.integers(1, 8)] = True
    rows, columns = np.nonzero(mask)
    brush = region("brushlabels", format="rle", rle=encoded(mask))
    corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert hull_of(brush, WIDTH, HEIGHT) == tuple(map(float, corners))
    assert hull_of(brush, 2 * WIDTH, HEIGHT) == pytest.approx((2 * corners[0], corners[1], 2 * corners[2], corners[3]))


GOOD = encoded(np.ones((HEIGHT, WIDTH), bool))
BAD = {
    "no value": {"type": "polygonlabels", "value": None},
    "two points": region("polygonlabels", points=[[1, 1], [2, 2]]),
    "points of text": region("polygonlabels", points=[["a", 1], [2, 2], [3, 3]]),
    "points without end": region("polygonlabels", points=[[float("inf"), 1], [2, 2], [3, 3]]),
    "an ellipse without radius": region("ellipselabels", x=1, y=1, radiusX=2),
    "no code": region("brushlabels", format="rle"),
    "code of text": region("brushlabels", format="rle", rle=["a"] * 9),
    "another format": region("brushlabels", format="png", rle=GOOD),
    "code of another size": region("brushlabels", format="rle", rle=[255, 255, 255, 255, *GOOD[4:]]),
    "code that ends early": region("brushlabels", format="rle", rle=GOOD[:8]),
    "nothing painted": region("brushlabels", format="rle", rle=encoded(np.zeros((HEIGHT, WIDTH), bool))),
    "no size": {**region("brushlabels", format="rle", rle=GOOD), "original_width": None},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_what_is_no_shape_is_none(bad):
    assert hull_of(bad, WIDTH, HEIGHT) is None


def learned(regions, option):
    task = {"id": 1, "annotations": [{"id": 1, "completed_by": 2, "result": regions}]}
    dataset, report = annotations_to_coco([task], SCHEMA, IMAGES, hull_of if option else None)
    return [a.bbox_xywh for a in dataset.annotations], report


def test_shapes_are_learned_by_option_and_otherwise_counted_and_told():
    square = region("polygonlabels", points=[[25, 25], [50, 25], [50, 50], [25, 50]])
    elsewhere = {**square, "to_name": "other"}
    unknown = region("polygonlabels", "Zebra", points=square["value"]["points"])
    outside = region("polygonlabels", points=[[101, 25], [120, 25], [120, 50]])
    regions = [square, ellipse(32, 24, 8, 6), elsewhere, unknown, outside, region("polygonlabels", points=[])]
    boxes, report = learned(regions, option=True)
    assert boxes == [pytest.approx((16, 12, 16, 12)), pytest.approx((24, 18, 16, 12))]
    assert report.hulls == {"polygonlabels": 1, "ellipselabels": 1} and report.other_regions == {"polygonlabels": 1}
    assert (report.unknown_labels, report.malformed, report.rotated) == ({"Zebra": 1}, 1, 0)
    assert (report.degenerate, report.clipped) == (1, 0)
    boxes, report = learned(regions, option=False)
    assert boxes == [] and report.hulls == {}
    assert report.other_regions == {"polygonlabels": 5, "ellipselabels": 1}
    assert "other_shapes learns the boxes around them" in annotations_problem(report)
