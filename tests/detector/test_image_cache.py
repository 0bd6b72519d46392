"""Resized copies of photos: the same pixels and boxes to the bit, and only where that can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ppal_backend.detector.config import build_config, find_entry
from ppal_backend.detector.data import ImageRecord, TrainingData, build_pipeline, read_coco
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.train.image_cache import with_image_cache
from ppal_backend.detector.train.training import TrainRequest, train
from ppal_backend.detector.weights import load_checkpoint
from tests.detector.shapes import CLASSES, write_set


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of 413 x 307 px, large beside the 64 px that the detector takes; sides that do not divide evenly."""
    return write_set(tmp_path_factory.mktemp("photos"), 6, size=(413, 307))


def streams(photos: Path, zoo_root: Path, folder: Path) -> tuple[TrainingData, TrainingData]:
    records = read_coco(photos, CLASSES)
    steps = build_config(find_entry("small", zoo_root), CLASSES).train_pipeline
    with isolated("test-cache"):
        plain = TrainingData(records, build_pipeline(steps), CLASSES, 5)
        cached = TrainingData(records, build_pipeline(with_image_cache(steps, records, folder)), CLASSES, 5)
    return plain, cached


def test_every_epoch_sees_the_same_pixels_and_boxes(
    photos: Path, zoo_root: Path, tmp_path: Path, decoded: list[tuple[int, ...]]
) -> None:
    plain, cached = streams(photos, zoo_root, tmp_path / "cache")
    with isolated("test-cache"):
        for position in range(12):
            one, other = plain[position], cached[position]
            assert torch.equal(one["inputs"], other["inputs"])
            boxes = [item["data_samples"].gt_instances.bboxes.tensor for item in (one, other)]
            assert torch.equal(*boxes)
            assert one["data_samples"].img_shape == other["data_samples"].img_shape
            assert one["data_samples"].img_path == other["data_samples"].img_path
    assert decoded[1:12:2] == [(307, 413)] * 6 and decoded[13::2] == [(48, 64)] * 6
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_a_training_is_the_same_and_leaves_no_copies(photos: Path, zoo_root: Path, tmp_path: Path) -> None:
    request = TrainRequest(
        "small", CLASSES, photos, None, tmp_path / "cached", 3, "cpu", "random", 4, zoo_root=zoo_root
    )
    seen: list[int] = []
    cached = train(request, lambda _: seen.append(len(list((tmp_path / "cached" / "images").glob("*.bmp")))))
    assert max(seen) == 6 and not (tmp_path / "cached" / "images").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppal_backend.detector.train.attempt.with_image_cache", lambda steps, *_: steps)
        plain = train(replace(request, work_dir=tmp_path / "plain"))
    one, other = (load_checkpoint(result.checkpoint)["state_dict"] for result in (cached, plain))
    assert all(torch.equal(one[name], other[name]) for name in one) and cached.difficulty == plain.difficulty


def record(width: int, height: int) -> ImageRecord:
    return ImageRecord(1, "1.jpg", width, height, ())


@pytest.mark.parametrize(
    ("detector", "width", "is_cached"),
    [
        ("retinanet_tiny", 4000, True),
        ("retinanet_tiny", 160, False),
        ("retinanet_r50_fpn", 4000, True),
        ("retinanet_r50_fpn", 640, False),
        ("yolox_nano", 200, False),
        ("rtmdet_tiny", 4000, False),
        ("ssd300_vgg16", 4000, False),
    ],
)
def test_copies_are_made_where_a_fixed_resize_comes_first(detector: str, width: int, is_cached: bool) -> None:
    steps = build_config(find_entry(detector), CLASSES).train_pipeline
    found = with_image_cache(steps, [record(width, width * 3 // 4)], Path("cache"))
    assert (found[0]["type"] == "LoadResizedImage") == is_cached
    assert found[1:] == [dict(step) for step in steps][1:]


@pytest.mark.parametrize("width", [400, 4000])
def test_images_to_combine_are_read_once_too(width: int) -> None:
    config = build_config(find_entry("yolox_nano"), CLASSES, train_images=1)
    for steps in (config.train_pipeline, config.late_train_pipeline):
        found = with_image_cache(steps, [record(width, width * 3 // 4)], Path("cache"))
        assert found[0]["type"] == "LoadResizedImage"
        sources = [step["source"] for step in found if step["type"] == "CombineImages"]
        assert [source[0]["type"] for source in sources] == ["LoadResizedImage"] * len(sources)
        assert len(sources) == (steps is config.train_pipeline)


def test_nothing_is_kept_without_room(
    photos: Path, zoo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppal_backend.detector.train.image_cache._MOST_BYTES", 2 * 48 * 64 * 3)
    plain, cached = streams(photos, zoo_root, tmp_path / "cache")
    with isolated("test-cache"):
        for position in range(12):
            assert np.array_equal(plain[position]["inputs"], cached[position]["inputs"])
    assert len(list((tmp_path / "cache").iterdir())) == 2
