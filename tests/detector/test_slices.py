"""Sliced inference and training: tiles cover the image, every object counts once, and off changes nothing."""

from __future__ import annotations

import itertools
import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes

from ppal_backend.detector.config import build_config
from ppal_backend.detector.data import ImageRecord, Instance, TrainingData, build_pipeline, read_coco
from ppal_backend.detector.infer.evaluation import evaluate
from ppal_backend.detector.infer.exporting_model import export_model
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.infer.prediction import read_batches
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.slices import (
    MOST_TILES,
    OVERLAP,
    RandomSlice,
    Window,
    choose,
    cut_by_window,
    merge,
    slice_steps,
    windows,
)
from ppal_backend.detector.train.training import TrainRequest, TrainResult, train
from ppal_backend.detector.weights import load_checkpoint
from ppal_backend.detector.zoo import find_entry, load_zoo
from ppal_backend.errors import DetectorError
from tests.detector.shapes import CLASSES, write_set

SIZES = [(640, 480), (12_000, 9_000), (12_000, 80), (500, 3_000), (417, 416), (833, 832), (416, 416), (50, 50), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tile", [64, 416, 800])
def test_tiles_cover_the_image_overlap_and_are_few(size: tuple[int, int], tile: int) -> None:
    found = windows(*size, tile)
    assert len(found) != 1 and len(found) <= MOST_TILES
    if max(size) <= tile:
        assert found == []
    if not found:
        assert max(size) <= 1.2 * tile
        return
    for axis in (0, 1):
        begins = sorted({w[axis] for w in found})
        ends = sorted({w[axis + 2] for w in found})
        assert begins[0] == 0 and ends[-1] == size[axis]
        side = ends[0] - begins[0]
        assert all(end - begin == side for begin, end in zip(begins, ends, strict=True))
        assert side >= min(tile, size[axis])
        for before, after in itertools.pairwise(range(len(begins))):
            assert ends[before] - begins[after] >= OVERLAP * side - 2
    assert len(set(found)) == len(found) == len({w[0] for w in found}) * len({w[1] for w in found})


def test_tiles_keep_the_resolution_until_they_would_be_too_many() -> None:
    assert {x2 - x1 for x1, _, x2, _ in windows(640, 480, 416)} == {416}
    assert windows(640, 480, 416) == [(0, 0, 416, 480), (224, 0, 640, 480)]  # 480 px hardly exceed the tile
    assert len(windows(640, 640, 416)) == 4
    large = windows(12_000, 9_000, 416)
    assert 2 * len(large) > MOST_TILES and large[0][2] > 1_500


def reference_merge(
    boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, views: np.ndarray, cut: np.ndarray
) -> list[int]:
    """The rule of ``merge`` in words of one box at a time."""

    def shared(a: np.ndarray, b: np.ndarray) -> float:
        wide = min(a[2], b[2]) - max(a[0], b[0])
        high = min(a[3], b[3]) - max(a[1], b[1])
        return float(wide * high) if wide > 0 and high > 0 else 0.0

    def area(a: np.ndarray) -> float:
        return float((a[2] - a[0]) * (a[3] - a[1]))

    stay: list[int] = []
    for row in sorted(range(len(scores)), key=lambda i: (bool(cut[i]), -float(scores[i]), i)):
        for other in stay:
            if classes[other] != classes[row] or views[other] == views[row]:
                continue
            both = shared(boxes[other], boxes[row])
            if both > 0.5 * (area(boxes[other]) + area(boxes[row]) - both) or (
                cut[row] and both > 0.5 * area(boxes[row])
            ):
                break
        else:
            stay.append(row)
    return sorted(stay, key=lambda i: (-float(scores[i]), i))


@pytest.mark.parametrize("seed", range(20))
def test_merging_is_the_slow_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 120))
    corner = rng.uniform(0, 100, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 50, (count, 2))], axis=1).astype(np.float32)
    scores = rng.choice([0.1, 0.3, 0.5, 0.9], count).astype(np.float32) + rng.uniform(0, 0.01, count).astype(np.float32)
    classes, views = rng.integers(0, 2, count), rng.integers(0, 4, count)
    cut = rng.random(count) < 0.4
    found = merge(boxes, scores, classes, views, cut)
    assert found.tolist() == reference_merge(boxes, scores, classes, views, cut)
    assert count < 20 or 0 < len(found) < count


def merged(*rows: tuple[tuple[float, float, float, float], float, int, int, bool]) -> list[int]:
    boxes, scores, classes, views, cut = zip(*rows, strict=True)
    return merge(
        np.asarray(boxes, float), np.asarray(scores), np.asarray(classes), np.asarray(views), np.asarray(cut)
    ).tolist()


def test_a_box_cut_by_a_tile_loses_against_the_whole_one_whatever_its_score() -> None:
    whole, half = ((0.0, 0.0, 100.0, 40.0), 0.4, 0, 0, False), ((0.0, 0.0, 45.0, 40.0), 0.9, 0, 1, True)
    assert merged(whole, half) == [0]  # their overlap is 0.45: plain suppression would leave both
    assert merged(whole, (*half[:4], False)) == [1, 0]  # a small object before a large one is an object
    assert merged(whole, (half[0], 0.9, 1, 1, True)) == [1, 0]  # so is one of another class


def test_what_suppression_left_in_one_view_stays() -> None:
    near = [((0.0, 0.0, 40.0, 40.0), 0.9, 0, 2, False), ((8.0, 0.0, 48.0, 40.0), 0.8, 0, 2, False)]
    assert merged(*near) == [0, 1]
    assert merged(near[0], (*near[1][:3], 3, False)) == [0]


def test_two_halves_of_what_no_view_shows_whole_stay() -> None:
    assert merged(((0.0, 0, 50, 40), 0.5, 0, 1, True), ((45.0, 0, 100, 40), 0.6, 0, 2, True)) == [1, 0]


def test_only_inner_borders_cut() -> None:
    boxes = np.asarray([[0, 0, 30, 30], [70, 40, 100, 60], [40, 71, 60, 99.5], [40, 40, 60, 60]], float)
    window: Window = (0, 0, 100, 100)
    assert cut_by_window(boxes, window, (200, 200)).tolist() == [False, True, True, False]
    assert cut_by_window(boxes, window, (100, 100)).tolist() == [False] * 4
    assert cut_by_window(np.zeros((0, 4)), window, (200, 200)).shape == (0,)


def records(side: float, size: tuple[int, int] = (640, 480), images: int = 6) -> list[ImageRecord]:
    boxes = (Instance((10, 10, 10 + side, 10 + side), 0), Instance((90, 90, 90 + side, 90 + side), 0))
    return [ImageRecord(i, f"{i}.png", *size, boxes) for i in range(images)]


def test_auto_slices_for_small_boxes_in_larger_images_and_says_why() -> None:
    small = choose("auto", records(30), (416, 416))
    assert small.tile == 416 and "12 labelled boxes are under 20 px" in small.reason and "416 × 416" in small.reason
    large = choose("auto", records(60), (416, 416))
    assert large.tile is None and "39 px or more" in large.reason
    fits = choose("auto", records(20, (480, 400)), (416, 416))
    assert fits.tile is None and "6 of 6 labelled images are hardly larger" in fits.reason
    assert choose("auto", records(30), (1333, 800)).tile is None  # a larger input enlarges them
    assert choose("auto", records(60, (4000, 3000)), (1333, 800)).tile == 800
    nothing = choose("auto", [ImageRecord(1, "1.png", 640, 480, ())], (416, 416))
    assert nothing.tile is None and nothing.reason == "no boxes are labelled"
    assert choose("off", records(5), (416, 416)).tile is None and choose(256, records(200), (416, 416)).tile == 256


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the photographs in {SHARED}")
@pytest.mark.parametrize(
    ("data", "tile", "why"),
    [
        ("aquarium", 416, "labelled boxes are under 3"),
        ("facemask", None, "labelled images are hardly larger"),
        ("cards", None, "labelled boxes are 11"),
    ],
)
def test_auto_on_photographs_that_others_labelled(data: str, tile: int | None, why: str) -> None:
    file = SHARED / data / "pool.json"
    classes = [item["name"] for item in json.loads(file.read_text())["categories"]]
    chosen = choose("auto", read_coco(file, classes), find_entry("yolox_nano").input_size)
    assert chosen.tile == tile and why in chosen.reason


def picture(width: int, height: int, boxes: list[list[float]]) -> dict[str, Any]:
    """What a pipeline knows after reading; every pixel says where it is."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([columns % 256, rows % 256, columns // 256 + 16 * (rows // 256)], axis=2).astype(np.uint8)
    return {
        "img": image,
        "img_shape": (height, width),
        "ori_shape": (height, width),
        "gt_bboxes": HorizontalBoxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        "gt_bboxes_labels": np.arange(len(boxes)),
        "gt_ignore_flags": np.zeros(len(boxes), bool),
    }


def test_random_slices_keep_boxes_on_their_objects() -> None:
    boxes = [[20.0, 30, 60, 70], [500, 400, 560, 470], [0, 0, 640, 480], [300, 200, 310, 212]]
    np.random.seed(0)
    whole = cut = 0
    seen: set[int] = set()
    for _ in range(300):
        results = RandomSlice(160)(picture(640, 480, boxes))
        height, width = results["img"].shape[:2]
        assert results["img_shape"] == (height, width)
        labels, found = results["gt_bboxes_labels"], results["gt_bboxes"].tensor.numpy()
        assert len(labels) == len(found) == len(results["gt_ignore_flags"])
        if (width, height) == (640, 480):
            whole += 1
            assert labels.tolist() == [0, 1, 2, 3]
            continue
        cut += 1
        assert (width, height) == (160, 160)
        assert 2 not in labels  # a twentieth of it is visible
        left = int(results["img"][0, 0, 0]) + 256 * (int(results["img"][0, 0, 2]) % 16)
        top = int(results["img"][0, 0, 1]) + 256 * (int(results["img"][0, 0, 2]) // 16)
        expected = {}
        for number, box in enumerate(boxes):
            clipped = np.clip(np.asarray(box) - [left, top, left, top], 0, 160)
            visible = (clipped[2:] - clipped[:2]).prod() / ((box[2] - box[0]) * (box[3] - box[1]))
            if visible >= 0.3:
                expected[number] = clipped.tolist()
        assert dict(zip(labels.tolist(), found.tolist(), strict=True)) == expected
        seen |= set(labels.tolist())
    assert seen == {0, 1, 3} and 120 < whole < 180 and cut == 300 - whole


def test_small_images_and_images_without_boxes_are_sliced_like_others() -> None:
    np.random.seed(1)
    assert {RandomSlice(160)(picture(50, 50, []))["img"].shape for _ in range(20)} == {(50, 50, 3)}
    shapes = {RandomSlice(160)(picture(400, 180, []))["img"].shape for _ in range(40)}
    assert shapes == {(180, 400, 3), (180, 160, 3)}


def test_slices_come_right_after_reading_also_where_images_are_combined() -> None:
    reading = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}]
    mosaic = {"type": "CombineImages", "step": {"type": "Mosaic"}, "source": reading, "prob": 1.0}
    found = slice_steps([*reading, mosaic, {"type": "Resize"}], 200)
    assert [step["type"] for step in found] == [
        "LoadImageFromFile", "LoadAnnotations", "RandomSlice", "CombineImages", "Resize",
    ]  # fmt: skip
    assert [step["type"] for step in found[3]["source"]] == ["LoadImageFromFile", "LoadAnnotations", "RandomSlice"]
    assert len(reading) == 2
    with pytest.raises(DetectorError, match=r"expected LoadAnnotations.*set slices to off"):
        slice_steps([{"type": "LoadImageFromFile"}], 200)


@pytest.mark.parametrize("name", load_zoo())
def test_every_detector_of_the_zoo_learns_from_tiles(name: str, tmp_path: Path) -> None:
    """Its training pipeline, with tiles, gives samples whose boxes lie in their image."""
    records = read_coco(write_set(tmp_path, 3, size=(300, 220)), CLASSES)
    with isolated("test-slices"):
        config = build_config(find_entry(name), CLASSES, train_images=3)
        steps = slice_steps(config.train_pipeline, 80)
        assert str(steps).count("RandomSlice") >= 1
        data = TrainingData(records, build_pipeline(steps, records), CLASSES, 1)
        for position in range(4):
            found = data[position]["data_samples"]
            if isinstance(found, dict):
                found = found["sup"]  # of a detector that learns from unlabelled images too
            boxes = found.gt_instances.bboxes.tensor.numpy()
            height, width = found.img_shape
            assert (boxes >= 0).all() and (boxes[:, 2] <= width + 1).all() and (boxes[:, 3] <= height + 1).all()


def slicing(checkpoint: Path, tile: int | None, target: Path) -> Path:
    """The same weights as if they had learned from tiles."""
    content = load_checkpoint(checkpoint)
    torch.save({**content, "meta": {**content["meta"], "slices": tile}}, target)
    return target


@pytest.fixture(scope="module")
def large_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images three times as large as the detector's input, with objects of its size."""
    return write_set(tmp_path_factory.mktemp("large"), 6, seed=5, size=(200, 150), first_id=301)


@pytest.fixture(scope="module")
def large(large_json: Path) -> list[PoolImage]:
    return [PoolImage(item["id"], item["file_name"]) for item in json.loads(large_json.read_text())["images"]]


@pytest.fixture(scope="module")
def sliced(trained: TrainResult, zoo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> PoolInference:
    path = slicing(trained.checkpoint, 96, tmp_path_factory.mktemp("sliced") / "final.pth")
    return PoolInference("small", path, CLASSES, "cpu", zoo_root, count=True)


def test_merged_detections_are_those_of_the_tiles_with_all_that_describes_them(
    sliced: PoolInference, trained: TrainResult, zoo_root: Path, large: list[PoolImage], tmp_path: Path
) -> None:
    """Every tile as an image of its own, merged by the slow reference."""
    plain = PoolInference("small", trained.checkpoint, CLASSES, "cpu", zoo_root, count=True)
    results = list(sliced.run_with_features(large, batch_size=5))
    assert [r.detections.image_id for r in results] == [image.image_id for image in large]
    origins = set()
    for image, result in zip(large, results, strict=True):
        pixels = cv2.imread(str(image.path))
        shown = [(0, 0, 200, 150), *windows(200, 150, 96)]
        assert len(shown) == 7
        files = []
        for number, (x1, y1, x2, y2) in enumerate(shown):
            path = tmp_path / f"{image.image_id}-{number}.png"
            cv2.imwrite(str(path), pixels[y1:y2, x1:x2])
            files.append(PoolImage(number, path))
        parts = list(plain.run_with_features(files, batch_size=1))
        moved = [p.detections.boxes_xyxy + [w[0], w[1]] * 2 for p, w in zip(parts, shown, strict=True)]
        boxes = np.concatenate(moved)
        cut = np.concatenate([cut_by_window(b, w, (200, 150)) for b, w in zip(moved, shown, strict=True)])
        joined = {n: np.concatenate([getattr(p.detections, n) for p in parts]) for n in FIELDS}
        views = np.repeat(range(7), [len(p.detections) for p in parts])
        stay = reference_merge(boxes, joined["scores"], joined["class_indices"], views, cut)[:100]
        found = result.detections
        assert found.image_size == (200, 150) and 0 < len(stay) < len(views)
        np.testing.assert_allclose(found.boxes_xyxy, boxes[stay], atol=1e-3)
        for name in FIELDS:
            np.testing.assert_allclose(getattr(found, name), joined[name][stay], atol=1e-4, err_msg=name)
        for name, vector in parts[0].features.items():
            np.testing.assert_allclose(result.features[name], vector, atol=1e-5)
        origins |= set(views[stay].tolist())
    assert len(origins) > 4  # not only what the whole shows


FIELDS = ("scores", "class_indices", "embeddings", "class_probs", "levels", "pre_nms_counts")


def test_evaluation_looks_through_the_same_tiles(
    sliced: PoolInference,
    trained: TrainResult,
    zoo_root: Path,
    large_json: Path,
    large: list[PoolImage],
    tmp_path: Path,
) -> None:
    """The metrics are those of the pool's merged detections, and differ from those of whole images."""
    from ppal_backend.detector.infer.evaluation import coco_metrics

    predictions = [
        {"image_id": d.image_id, "category_id": int(c) + 1, "score": float(s), "iscrowd": 0,
         "bbox": [float(b[0]), float(b[1]), float(b[2] - b[0]), float(b[3] - b[1])],
         "area": float((b[2] - b[0]) * (b[3] - b[1]))}
        for d in sliced.run(large) for b, s, c in zip(d.boxes_xyxy, d.scores, d.class_indices, strict=True)
    ]  # fmt: skip
    expected = coco_metrics(read_coco(large_json, CLASSES), predictions, CLASSES)
    path = slicing(trained.checkpoint, 96, tmp_path / "final.pth")
    found = evaluate("small", path, CLASSES, large_json, "cpu", zoo_root=zoo_root)
    assert found.map == pytest.approx(expected.map, abs=1e-3) and found.map50 == pytest.approx(expected.map50, abs=1e-3)
    whole = evaluate("small", trained.checkpoint, CLASSES, large_json, "cpu", zoo_root=zoo_root)
    assert whole.map is not None and found.map is not None and abs(whole.map - found.map) > 0.01


def test_an_image_no_larger_than_a_tile_gives_what_it_gave_without_slices(
    sliced: PoolInference, trained: TrainResult, zoo_root: Path, tmp_path: Path
) -> None:
    path = write_set(tmp_path / "small", 3, seed=9, size=(96, 96), first_id=1)
    images = [PoolImage(item["id"], item["file_name"]) for item in json.loads(path.read_text())["images"]]
    plain = PoolInference("small", trained.checkpoint, CLASSES, "cpu", zoo_root, count=True)
    for own, other in zip(sliced.run(images, 1), plain.run(images, 1), strict=True):
        assert len(own) > 0
        for name in ("boxes_xyxy", *FIELDS):
            np.testing.assert_array_equal(getattr(own, name), getattr(other, name), err_msg=name)


def test_threads_that_read_ahead_and_batches_change_nothing(
    sliced: PoolInference, trained: TrainResult, zoo_root: Path, large: list[PoolImage], tmp_path: Path
) -> None:
    path = slicing(trained.checkpoint, 96, tmp_path / "final.pth")
    threaded = PoolInference("small", path, CLASSES, "cpu", zoo_root, workers=3)
    broken = PoolImage(7, tmp_path / "gone.png")
    failed: list[int] = []
    own = list(threaded.run([*large[:2], broken, *large[2:]], 3, on_error=lambda i, _: failed.append(i)))
    assert failed == [7]
    for one, other in zip(own, sliced.run(large, 100), strict=True):
        np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=1e-3)
        np.testing.assert_allclose(one.embeddings, other.embeddings, atol=1e-4)


def test_grey_and_sixteen_bit_pictures_of_any_size_are_sliced(sliced: PoolInference, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = []
    for number, (shape, kind) in enumerate(
        [((150, 200), np.uint8), ((150, 200), np.uint16), ((150, 200, 3), np.uint16), ((50, 50), np.uint8)]
    ):
        path = tmp_path / f"{number}.png"
        assert cv2.imwrite(str(path), rng.integers(0, np.iinfo(kind).max, shape).astype(kind))
        images.append(PoolImage(number, path))
    found = list(sliced.run(images))
    assert [d.image_size for d in found] == [(200, 150)] * 3 + [(50, 50)]
    assert all(len(d) <= 100 for d in found)


def test_a_picture_of_12000_px_takes_its_own_pixels_and_little_more(sliced: PoolInference, tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    cv2.imwrite(str(path), np.full((8_000, 12_000), 120, np.uint8))
    ((record, views),) = next(
        iter(read_batches(sliced.loaded.pipeline, [ImageRecord(1, str(path), 0, 0, ())], 1, 0, 96))
    )
    assert record.image_id == 1 and views.size == (12_000, 8_000) and 12 < len(views.packed) <= MOST_TILES + 1
    assert sum(packed["inputs"].nbytes for packed in views.packed) < 2**20  # nothing holds on to the picture
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (found,) = sliced.run([PoolImage(1, path)])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert found.image_size == (12_000, 8_000)
    assert grown < 12_000 * 8_000 * 3  # another copy of the picture would show


def request(folder: Path, data: Path, zoo_root: Path, **changed: Any) -> TrainRequest:
    values: dict[str, Any] = {
        "detector": "small", "classes": CLASSES, "train_json": data, "val_json": None, "work_dir": folder, "seed": 3,
        "device": "cpu", "init_weights": "random", "max_iterations": 8, "zoo_root": zoo_root,
    }  # fmt: skip
    return TrainRequest(**{**values, **changed})


def test_a_training_keeps_its_choice_in_the_checkpoint(large_json: Path, zoo_root: Path, tmp_path: Path) -> None:
    chosen = train(request(tmp_path / "96", large_json, zoo_root, slices=96, val_json=large_json))
    assert (chosen.slices, chosen.why_slices) == (96, "chosen in the settings")
    assert PoolInference("small", chosen.checkpoint, CLASSES, "cpu", zoo_root).loaded.tile == 96
    assert "RandomSlice" in (tmp_path / "96" / "config.json").read_text()
    export_model("small", chosen.checkpoint, CLASSES, tmp_path / "model.pt", "torchscript", zoo_root)
    described = json.loads((tmp_path / "model.pt.json").read_text())
    assert described["as_the_detector_does"]["tiles_px"] == 96
    auto = train(request(tmp_path / "auto", large_json, zoo_root, slices="auto"))
    assert auto.slices == 64 and "labelled boxes are under 1" in auto.why_slices  # 24 to 44 px, shrunk to a third
    off = train(request(tmp_path / "off", large_json, zoo_root))
    assert (off.slices, off.why_slices) == (None, "")
    assert "slices" not in load_checkpoint(off.checkpoint)["meta"]
    weights = [load_checkpoint(r.checkpoint)["state_dict"] for r in (off, auto)]
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_photos_are_decoded_once_a_training_and_learned_from_to_the_same_bits(
    zoo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[tuple[int, ...]]
) -> None:
    data = write_set(tmp_path / "photos", 4, seed=2, size=(400, 300))
    kept = train(request(tmp_path / "kept", data, zoo_root, slices=96))
    assert decoded == [(300, 400)] * 4 and not (tmp_path / "kept" / "images").exists()
    monkeypatch.setattr("ppal_backend.detector.train.image_cache._MOST_BYTES", 0)
    decoded.clear()
    anew = train(request(tmp_path / "anew", data, zoo_root, slices=96))
    assert len(decoded) == 8 * 4
    own, other = (load_checkpoint(r.checkpoint)["state_dict"] for r in (kept, anew))
    assert all(torch.equal(value, other[name]) for name, value in own.items())


def test_auto_that_finds_nothing_to_slice_trains_to_the_same_bits(zoo_root: Path, tmp_path: Path) -> None:
    data = write_set(tmp_path / "data", 8, size=(76, 60))
    auto = train(request(tmp_path / "auto", data, zoo_root, slices="auto"))
    off = train(request(tmp_path / "off", data, zoo_root))
    assert auto.slices is None and "hardly larger" in auto.why_slices
    own, other = (load_checkpoint(r.checkpoint)["state_dict"] for r in (auto, off))
    assert all(torch.equal(value, other[name]) for name, value in own.items())


def test_a_sliced_training_resumes_to_the_bit_and_not_with_another_choice(
    large_json: Path, zoo_root: Path, tmp_path: Path
) -> None:
    from ppal_backend.errors import RoundCancelled

    whole = train(request(tmp_path / "whole", large_json, zoo_root, slices=96))
    cut = request(tmp_path / "cut", large_json, zoo_root, slices=96)
    steps = itertools.count(1)
    with pytest.raises(RoundCancelled):
        train(cut, None, lambda: next(steps) >= 4)
    with pytest.raises(DetectorError, match=r"another training .*slices"):
        train(replace(cut, slices=64))
    resumed = train(cut)
    own, other = (load_checkpoint(r.checkpoint)["state_dict"] for r in (resumed, whole))
    assert all(torch.equal(value, other[name]) for name, value in own.items())
