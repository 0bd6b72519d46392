"""A set depends on its parameters only, is whole or not there, and is what its manifest says."""

import json
from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from ppal_backend.errors import DatasetError, SettingsError
from ppal_backend.synthetic import scenes
from ppal_backend.synthetic.glyphs import GlyphSheet, glyph_family
from ppal_backend.synthetic.photographs import Photographs
from ppal_backend.synthetic.scenes import SceneParameters, checksum, generate, plan_set, read_manifest, render_scene


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("set") / "demo"
    generate(out, 120, 7)
    return out


@pytest.fixture(scope="module")
def coco(made):
    return json.loads((made / "annotations.json").read_text())


def picture(out, name):
    return np.asarray(Image.open(out / "images" / name).convert("RGB"), dtype=float)


def test_equal_parameters_give_equal_bytes(made, tmp_path):
    generate(tmp_path / "again", 120, 7)
    assert read_manifest(tmp_path / "again") == read_manifest(made)
    assert checksum(tmp_path / "again") == checksum(made) == read_manifest(made)["sha256"]


@pytest.mark.parametrize("change", [{"seed": 8}, {"size": 96}, {"glyphs": "second"}, {"burst_share": 0.0}])
def test_every_parameter_changes_the_set(made, tmp_path, change):
    generate(tmp_path / "other", **{"images": 120, "seed": 7, **change})
    assert checksum(tmp_path / "other") != checksum(made)


def test_a_scene_does_not_depend_on_the_others(made):
    parameters = SceneParameters(120, 7)
    plans, sheet, photographs = plan_set(parameters), GlyphSheet.load(), Photographs.load()
    for index in (90, 3, 41):
        pixels = render_scene(plans[index], parameters, sheet, photographs).pixels
        stored = picture(made, f"{index + 1:06d}.jpg")
        assert np.corrcoef(stored.ravel(), pixels.ravel())[0, 1] > 0.97


def test_boxes_lie_inside_and_labels_are_those_planned(made, coco):
    plans = plan_set(SceneParameters(120, 7))
    names = {category["id"]: category["name"] for category in coco["categories"]}
    assert tuple(names.values()) == glyph_family("demo").labels
    shown = defaultdict(list)
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and y >= 0 and w >= 3 and h >= 3 and x + w <= 128 and y + h <= 128
        assert annotation["area"] == w * h
        shown[annotation["image_id"]].append(names[annotation["category_id"]])
    planned = total = 0
    for image, scene in zip(coco["images"], plans, strict=True):
        assert (image["group"], image["scene"]) == (scene.group, scene.scene)
        assert not set(shown[image["id"]]) - set(scene.labels)
        planned, total = planned + len(scene.labels), total + len(shown[image["id"]])
    assert total >= 0.9 * planned


def test_the_manifest_tells_the_truth(made, coco):
    manifest = read_manifest(made)
    assert manifest["objects"] == len(coco["annotations"]) == sum(manifest["class_counts"].values())
    assert manifest["groups"] == len({image["group"] for image in coco["images"]})
    assert sorted(path.name for path in (made / "images").iterdir()) == [i["file_name"] for i in coco["images"]]


def test_images_of_a_group_are_near_duplicates_and_others_are_not(made, coco):
    groups = defaultdict(list)
    for image in coco["images"]:
        groups[image["group"]].append(picture(made, image["file_name"])[::4, ::4].mean(axis=2))
    bursts = [group for group in groups.values() if len(group) > 1]
    assert len(bursts) >= 3

    def likeness(a, b):
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]

    within = [likeness(group[0], group[-1]) for group in bursts]
    between = [likeness(a[0], b[0]) for a, b in combinations(groups.values(), 2)]
    assert np.median(within) > 0.6 > np.quantile(between, 0.9)
    assert not any(np.array_equal(a, b) for group in bursts for a, b in combinations(group, 2))


def test_every_frame_wobbles_on_its_own():
    parameters = SceneParameters(120, 7)
    sheet, photographs = GlyphSheet.load(), Photographs.load()
    bursts = defaultdict(set)
    for plan in plan_set(parameters):
        if plan.frames > 1 and plan.scene == "easy":
            drawn = render_scene(plan, parameters, sheet, photographs)
            bursts[plan.group].update((label, box[2], box[3]) for label, box in drawn.objects)
    plans = {plan.group: plan for plan in plan_set(parameters)}
    assert all(len(sizes) > 2 * len(plans[group].labels) for group, sizes in bursts.items())


def test_a_finished_set_is_reused(made):
    before = (made / "images" / "000001.jpg").stat().st_mtime_ns
    generate(made, 120, 7)
    assert (made / "images" / "000001.jpg").stat().st_mtime_ns == before


def test_a_damaged_set_is_made_again(tmp_path):
    out = tmp_path / "set"
    generate(out, 12, 1)
    good = checksum(out)
    (out / "images" / "000003.jpg").write_bytes(b"gone")
    generate(out, 12, 1)
    assert checksum(out) == good


def test_a_set_of_other_parameters_is_replaced(tmp_path):
    generate(tmp_path / "set", 12, 1)
    generate(tmp_path / "set", 14, 1)
    assert len(list((tmp_path / "set" / "images").iterdir())) == 14
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="choose another"):
        generate(tmp_path, 12, 1)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_run_leaves_nothing_behind(tmp_path):
    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "set", 12, 1, on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_image(tmp_path):
    seen = []
    generate(tmp_path / "set", 12, 1, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 12) for n in range(1, 13)]


def test_aspect_ratios_keep_the_short_side(tmp_path):
    path = generate(tmp_path / "set", 40, 1, size=64, aspect_ratios=(0.75, 1.5))
    coco = json.loads(path.read_text())
    assert {(image["width"], image["height"]) for image in coco["images"]} == {(64, 85), (96, 64)}
    for image in coco["images"]:
        stored = Image.open(path.parent / "images" / image["file_name"])
        assert stored.size == (image["width"], image["height"])


def test_a_new_generator_version_makes_the_set_again(tmp_path, monkeypatch):
    generate(tmp_path / "set", 12, 1)
    monkeypatch.setattr(scenes, "GENERATOR_VERSION", scenes.GENERATOR_VERSION + 1)
    assert not scenes.is_complete(tmp_path / "set", SceneParameters(12, 1))


@pytest.mark.parametrize(
    "wrong",
    [{"images": 0}, {"seed": -1}, {"size": 8}, {"glyphs": "klingon"}, {"burst_share": 1.5}, {"burst_frames": (1, 4)},
     {"aspect_ratios": ()}, {"aspect_ratios": (9.0,)}, {"quality": 0}],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(SettingsError, match="expected"):
        generate(tmp_path / "set", **{"images": 12, **wrong})
    assert not (tmp_path / "set").exists()
