"""What the demo labels and what it tests on; the whole of it is run by `make demo`."""

import io

import pytest
from rich.console import Console

from ppal_backend.datasets.coco import CocoDataset
from ppal_backend.demo.run import DemoOptions, _data, show_picks
from ppal_backend.errors import DatasetError
from ppal_backend.synthetic.scenes import generate


def data(tmp_path, **options):
    return _data(DemoOptions(out=tmp_path, **options), tmp_path, Console(file=io.StringIO()))


def names(images):
    return {image.file_name for image in images}


def test_test_images_are_set_aside_with_their_groups(tmp_path):
    truth, test = data(tmp_path, images=80, test_images=25, budget=20)
    tested = CocoDataset.read(test)
    assert (len(truth.dataset.images), len(tested.images)) == (80, 25)
    assert names(truth.dataset.images).isdisjoint(names(tested.images))
    groups = {truth.groups[i] for i in truth.dataset.image_ids if i in truth.groups}
    assert groups and groups.isdisjoint(truth.groups.get(i) for i in tested.image_ids)
    assert tested.labels == truth.labels


def test_of_few_images_of_ones_own_none_are_set_aside(tmp_path):
    truth, test = data(tmp_path, coco=generate(tmp_path / "own", images=60), budget=10)
    assert len(truth.dataset.images) == 60 and test is None


def test_of_ones_own_images_a_fifth_is_set_aside_and_never_what_is_needed(tmp_path):
    own = generate(tmp_path / "own", images=130)
    truth, test = data(tmp_path, coco=own, budget=20)
    assert (len(truth.dataset.images), len(CocoDataset.read(test).images)) == (104, 26)
    truth, test = data(tmp_path, coco=own, budget=48)
    assert len(truth.dataset.images) == 106 and len(CocoDataset.read(test).images) == 24
    with pytest.raises(DatasetError, match="expected at least 138 images for the demo, got 130"):
        data(tmp_path, coco=own, budget=64)


def test_images_that_measure_the_detector_are_shown_among_the_first_picks():
    console = Console(record=True, width=120, file=io.StringIO())
    why = {"utility": 1.5, "utility_rank": 3, "classes": [{"boxes": 2, "class_index": 0}]}
    query = {"image_ids": [29, 7], "explanations": {"7": why}}
    show_picks(console, {"version": "ppal-r2", "map": None, "test_map": None}, query, ("fish",))
    text = console.export_text()
    assert "picked at random to measure the detector" in text and "2 unsure fish" in text
