"""COCO files: round trip, and a clear word for each kind of damage."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.datasets.ground_truth import read_user_coco, shown_size
from ppal_backend.errors import DatasetError
from tests.datasets.test_images import TURNED_BY_BROWSERS, oriented


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


def test_what_is_changed_in_the_json_form_does_not_change_the_data_set():
    data = dataset()
    data.as_dict()["images"][0]["file_name"] = "elsewhere"
    data.as_dict()["categories"][0]["name"] = "another"
    assert data == dataset()


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


def picture(path, size, orientation=None):
    """A picture of ``size`` px as stored, which EXIF may turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image, exif = Image.new("RGB", size), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(path, exif=exif)


def user_file(folder, pictures, boxes=(), name="result.json", **more):
    """A COCO file; ``pictures`` are (file name, width, height), ``boxes`` (position of the image, box)."""
    content = {
        "images": [{"id": i, "file_name": n, "width": w, "height": h} for i, (n, w, h) in enumerate(pictures, start=1)],
        "annotations": [
            {"id": i, "image_id": n, "category_id": 0, "bbox": b} for i, (n, b) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 0, "name": "cat"}],
    }
    (folder / name).write_text(json.dumps({**content, **more}))
    return folder / name


@pytest.mark.parametrize("named", ["images/a.png", "images\\a.png", "a.png", "./images/a.png"])
def test_images_are_found_as_other_tools_name_them(tmp_path, named):
    """Label Studio writes result.json beside images/ with names that repeat the folder."""
    picture(tmp_path / "images" / "a.png", (40, 30))
    path = user_file(tmp_path, [(named, 40, 30)])
    for where in (path, tmp_path):
        (image,) = read_user_coco(where).dataset.images
        assert Path(image.file_name).resolve() == (tmp_path / "images" / "a.png").resolve()
    assert len(read_user_coco(path, tmp_path / "images").dataset.images) == 1


def test_a_folder_of_pictures_in_sub_folders_is_not_mistaken(tmp_path):
    for name in ("images/images/a.png", "images/a.png"):
        picture(tmp_path / name, (40, 30))
    path = user_file(tmp_path, [("images/a.png", 40, 30), ("a.png", 40, 30)])
    found = [image.file_name for image in read_user_coco(path).dataset.images]
    assert [str(Path(f).relative_to(tmp_path)) for f in found] == ["images/images/a.png", "images/a.png"]


@pytest.mark.parametrize(
    "named",
    [
        "../../media/upload/1/942a5a02-a.png",
        "..\\..\\label-studio\\media\\upload\\4\\942a5a02-a.png",
        "images\\1/942a5a02-a.png",
        "/label-studio/data/media/upload/4/942a5a02-a.png",
    ],
)
def test_label_studios_own_names_of_uploads_are_found_beside_its_export(tmp_path, named):
    """Its COCO export puts uploads into images/ and names them as they lie on the server (1.16 to 1.23)."""
    picture(tmp_path / "images" / "942a5a02-a.png", (40, 30))
    path = user_file(tmp_path, [(named, 40, 30)])
    for images in (None, tmp_path / "images"):
        (image,) = read_user_coco(path, images).dataset.images
        assert Path(image.file_name).resolve() == (tmp_path / "images" / "942a5a02-a.png").resolve()


def test_two_pictures_of_one_name_are_never_taken_for_each_other(tmp_path):
    picture(tmp_path / "images" / "a.png", (40, 30))
    path = user_file(tmp_path, [("../1/a.png", 40, 30), ("../2/a.png", 40, 30)])
    with pytest.raises(DatasetError, match=r"2 missing, such as .*1/a\.png"):
        read_user_coco(path)


def test_label_studios_own_export_of_a_turned_photo_keeps_its_box(tmp_path):
    """It names the sides of the stored picture with boxes of the shown one: [4, 36, 20, 21] became [4, 36, 20, 4]."""
    picture(tmp_path / "images" / "a.jpg", (60, 40), orientation=6)
    found = read_user_coco(user_file(tmp_path, [("a.jpg", 60, 40)], [(1, [4, 36, 20, 21])]))
    assert (found.dataset.images[0].width, found.dataset.images[0].height) == (40, 60)
    assert found.dataset.annotations[0].bbox_xywh == (4, 36, 20, 21)
    assert (found.report.turned, found.report.clipped, found.report.dropped) == (1, 0, 0)
    assert "the sides of 1 images were exchanged" in str(found.report)


@pytest.mark.parametrize(("orientation", "wanted"), [(6, (4, 36, 5, 20)), (8, (31, 4, 5, 20)), (5, (31, 36, 5, 20))])
def test_boxes_of_the_stored_picture_are_turned_with_it(tmp_path, orientation, wanted):
    picture(tmp_path / "images" / "a.jpg", (60, 40), orientation)
    boxes = [(1, [36, 31, 20, 5]), (1, [50, 1, 9, 9])]  # the second lies within 60 x 40 only
    found = read_user_coco(user_file(tmp_path, [("a.jpg", 60, 40)], boxes)).dataset
    assert (found.images[0].width, found.images[0].height) == (40, 60)
    reference = np.zeros((40, 60, 3), np.uint8)
    reference[31:36, 36:56] = 255
    stored = Image.fromarray(reference)
    stored.getexif()[0x0112] = orientation
    shown = np.asarray(ImageOps.exif_transpose(stored))[:, :, 0]
    ys, xs = np.nonzero(shown)
    assert (xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()) == wanted
    assert found.annotations[0].bbox_xywh == wanted


@pytest.mark.parametrize("place", [name for name in oriented(Image.new("RGB", (60, 40))) if name != "WebP EXIF"])
def test_a_picture_has_the_size_that_a_browser_shows(tmp_path, place):
    path = tmp_path / "a"
    path.write_bytes(oriented(Image.new("RGB", (60, 40)))[place])
    assert shown_size(path) == ((40, 60, 6) if place in TURNED_BY_BROWSERS else (60, 40, 1))


def test_a_turned_tiff_has_the_size_of_its_pixels(tmp_path):
    picture(tmp_path / "a.tiff", (60, 40), orientation=6)
    assert shown_size(tmp_path / "a.tiff") == (40, 60, 1)
    assert cv2.imdecode(np.fromfile(tmp_path / "a.tiff", np.uint8), cv2.IMREAD_COLOR).shape == (60, 40, 3)


def test_a_picture_that_browsers_and_detectors_turn_differently_is_refused_by_name(tmp_path):
    picture(tmp_path / "images" / "a.webp", (60, 40), orientation=6)
    picture(tmp_path / "images" / "b.webp", (60, 40), orientation=1)
    path = user_file(tmp_path, [("a.webp", 60, 40), ("b.webp", 60, 40)])
    with pytest.raises(DatasetError, match=r"got 1 files .*WebP .* \(save these upright\), such as .*/a\.webp'\];"):
        read_user_coco(path)


def test_another_size_than_the_pictures_is_refused_by_name(tmp_path):
    picture(tmp_path / "images" / "a.png", (40, 30))
    with pytest.raises(
        DatasetError, match=r"image 1 \(a.png\) of 80 x 60 px as the file says, got a picture of 40 x 30"
    ):
        read_user_coco(user_file(tmp_path, [("a.png", 80, 60)]))
    picture(tmp_path / "images" / "b.jpg", (60, 40), orientation=6)
    both = [(1, [50, 1, 9, 9]), (1, [1, 50, 9, 9])]
    with pytest.raises(DatasetError, match="some that fit only as shown and some only as stored"):
        read_user_coco(user_file(tmp_path, [("b.jpg", 60, 40)], both))


def test_ids_are_whole_numbers_also_as_text_and_annotations_may_have_none(tmp_path):
    """`demo` said "expected a listed image_id, got 1" although 1 was listed."""
    picture(tmp_path / "images" / "a.png", (40, 30))
    row = {"image_id": "7", "category_id": "3", "bbox": [1, 1, 5, 5]}
    image = {"id": "7", "file_name": "a.png", "width": 40.0, "height": 30}
    path = user_file(tmp_path, [], images=[image], annotations=[row, row], categories=[{"id": 3.0, "name": "cat"}])
    found = read_user_coco(path).dataset
    assert (found.image_ids, [row.id for row in found.annotations]) == ((7,), [1, 2])
    assert found.annotations[0].category_id == found.categories[0].id == 3
    path.write_text(path.read_text().replace('"id": "7"', '"id": "a-7"'))
    with pytest.raises(DatasetError, match=r"images\[0\].id to be a whole number, got 'a-7'; number images"):
        read_user_coco(path)


def test_an_id_that_no_array_holds_is_refused(tmp_path):
    """The detections of image 2 ** 63 ended a simulation with a traceback, after its first training."""
    picture(tmp_path / "images" / "a.png", (40, 30))
    for number in (2**63, -(2**63) - 1):
        image = {"id": number, "file_name": "a.png", "width": 40, "height": 30}
        with pytest.raises(DatasetError, match=r"images\[0\].id to be a whole number of at most 63 bits, got -?9223"):
            read_user_coco(user_file(tmp_path, [], images=[image]))
    image["id"] = 2**63 - 1
    assert read_user_coco(user_file(tmp_path, [], images=[image])).dataset.image_ids == (2**63 - 1,)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    picture(tmp_path / "images" / "a.png", (40, 30))
    path = user_file(tmp_path, [("a.png", 40, 30)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_user_coco(path).dataset.image_ids == (1,)


@pytest.mark.parametrize(("on_disk", "in_file"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_are_found_whichever_way_a_name_spells_them(tmp_path, on_disk, in_file):
    """Archives made on macOS hold "é" as two characters: the error named files that seemed to be there."""
    picture(tmp_path / "images" / unicodedata.normalize(on_disk, "café.png"), (40, 30))
    found = read_user_coco(user_file(tmp_path, [(unicodedata.normalize(in_file, "café.png"), 40, 30)]))
    assert Path(found.dataset.images[0].file_name).is_file()


@pytest.mark.parametrize("sides", [{}, {"width": None, "height": None}, {"width": 0, "height": 0}, {"width": 40}])
def test_a_size_that_the_file_does_not_name_is_the_pictures(tmp_path, sides):
    picture(tmp_path / "images" / "a.jpg", (30, 40), orientation=6)
    image = {"id": 1, "file_name": "a.jpg", **sides}
    found = read_user_coco(user_file(tmp_path, [], [(1, [30, 20, 20, 5])], images=[image]))
    assert (found.dataset.images[0].width, found.dataset.images[0].height) == (40, 30)
    assert found.dataset.annotations[0].bbox_xywh == (30, 20, 10, 5)
    assert found.report.sized == 1 and "the file has no size of 1 images" in str(found.report)


def test_a_size_with_a_fraction_is_rounded(tmp_path):
    picture(tmp_path / "images" / "a.png", (40, 30))
    image = read_user_coco(user_file(tmp_path, [("a.png", 39.6, 30.4)])).dataset.images[0]
    assert (image.width, image.height) == (40, 30)


def test_objects_with_an_outline_and_no_box_have_the_box_round_it(tmp_path):
    picture(tmp_path / "images" / "a.png", (40, 30))
    outline = {"image_id": 1, "category_id": 0, "segmentation": [[2, 3, 12, 3, 12, 9], [1, 8, 4, 8, 4, 20.5]]}
    rows = [outline, {**outline, "bbox": None}]
    found = read_user_coco(user_file(tmp_path, [("a.png", 40, 30)], annotations=rows)).dataset
    assert [row.bbox_xywh for row in found.annotations] == [(1.0, 3.0, 11.0, 17.5)] * 2
    for mask in (None, [], [[1, 2, 3]], [["a", "b"]], {"counts": [3, 4], "size": [30, 40]}):
        path = user_file(tmp_path, [("a.png", 40, 30)], annotations=[{**outline, "segmentation": mask}])
        with pytest.raises(DatasetError, match=r"annotations\[0\] with a bbox or an outline in points, got neither"):
            read_user_coco(path)


def test_no_message_carries_a_whole_input(tmp_path):
    """A Latin-1 file of 4.4 MB printed 4.8 million characters."""
    path = tmp_path / "pool.json"
    path.write_bytes(b'{"images": "' + "é".encode("latin-1") * 500_000 + b'"}')
    for read in (read_user_coco, CocoDataset.read):
        with pytest.raises(DatasetError, match=r"expected UTF-8 in .*save the file as UTF-8") as caught:
            read(path)
        assert len(str(caught.value)) < 400
    long = DatasetError("expected this, got " + "x" * 100_000 + "; do that")
    assert len(str(long)) < 1000 and str(long).startswith("expected this") and str(long).endswith("; do that")
