"""VOC folders, as published and with classes of their own."""

from pathlib import Path

import pytest

from ppal_backend.datasets.voc import LABELS, read_voc
from ppal_backend.errors import DatasetError
from tests.simulation.folders import SWAPPED, own_voc, voc_devkit


def test_voc_boxes_are_one_based_and_include_the_last_pixel(tmp_path):
    voc_devkit(tmp_path, trainval=3, test=2)
    data = read_voc(tmp_path, [("2007", "trainval"), ("2012", "trainval")])
    assert data.labels == LABELS and len(data.images) == 6
    first = data.images[0]
    assert first.file_name == str(tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000001.jpg")
    assert (first.width, first.height) == (96, 64)
    boxes = [(LABELS[r.category_id - 1], r.bbox_xywh, r.iscrowd) for r in data.annotations if r.image_id == first.id]
    assert boxes == [("dog", (0.0, 0.0, 40.0, 30.0), 0), ("person", (49.0, 9.0, 47.0, 55.0), 1)]


def test_names_with_spaces_and_dots_other_suffixes_and_class_lists_are_found(tmp_path):
    names = ["my photo", "cam.1", "plain"]
    found = read_voc(tmp_path, own_voc(tmp_path, names, listed=["my photo", "cam.1 -1", "plain  1"]), ("crab",))
    assert [Path(image.file_name).name for image in found.images] == [f"{name}.png" for name in names]


def test_swapped_corners_are_a_box(tmp_path):
    found = read_voc(tmp_path, own_voc(tmp_path, ["a"]), ("crab",))
    assert [row.bbox_xywh for row in found.annotations] == [(2.0, 1.0, 7.0, 7.0)]


def test_a_box_outside_the_picture_is_left_out_and_told_as_in_coco(tmp_path, caplog):
    """It was moved to the border, as a box of one pixel."""
    splits = own_voc(tmp_path, ["a", "b"])
    for name, corners in (("a", (31, 2, 39, 8)), ("b", (15, 2, 25, 8))):
        path = tmp_path / "VOC2024" / "Annotations" / f"{name}.xml"
        box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        path.write_text(path.read_text().replace(SWAPPED, f"<bndbox>{box}</bndbox>"))
    found = read_voc(tmp_path, splits, ("crab",))
    assert [(row.image_id, row.bbox_xywh) for row in found.annotations] == [(2, (14.0, 1.0, 6.0, 7.0))]
    assert "2 images, 1 boxes; dropped 0 degenerate, 0 crowd and 1 outside the image; clipped 1" in caplog.text


def test_the_size_in_voc_xml_is_held_against_the_picture(tmp_path):
    with pytest.raises(DatasetError, match="of 40 x 10 px as the file says, got a picture of 20 x 10"):
        read_voc(tmp_path, own_voc(tmp_path, ["a"], size=(40, 10)), ("crab",))


def test_a_folder_without_voc_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="expected VOC2007 or VOCdevkit/VOC2007"):
        read_voc(tmp_path, [("2007", "trainval")])


def test_entities_in_voc_xml_are_refused(tmp_path):
    voc_devkit(tmp_path, trainval=3, test=2)
    bomb = '<!DOCTYPE a [<!ENTITY x "y">]><annotation><size>&x;</size></annotation>'
    (tmp_path / "VOCdevkit" / "VOC2007" / "Annotations" / "000001.xml").write_text(bomb)
    with pytest.raises(DatasetError, match="expected VOC XML"):
        read_voc(tmp_path, [("2007", "trainval")])
