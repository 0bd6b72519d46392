"""Exports read back by code of their own: boxes, classes, names, and what a failed export leaves."""

import json
from dataclasses import replace
from xml.etree.ElementTree import parse

import pytest
import yaml

from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.datasets.exporting import BoxExport, file_names, write_export
from ppal_backend.errors import DatasetError, ImageError

LABELS = ("car", 'bus: "red"', "🐈")


def dataset_of(folder):
    for name in ("a.png", "b.jpg"):
        (folder / name).write_bytes(name.encode())
    images = (CocoImage(7, str(folder / "a.png"), 200, 100), CocoImage(9, str(folder / "b.jpg"), 50, 40))
    boxes = (
        CocoAnnotation(1, 7, 1, (20.0, 10.0, 100.0, 50.0)),
        CocoAnnotation(2, 7, 3, (0.0, 0.0, 200.0, 100.0)),
        CocoAnnotation(3, 7, 2, (199.4, 99.4, 0.5, 0.5)),
    )
    return CocoDataset(images, boxes, tuple(CocoCategory(i, name) for i, name in enumerate(LABELS, start=1)))


@pytest.fixture
def export(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    return BoxExport(dataset_of(source), {7: "first.png", 9: "second.jpg"})


def test_coco_holds_names_boxes_and_classes(export, tmp_path):
    write_export(export, "coco", tmp_path / "out")
    read = json.loads((tmp_path / "out" / "annotations.json").read_text(encoding="utf-8"))
    assert {image["id"]: (image["file_name"], image["width"], image["height"]) for image in read["images"]} == {
        7: ("first.png", 200, 100),
        9: ("second.jpg", 50, 40),
    }
    names = {category["id"]: category["name"] for category in read["categories"]}
    assert [(names[a["category_id"]], a["bbox"], a["area"]) for a in read["annotations"][:2]] == [
        ("car", [20, 10, 100, 50], 5000),
        ("🐈", [0, 0, 200, 100], 20000),
    ]
    assert "score" not in read["annotations"][0] and str(tmp_path) not in json.dumps(read)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["annotations.json"]


def test_coco_tells_the_scores_of_predictions(export, tmp_path):
    write_export(replace(export, scores={1: 0.9, 2: 0.5, 3: 0.25}), "coco", tmp_path / "out")
    read = json.loads((tmp_path / "out" / "annotations.json").read_text(encoding="utf-8"))
    assert [a["score"] for a in read["annotations"]] == [0.9, 0.5, 0.25]


def test_yolo_boxes_turn_back_into_the_same_pixels(export, tmp_path):
    write_export(export, "yolo", tmp_path / "out")
    data = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text(encoding="utf-8"))
    assert data["names"] == dict(enumerate(LABELS)) and data["train"] == data["val"] == "images"
    assert "path" not in data, (
        "ultralytics takes a relative one from its working directory, none from the file's folder"
    )
    rows = [line.split() for line in (tmp_path / "out" / "labels" / "first.txt").read_text().splitlines()]
    assert [row[0] for row in rows] == ["0", "2", "1"]
    cx, cy, w, h = (float(v) for v in rows[0][1:])
    corners = ((cx - w / 2) * 200, (cy - h / 2) * 100, (cx + w / 2) * 200, (cy + h / 2) * 100)
    assert corners == pytest.approx((20, 10, 120, 60), abs=1e-3)
    assert (tmp_path / "out" / "labels" / "second.txt").read_text() == "", "an image without boxes has an empty file"


def test_voc_counts_pixels_from_one(export, tmp_path):
    write_export(export, "voc", tmp_path / "out")
    root = parse(tmp_path / "out" / "Annotations" / "first.xml").getroot()
    assert root.findtext("filename") == "first.png"
    assert (root.findtext("size/width"), root.findtext("size/height")) == ("200", "100")
    read = {
        item.findtext("name"): tuple(int(item.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
        for item in root.iter("object")
    }
    assert read["car"] == (21, 11, 120, 60), "columns 20 to 119 from 0 are 21 to 120 from 1"
    assert read["🐈"] == (1, 1, 200, 100)
    assert read['bus: "red"'] == (200, 100, 200, 100), "less than a pixel stays within the image"
    assert parse(tmp_path / "out" / "Annotations" / "second.xml").getroot().find("object") is None
    assert (tmp_path / "out" / "ImageSets" / "Main" / "all.txt").read_text().split() == ["first", "second"]


@pytest.mark.parametrize(("layout", "where"), [("coco", "images"), ("yolo", "images"), ("voc", "JPEGImages")])
def test_images_are_copied_under_their_new_names(export, tmp_path, layout, where):
    (tmp_path / "out").mkdir()
    write_export(export, layout, tmp_path / "out", with_images=True)
    copied = {path.name: path.read_bytes() for path in (tmp_path / "out" / where).iterdir()}
    assert copied == {"first.png": b"a.png", "second.jpg": b"b.jpg"}


def test_a_missing_image_leaves_nothing_half_written(export, tmp_path):
    (tmp_path / "source" / "b.jpg").unlink()
    with pytest.raises(ImageError, match="task 9: expected its image"):
        write_export(export, "coco", tmp_path / "out", with_images=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_with_files_is_left_alone(export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for folder in (tmp_path / "out", tmp_path / "out" / "mine.txt"):
        with pytest.raises(DatasetError, match="expected a new or an empty folder"):
            write_export(export, "coco", folder)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(DatasetError, match="expected a format of coco, yolo, voc, got 'csv'"):
        write_export(export, "csv", tmp_path / "other")


def test_names_follow_the_addresses(tmp_path):
    urls = {7: "/data/local-files/?d=shop/cam%201.jpeg", 9: "https://cdn.example.com/a/..%2f..%2fetc%2fpasswd.jpg?x=1"}
    assert file_names(dataset_of(tmp_path), urls) == {7: "cam_1.png", 9: "passwd.jpg"}
    urls = {7: "/data/upload/1/0a1b2c3d-dog%20%C3%A4.jpg", 9: "https://cdn.example.com/0a1b2c3d-cat.jpg"}
    assert file_names(dataset_of(tmp_path), urls) == {7: "dog_ä.png", 9: "0a1b2c3d-cat.jpg"}
    urls = {7: "/label-studio/data/local-files/?d=shop/one.png", 9: "https://h/ls/data/upload/1/0a1b2c3d-two.jpg"}
    assert file_names(dataset_of(tmp_path), urls) == {7: "one.png", 9: "two.jpg"}


def test_long_names_are_cut_by_bytes(export, tmp_path):
    """83 Chinese characters are 249 bytes: with an id and a suffix more than a file system takes."""
    urls = {7: f"/data/upload/1/{'图' * 83}.jpg", 9: f"/data/upload/1/{'图' * 83}.png"}
    names = file_names(dataset_of(tmp_path), urls)
    assert all(len(name.encode()) < 200 and "图" * 30 in name for name in names.values())
    write_export(replace(export, names=names), "voc", tmp_path / "out", with_images=True)
    assert len(list((tmp_path / "out" / "Annotations").iterdir())) == 2


@pytest.mark.parametrize("urls", [{7: "/data/upload/1/x.jpg", 9: "/data/upload/1/X.png"}, {}, {7: "/..", 9: None}])
def test_names_never_meet(tmp_path, urls):
    names = file_names(dataset_of(tmp_path), urls)
    assert len({name.casefold().rsplit(".", 1)[0] for name in names.values()}) == 2
    assert all(name.startswith(f"{image_id}-") and "/" not in name for image_id, name in names.items())
