"""COCO files: round trip, and a clear word for each kind of damage."""

from __future__ import annotations

import json

import pytest

from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.errors import DatasetError


def dataset() -> CocoDataset:
    return CocoDataset(
        images=(CocoImage(5, "/a/5.jpg", 100, 50), CocoImage(2, "/a/2.jpg", 10, 10), CocoImage(9, "/a/9.jpg", 8, 8)),
        annotations=(
            CocoAnnotation(1, 5, 30, (1.5, 2, 10, 20)),
            CocoAnnotation(2, 5, 4, (0, 0, 5, 5)),
            CocoAnnotation(3, 2, 30, (0, 0, 3, 3)),
            CocoAnnotation(4, 2, 30, (0, 0, 9, 9), iscrowd=1),
        ),
        categories=(CocoCategory(30, "dog"), CocoCategory(4, "cat"), CocoCategory(7, "eel")),
    )


def test_round_trip_through_a_file(tmp_path):
    path = dataset().write(tmp_path / "sub" / "x.json")
    assert CocoDataset.read(path) == dataset()
    assert json.loads(path.read_text())["annotations"][0] == {
        "id": 1,
        "image_id": 5,
        "category_id": 30,
        "bbox": [1.5, 2, 10, 20],
        "area": 200.0,
        "iscrowd": 0,
    }
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_counts_and_labels_are_by_class_index_and_leave_crowds_out():
    assert dataset().labels == ("cat", "eel", "dog")
    assert dataset().class_counts() == (1, 0, 2)


def test_subset_keeps_order_negatives_and_categories():
    part = dataset().subset([9, 5])
    assert part.image_ids == (5, 9)
    assert [row.id for row in part.annotations] == [1, 2]
    assert part.categories == dataset().categories
    with pytest.raises(DatasetError, match=r"\[77\]"):
        dataset().subset([77])


def test_relative_names_are_taken_from_the_files_folder_or_the_root_given(tmp_path):
    raw = dataset().as_dict() | {"images": [{"id": 5, "file_name": "im/5.jpg", "width": 100, "height": 50}]}
    raw["annotations"] = raw["annotations"][:2]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(raw))
    assert CocoDataset.read(path).images[0].file_name == str(tmp_path / "im/5.jpg")
    assert CocoDataset.read(path, image_root=tmp_path / "r").images[0].file_name == str(tmp_path / "r/im/5.jpg")


def test_boxes_without_area_are_dropped_and_told(tmp_path, caplog):
    raw = dataset().as_dict()
    raw["annotations"][1]["bbox"] = [0, 0, 0, 5]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(raw))
    assert [row.id for row in CocoDataset.read(path).annotations] == [1, 3, 4]
    assert "dropped 1 boxes" in caplog.text


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda raw: raw.pop("images"), "a list 'images'"),
        (lambda raw: raw["images"].append(raw["images"][0]), "images once, got 5"),
        (lambda raw: raw["images"][1].update(width=0), "image 2 with a size"),
        (lambda raw: raw["images"][1].update(height=float("inf")), r"images\[1\].height"),
        (lambda raw: raw["images"][1].pop("file_name"), r"images\[1\].file_name"),
        (lambda raw: raw["images"].__setitem__(0, 3), r"images\[0\] to be an object"),
        (lambda raw: raw["annotations"][0].update(image_id=8), "image_id 8"),
        (lambda raw: raw["annotations"][0].update(category_id=8), "category_id 8"),
        (lambda raw: raw["annotations"][2].update(bbox=[1, 2, 3]), r"annotations\[2\].bbox"),
        (lambda raw: raw["annotations"][2].update(bbox=[1, "2", 3, 4]), r"annotations\[2\].bbox"),
        (lambda raw: raw["annotations"][2].update(bbox=[float("nan"), 2, 3, 4]), "finite box"),
        (lambda raw: raw["annotations"][2].update(id=True), r"annotations\[2\].id"),
        (lambda raw: raw.update(categories=[]), "category"),
        (lambda raw: raw["categories"][1].update(name="dog"), "distinct labels"),
    ],
)
def test_damage_is_named(tmp_path, damage, text):
    raw = dataset().as_dict()
    raw = json.loads(json.dumps(raw))
    damage(raw)
    path = tmp_path / "train.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(DatasetError, match=text) as caught:
        CocoDataset.read(path)
    assert "train.json" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"), [(None, "got none"), (b'{"images"', "broken"), (b"[]", "object"), (b"\xff", "broken")]
)
def test_no_file_or_no_json(tmp_path, content, text):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=text):
        CocoDataset.read(path)
