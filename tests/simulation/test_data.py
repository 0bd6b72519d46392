"""Data as people have them: COCO files, folders as published, generated scenes; and what is wrong with them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ppal_backend.datasets.ground_truth import read_user_coco
from ppal_backend.datasets.voc import read_voc
from ppal_backend.detector.zoo import find_entry
from ppal_backend.errors import DatasetError, SettingsError
from ppal_backend.simulation.data import Benchmark, DataSource, source_from
from ppal_backend.simulation.plan import PRESETS, load_preset, preset_names
from ppal_backend.simulation.variants import parse_variants
from tests.simulation.fakes import benchmark
from tests.simulation.folders import SIDES, coco_layout, own_voc, picture, voc_devkit, write_coco


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "Annotations" / "000001.xml").unlink(), "expected the annotation .*000001.xml, got none"),
        (lambda f: (f / "Annotations" / "000001.xml").write_text("<annotation>"), "expected VOC XML in .*000001.xml"),
        (lambda f: (f / "ImageSets" / "Main" / "trainval.txt").unlink(), "expected the image list .*trainval.txt"),
        (lambda f: (f / "JPEGImages" / "000001.jpg").unlink(), "1 missing, such as .*000001.jpg"),
        (
            lambda f: replace_in(f, "<name>dog</name>", "<name>dragon</name>"),
            "got .'dragon'.; pass all of yours with --classes",
        ),
        (
            lambda f: replace_in(f, "<xmin>1</xmin>", "<xmin>left</xmin>"),
            "expected a number in bndbox/xmin, got 'l",
        ),
        (lambda f: replace_in(f, "<width>96</width>", ""), "expected a number in size/width, got None"),
    ],
)
def test_broken_voc_folders_are_refused_with_the_file(tmp_path, spoil, told):
    voc_devkit(tmp_path, trainval=3, test=2)
    spoil(tmp_path / "VOCdevkit" / "VOC2007")
    source = source_from({**load_preset("voc-retinanet")["data"], "data": tmp_path})
    with pytest.raises(DatasetError, match=told):
        source.load(tmp_path)


def replace_in(folder, old, new):
    path = folder / "Annotations" / "000001.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_voc_with_classes_of_its_own_takes_them_and_says_how(tmp_path):
    splits = own_voc(tmp_path, ["a"])
    with pytest.raises(DatasetError, match=r"got \['crab'\]; pass all of yours with --classes a,b,c"):
        read_voc(tmp_path, splits)
    data = source_from(
        {"format": "voc", "data": tmp_path, "train_splits": splits, "test_splits": splits, "classes": "crab, x"}
    )
    assert data.classes == ("crab", "x") and data.load(tmp_path).pool.labels == ("crab", "x")


def test_the_coco_preset_reads_the_published_layout(tmp_path):
    coco_layout(tmp_path, train=5, val=3)
    data = source_from({**load_preset("coco-retinanet")["data"], "data": tmp_path}).load(tmp_path)
    assert (len(data.pool.images), len(data.test.images)) == (5, 3)
    assert data.pool.images[0].file_name.endswith("train2017/000000000001.jpg")
    crowd = [row for row in data.test.annotations if row.iscrowd]
    assert len(crowd) == 1 and data.boxes[1] == 2, "crowd regions stay for evaluation and count nowhere"


def test_coco_files_are_cleaned(tmp_path):
    path = write_coco(tmp_path, [[-5, 10, 20, 20], [200, 10, 5, 5], [10, 10, 0, 5], [90, 60, 50, 50]])
    boxes = [row.bbox_xywh for row in read_user_coco(path, tmp_path).dataset.annotations]
    assert boxes == [(0.0, 10.0, 15.0, 20.0), (90.0, 60.0, 6.0, 4.0)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["images"].append({**c["images"][0], "id": 9, "file_name": "gone.jpg"}), "1 missing.*gone.jpg"),
        (lambda c: c["images"].append(c["images"][0]), "every id in images once, got 1 again"),
        (lambda c: c["images"].append({**c["images"][0], "id": 9}), "every image file once"),
        (lambda c: c["annotations"][0].update(category_id=77), "listed category, got category_id 77"),
        (lambda c: c["annotations"][0].update(image_id=77), "listed image, got image_id 77"),
        (lambda c: c["annotations"][0].update(id=2), "every id in annotations once"),
        (lambda c: c.update(images=[], annotations=[]), "bad.json: expected images, got an empty list"),
        (lambda c: c["annotations"].clear(), "expected a test set with images and boxes"),
        (
            lambda c: c["categories"][0].update(name="dragon"),
            "classes of the test set .*'dragon'.*categories into both",
        ),
    ],
)
def test_bad_coco_files_are_refused_with_the_reason(tmp_path, change, told):
    boxes = [[1, 1, 20, 20], [5, 5, 9, 9]]
    good = write_coco(tmp_path, boxes, "good.json")
    bad = write_coco(tmp_path, boxes, "bad.json")
    content = json.loads(bad.read_text())
    change(content)
    bad.write_text(json.dumps(content))
    source = DataSource("coco", good, tmp_path, bad)
    with pytest.raises(DatasetError, match=told):
        source.load(tmp_path)


def test_groups_of_a_coco_file_are_kept(tmp_path):
    path = write_coco(tmp_path, [[1, 1, 20, 20]])
    content = json.loads(path.read_text())
    content["images"][0]["group"] = 5
    path.write_text(json.dumps(content))
    assert DataSource("coco", path, tmp_path, path).load(tmp_path).groups == {1: 5}


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"format": "yolo"}, "expected a data format of coco, folder, coco-layout, voc, emoji, got 'yolo'"),
        ({"format": "voc"}, "expected the folder of the data set, got none; pass it with --data"),
        ({"format": "coco", "data": "x.json"}, "expected a COCO file of test images"),
        ({"colour": 1}, "expected data settings among .*'colour'"),
        ({"format": "voc", "data": ".", "test": "t.json"}, "expected no --test with data of the form voc, got one"),
        ({"format": "coco-layout", "data": ".", "images": "i"}, "no --images with data of the form coco-layout"),
        ({"format": "coco", "data": "x.json", "test": "t.json", "classes": "a,b"}, "no --classes with .* form coco,"),
        ({"format": "emoji", "data": "x.json"}, "no --data with data of the form emoji"),
    ],
)
def test_data_settings_that_make_no_sense_are_refused(table, told):
    with pytest.raises(SettingsError, match=told):
        source_from(table)


def test_generated_pools_have_bursts_and_test_images_are_a_scene_each(tmp_path):
    table = {"format": "emoji", "family": "second", "pool_images": 60, "test_size": 10, "burst_share": 0.8}
    data, again = (source_from(table).load(tmp_path / name) for name in "ab")
    assert (len(data.pool.images), len(data.test.images)) == (60, 10)
    assert data.sha256 == again.sha256 and "emoji/second, seed 0, sha256" in data.source
    assert set(data.groups) == set(data.pool.image_ids) and len(set(data.groups.values())) <= 40
    scenes = json.loads((Path(data.test.images[0].file_name).parents[1] / "annotations.json").read_text())["images"]
    assert len({image["group"] for image in scenes}) == 10
    pictures = [{Path(image.file_name).read_bytes() for image in part.images} for part in (data.pool, data.test)]
    assert not pictures[0] & pictures[1]
    for change in ({"seed": 1}, {"burst_share": 0.0}):
        assert source_from({**table, **change}).load(tmp_path / "c").sha256 != data.sha256


def test_other_pictures_than_those_of_the_preset_are_told(tmp_path, caplog):
    table = {"format": "emoji", "pool_images": 20, "test_size": 6, "sha256": "0" * 64}
    data = source_from(table).load(tmp_path)
    assert "differ from those of the preset" in caplog.text and "NOT as published" in data.source


def test_a_benchmark_survives_the_trip_to_disk(tmp_path):
    data = benchmark()
    data = replace(data, notes=("2 boxes were left out",))
    data.write(tmp_path)
    again = Benchmark.read(tmp_path)
    assert again == data and again.sha256 == data.sha256 and again.boxes[4] == 4


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_presets_are_whole(name):
    preset = load_preset(name)
    assert preset["title"] and {"detector", "strategies", "start", "budget", "rounds", "seeds"} <= set(preset["plan"])
    parse_variants(preset["plan"]["strategies"])
    find_entry(preset["plan"]["detector"])
    source_from({**preset["data"], **({} if preset["data"]["format"] == "emoji" else {"data": "."})})


def test_a_preset_that_does_not_exist_lists_those_that_do():
    assert {"voc-retinanet", "coco-retinanet", "coco-fasterrcnn", "emoji-tiny", "smoke"} <= set(preset_names())
    with pytest.raises(
        SettingsError,
        match="aquarium, cards, coco-fasterrcnn, coco-retinanet, emoji-second, emoji-tiny, facemask, smoke",
    ):
        load_preset("nonsense")


def test_a_folder_with_a_pool_and_a_test_set_is_read(tmp_path):
    (tmp_path / "images").mkdir()
    for name, number in (("pool", 1), ("test", 2)):
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / f"{number}.jpg")
        rows = {
            "images": [{"id": number, "file_name": f"{number}.jpg", "width": 40, "height": 30}],
            "annotations": [{"id": 1, "image_id": number, "category_id": 7, "bbox": [1, 2, 10, 10]}],
            "categories": [{"id": 7, "name": "fish"}],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    data = source_from({**load_preset("aquarium")["data"], "data": tmp_path}).load(tmp_path)
    assert data.pool.image_ids == (1,) and data.test.image_ids == (2,) and data.source == tmp_path.name
    assert data.pool.images[0].file_name == str(tmp_path / "images" / "1.jpg")


def coco_part(folder, first, boxes, names=("fish", "crab"), file="_annotations.coco.json", pictures=None):
    """A folder of pictures with a COCO file beside them: an image for each of ``boxes``, categories and boxes."""
    rows = {"images": [], "annotations": [], "categories": [{"id": k, "name": name} for k, name in enumerate(names)]}
    for number, found in enumerate(boxes, start=first):
        picture((pictures or folder) / f"{number}.jpg", number)
        rows["images"].append({"id": number, "file_name": f"{number}.jpg", "width": SIDES[0], "height": SIDES[1]})
        for category in found:
            rows["annotations"].append({"image_id": number, "category_id": category, "bbox": [1, 2, 10, 10]})
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(rows))


@pytest.mark.parametrize("table", [{}, {"format": "folder"}])
def test_a_roboflow_export_is_read_and_says_what_is_not_used(tmp_path, table):
    """It has a category 0 for the super-category, which nobody draws: as a class it would be looked for in vain."""
    names = ("animals", "fish", "crab")
    for split, first, boxes in (("train", 1, [[1], [2]]), ("valid", 5, [[1]]), ("test", 7, [[2, 1]])):
        coco_part(tmp_path / split, first, boxes, names)
    data = source_from({**table, "data": tmp_path}).load(tmp_path)
    assert (data.pool.image_ids, data.test.image_ids, data.labels) == ((1, 2), (7,), ("fish", "crab"))
    assert data.test.class_counts() == (1, 1) and data.source == tmp_path.name
    assert data.notes == (
        "valid is neither in the pool nor in the test set",
        "left out 1 class without a box: animals",
    )
    shutil.rmtree(tmp_path / "test")
    assert source_from({"data": tmp_path}).load(tmp_path).test.image_ids == (5,)
    (tmp_path / "train" / "1.jpg").unlink()
    with pytest.raises(DatasetError, match=r"^train/_annotations.coco.json: expected 2 image files, got 1 missing"):
        source_from({"data": tmp_path}).load(tmp_path)
    shutil.rmtree(tmp_path / "valid")
    with pytest.raises(DatasetError, match=r"expected pool.json and test.json .*, got \['train'\]"):
        source_from({"data": tmp_path}).load(tmp_path)
    with pytest.raises(DatasetError, match=r"in .*nowhere, got no folder; lay"):
        source_from({"format": "folder", "data": tmp_path / "nowhere"}).load(tmp_path)


def test_two_coco_files_may_be_named_where_a_preset_has_a_folder(tmp_path):
    """--test was left unread."""
    coco_part(tmp_path / "a", 1, [[0], [1]])
    coco_part(tmp_path / "b", 5, [[0, 1]])
    table = {**load_preset("cards")["data"], "data": tmp_path / "a", "test": tmp_path / "b"}
    data = source_from(table).load(tmp_path)
    assert (data.pool.image_ids, data.test.image_ids, data.source) == ((1, 2), (5,), "a and b")
    files = {name: tmp_path / name[0] / "_annotations.coco.json" for name in ("a.json", "b.json")}
    named = source_from({"data": files["a.json"], "test": files["b.json"]}).load(tmp_path)
    assert named.source == "a/_annotations.coco.json and b/_annotations.coco.json" and named.sha256 == data.sha256


def test_what_stands_out_in_the_data_is_told(tmp_path, caplog):
    coco_part(tmp_path, 1, [[0, 1], [1], [4]], ("fish", "crab", "eel", "ray", "orca"), "pool.json", tmp_path / "images")
    coco_part(tmp_path, 3, [[0], [2, 3]], ("fish", "crab", "eel", "ray", "orca"), "test.json", tmp_path / "images")
    rows = json.loads((tmp_path / "pool.json").read_text())
    rows["annotations"].append({"image_id": 1, "category_id": 0, "bbox": [1, 2, 0, 10]})
    (tmp_path / "pool.json").write_text(json.dumps(rows))
    data = source_from({"data": tmp_path}).load(tmp_path)
    assert data.notes == (
        "pool: 3 images, 4 boxes; dropped 1 degenerate, 0 crowd and 0 outside the image; clipped 0",
        "the pool has no box of 2 classes that the test set has: eel, ray; no model learns them, and they count in mAP",
        "the test set has no box of 2 classes that the pool has: crab, orca; they do not count in mAP",
        "1 picture is in the pool and in the test set, such as 3.jpg; models are measured on what they learn from",
    )
    assert all(note.split(": ")[-1] in caplog.text for note in data.notes)


def test_damaged_pictures_are_found_before_anything_is_trained(tmp_path):
    """The header of a picture is whole when the rest of it is missing; a strip has nothing left at the input size."""
    coco_part(tmp_path, 1, [[0], [0], [0]], ("fish",), "pool.json", tmp_path / "images")
    coco_part(tmp_path, 5, [[0], [0]], ("fish",), "test.json", tmp_path / "images")
    data = source_from({"data": tmp_path}).load(tmp_path)
    data.need_pictures()
    for name in ("2.jpg", "6.jpg"):
        path = tmp_path / "images" / name
        path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DatasetError, match=r"expected 5 pictures, got 2 files that are damaged.*2\.jpg.*6\.jpg"):
        source_from({"data": tmp_path}).load(tmp_path).need_pictures()
    strip = replace(data.pool.images[0], width=1001, height=10)
    pool = replace(data.pool, images=(strip, *data.pool.images[1:]))
    with pytest.raises(DatasetError, match=r"3 files that are damaged.* longer than 100 times their width.*1\.jpg"):
        replace(data, pool=pool).need_pictures()
