"""Data as people have them: COCO files, folders as published, generated scenes; and what is wrong with them."""

import json
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
from tests.simulation.folders import coco_layout, own_voc, voc_devkit, write_coco


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
        (lambda c: c["categories"].append({"id": 8, "name": "dragon"}), "classes of the test set .*'dragon'"),
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
