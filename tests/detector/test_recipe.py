"""mmdetection's own recipes: images that are combined, what changes late in a training, averaged weights, resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmdet
import numpy as np
import pytest
import torch
from mmengine.config import Config

from ppal_backend.detector.config import build_config, find_entry
from ppal_backend.detector.data import ImageRecord, TrainingData, build_pipeline, read_coco
from ppal_backend.detector.recipe import device_optimizer, late_step, read_recipe, scaled_average
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.train.hooks import RepeatableSteps
from ppal_backend.detector.train.runner import half_precision
from ppal_backend.detector.train.training import TrainRequest, train
from ppal_backend.detector.weights import load_checkpoint
from ppal_backend.detector.zoo.check import check
from ppal_backend.errors import DetectorError, ImageError, RoundCancelled
from tests.detector.families import build
from tests.detector.shapes import CLASSES, write_set

PUBLISHED = Path(mmdet.__file__).parent / ".mim" / "configs"
YOLOX = "yolox/yolox_s_8xb8-300e_coco.py"
RTMDET = "rtmdet/rtmdet_tiny_8xb32-300e_coco.py"

SMALL_YOLOX = """
_base_ = [{base!r}]
model = dict(
    data_preprocessor=dict(batch_augments=[dict(type="BatchSyncRandomResize", random_size_range=(96, 160),
                                                size_divisor=32, interval=2)]),
    backbone=dict(widen_factor=0.125), neck=dict(in_channels=[32, 64, 128], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32))
img_scale = (64, 64)
train_pipeline = [
    dict(type="Mosaic", img_scale=img_scale, pad_val=114.0),
    dict(type="RandomAffine", scaling_ratio_range=(0.5, 1.5), border=(-32, -32)),
    dict(type="MixUp", img_scale=img_scale, ratio_range=(0.8, 1.6), pad_val=114.0),
    dict(type="RandomFlip", prob=0.5),
    dict(type="Resize", scale=img_scale, keep_ratio=True),
    dict(type="Pad", pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=img_scale, keep_ratio=True),
    dict(type="Pad", pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale="dynamic")
custom_hooks = [
    dict(type="YOLOXModeSwitchHook", num_last_epochs=100),
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.0001, update_buffers=True, priority=49),
]
"""
ZOO = """
[yolox]
title = "YOLOX for tests"
paper = "none"
config = "yolox.py"
head_family = "yolox"
input_size = [64, 64]
schedule = {{ epochs = 1, min_iterations = 6, max_iterations = 6, batch_size = 2, lr = 0.001 }}
"""


def published(name: str) -> Any:
    return Config.fromfile(str(PUBLISHED / name))


def kinds(steps: Any) -> list[str]:
    return [step["step"]["type"] if step["type"] == "CombineImages" else step["type"] for step in steps]


def test_the_recipe_of_yolox_is_read() -> None:
    recipe = read_recipe(published(YOLOX))
    assert kinds(recipe.steps)[:6] == [
        "LoadImageFromFile", "LoadAnnotations", "Mosaic", "RandomAffine", "MixUp", "YOLOXHSVRandomAug",
    ]  # fmt: skip
    assert [kinds(step["source"]) for step in recipe.steps if step["type"] == "CombineImages"] == [
        ["LoadImageFromFile", "LoadAnnotations"]
    ] * 2
    assert recipe.late_steps is not None and kinds(recipe.late_steps) == [
        kind for kind in kinds(recipe.steps) if kind not in ("Mosaic", "RandomAffine", "MixUp")
    ]
    assert recipe.late_from == pytest.approx(285 / 300) and recipe.late_l1
    assert recipe.average is not None and recipe.average["ema_type"] == "ExpMomentumEMA"
    assert recipe.left_out == ()


def test_the_recipe_of_rtmdet_is_read() -> None:
    """Its caches hold what the steps before them made: for mix-up, whole mosaics."""
    recipe = read_recipe(published(RTMDET))
    mosaic, mixup = (step for step in recipe.steps if step["type"] == "CombineImages")
    assert kinds(mosaic["source"]) == ["LoadImageFromFile", "LoadAnnotations"]
    assert kinds(mixup["source"])[2:5] == ["Mosaic", "RandomResize", "RandomCrop"]
    assert mixup["step"]["type"] == "MixUp" and mixup["prob"] == 0.5
    assert not {"max_cached_images", "random_pop", "prob"} & (set(mixup["step"]) | set(mosaic["step"]))
    assert recipe.late_from == pytest.approx(280 / 300) and not recipe.late_l1
    assert recipe.late_steps is not None and "CombineImages" not in {step["type"] for step in recipe.late_steps}


def test_what_is_not_followed_is_told_and_what_cannot_be_is_refused() -> None:
    base = published(YOLOX)
    base.custom_hooks = [dict(type="NumClassCheckHook"), dict(type="mine.OtherHook")]
    assert read_recipe(base).left_out == ("OtherHook",)
    base.custom_hooks = [dict(type="YOLOXModeSwitchHook")]
    base.pop("max_epochs"), base.train_cfg.pop("max_epochs")
    with pytest.raises(DetectorError, match="max_epochs"):
        read_recipe(base)


def test_what_happens_late_happens_in_a_short_training_too() -> None:
    recipe = read_recipe(published(YOLOX))
    assert [late_step(recipe, total) for total in (1, 2, 10, 300, 1000)] == [1, 1, 9, 285, 950]
    config = build_config(_entry(YOLOX), CLASSES, train_images=8, max_iterations=40)
    assert (config.late_from_step, config.late_l1) == (38, True)
    assert config.weight_average.momentum == 0.125 and config.weight_average.gamma == 2


def test_an_average_never_remembers_more_than_a_fifth_of_a_training() -> None:
    given = {"type": "EMAHook", "ema_type": "ExpMomentumEMA", "momentum": 0.0001}
    assert scaled_average(given, 100)["momentum"] == pytest.approx(0.05)
    assert scaled_average(given, 4)["momentum"] == 0.5
    assert scaled_average(given, 1_000_000) == {**given, "gamma": 2000}
    assert "gamma" not in scaled_average({"type": "EMAHook"}, 100)


def test_a_files_own_mixed_precision_is_for_gpus_and_half_precision_for_all_that_bear_it() -> None:
    amp = {"type": "AmpOptimWrapper", "loss_scale": "dynamic", "dtype": "float16", "optimizer": {"type": "SGD"},
           "paramwise_cfg": {"norm_decay_mult": 0.0}}  # fmt: skip
    plain = {"type": "OptimWrapper", "optimizer": {"type": "SGD"}, "paramwise_cfg": {"norm_decay_mult": 0.0}}
    assert device_optimizer(amp, "cuda") == device_optimizer(amp, "cuda", "bfloat16") == amp
    assert device_optimizer(amp, "cpu") == device_optimizer(plain, "cpu") == device_optimizer(plain, "cuda") == plain
    on_cpu = {**plain, "type": "CpuHalfOptimWrapper"}
    assert device_optimizer(amp, "cpu", "bfloat16") == device_optimizer(plain, "cpu", "bfloat16") == on_cpu
    assert device_optimizer(plain, "cuda", "float16") == amp


@pytest.mark.parametrize(
    ("name", "family", "expected"),
    [
        ("retinanet", "anchor", "bfloat16"),
        ("faster_rcnn", "roi", "float16"),
        ("dino", "detr", None),
        ("grounding", "grounding", None),
    ],
)
def test_half_precision_is_what_detector_and_gpu_bear(
    name: str, family: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert half_precision(model, family, torch.device("cuda")) == expected
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert half_precision(model, family, torch.device("cpu")) is None
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert half_precision(model, family, torch.device("cpu")) == (expected if expected == "bfloat16" else None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert half_precision(model, family, torch.device("cuda")) == (expected and "float16")


def _entry(name: str) -> Any:
    return replace(find_entry("yolox_nano"), config=PUBLISHED / name)


@pytest.fixture
def records(tmp_path: Path) -> tuple[ImageRecord, ...]:
    return read_coco(write_set(tmp_path / "images", 6, empty_every=5), CLASSES)


@pytest.mark.parametrize("name", [YOLOX, RTMDET])
def test_an_item_depends_on_seed_and_position_alone(name: str, records: tuple[ImageRecord, ...]) -> None:
    with isolated("test-recipe"):
        steps = read_recipe(published(name)).steps

        def stream(seed: int = 3) -> TrainingData:
            return TrainingData(records, build_pipeline(steps, records), CLASSES, seed)

        first, again, other = stream(), stream(), stream(4)
        forwards = [first[position] for position in range(4)]
        backwards = [again[position] for position in reversed(range(4))][::-1]
        assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in zip(forwards, backwards, strict=True))
        for a, b in zip(forwards, backwards, strict=True):
            boxes, same = (item["data_samples"].gt_instances.bboxes.tensor for item in (a, b))
            assert torch.equal(boxes, same)
        assert any(not torch.equal(a["inputs"], other[position]["inputs"]) for position, a in enumerate(forwards))


def test_a_mosaic_holds_the_boxes_of_four_images(records: tuple[ImageRecord, ...]) -> None:
    steps = [*read_recipe(published(YOLOX)).steps[:3], {"type": "PackDetInputs"}]
    steps[2]["step"]["img_scale"] = (96, 96)
    with isolated("test-recipe"):
        data = TrainingData(records, build_pipeline(steps, records), CLASSES, 3)
        sample = data[1]
        paths = {record.path for record in records}
    assert sample["inputs"].shape == (3, 192, 192)
    assert sample["data_samples"].img_path in paths
    boxes = sample["data_samples"].gt_instances.bboxes.tensor
    quarter = {(bool(x > 96), bool(y > 96)) for x, y in ((boxes[:, :2] + boxes[:, 2:]) / 2).tolist()}
    assert len(quarter) >= 2
    assert float(boxes.min()) >= 0 and float(boxes.max()) <= 192


def test_another_image_that_is_gone_is_named(records: tuple[ImageRecord, ...]) -> None:
    steps = read_recipe(published(YOLOX)).steps
    Path(records[2].path).unlink()
    with isolated("test-recipe"):
        data = TrainingData(records, build_pipeline(steps, records), CLASSES, 3)
        healthy = [position for position in range(6) if data.record_at(position).image_id != records[2].image_id]
        with pytest.raises(ImageError, match=f"image {records[2].image_id} "):
            [data[position + 6 * epoch] for epoch in range(4) for position in healthy]


def test_the_pipeline_changes_at_a_position(records: tuple[ImageRecord, ...]) -> None:
    with isolated("test-recipe"):
        recipe = read_recipe(published(YOLOX))
        assert recipe.late_steps is not None
        late = build_pipeline(recipe.late_steps)
        early = TrainingData(records, build_pipeline(recipe.steps, records), CLASSES, 3)
        plain = TrainingData(records, late, CLASSES, 3)
        both = TrainingData(records, build_pipeline(recipe.steps, records), CLASSES, 3, (2, late))
        found = [both[position]["inputs"] for position in range(4)]
        for position, data in enumerate((early, early, plain, plain)):
            assert torch.equal(found[position], data[position]["inputs"])


def test_random_sizes_are_those_of_their_steps() -> None:
    """mmdetection's own remembers its size outside of checkpoints, so that a resumed training would forget it."""
    with isolated("test-recipe"):
        from mmdet.models.data_preprocessors import BatchSyncRandomResize
        from mmengine.logging import MessageHub

        MessageHub.get_instance("test-recipe")

        def sizes(first: int) -> list[tuple[int, int]]:
            model = torch.nn.Module()
            model.resize = BatchSyncRandomResize((64, 256), interval=3, size_divisor=32)
            hook, runner = RepeatableSteps(5), SimpleNamespace(model=model, iter=first)
            hook.before_train(runner)
            found = []
            for step in range(first, 12):
                runner.iter = step
                MessageHub.get_current_instance().update_info("iter", step)
                hook.before_train_iter(runner, step)
                found.append(tuple(model.resize(torch.zeros(1, 3, 64, 64), [])[0].shape[-2:]))
            hook.after_train(runner)
            assert "forward" not in model.resize.__dict__ and "_get_random_size" not in model.resize.__dict__
            return found

        whole = sizes(0)
        assert whole[:3] == [(64, 64)] * 3 and len(set(whole)) > 2
        assert [whole[3 * block] for block in range(4) for _ in range(3)] == whole
        assert sizes(7) == whole[7:]


def test_steps_draw_by_seed_and_number() -> None:
    hook = RepeatableSteps(5)
    drawn = []
    for step in (0, 1, 1):
        hook.before_train_iter(SimpleNamespace(iter=step), step)
        drawn.append(float(torch.rand(())))
    assert drawn[1] == drawn[2] != drawn[0]


@pytest.fixture
def request_(tmp_path: Path) -> TrainRequest:
    root = tmp_path / "zoo"
    root.mkdir()
    (root / "zoo.toml").write_text(ZOO.format())
    (root / "yolox.py").write_text(SMALL_YOLOX.format(base=str(PUBLISHED / YOLOX)))
    images = write_set(tmp_path / "images", 8, empty_every=5)
    return TrainRequest("yolox", CLASSES, images, None, tmp_path / "work", 3, "cpu", "random", zoo_root=root)


def test_a_recipe_resumes_to_the_bit(request_: TrainRequest, tmp_path: Path) -> None:
    """Mosaics, random sizes, the switch to plain images at step 4 and the average of the weights."""
    whole = train(replace(request_, work_dir=tmp_path / "whole"))
    polls = iter(range(100))
    with pytest.raises(RoundCancelled, match="step 3 of 6"):
        train(request_, should_stop=lambda: next(polls) >= 2)
    resumed = train(request_)
    one, other = (load_checkpoint(result.checkpoint)["state_dict"] for result in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert resumed.difficulty == whole.difficulty


@pytest.mark.parametrize("detector", ["faster_rcnn_tiny", "dino_tiny"])
def test_detectors_that_draw_while_they_train_resume_to_the_bit(detector: str, tmp_path: Path) -> None:
    """Samplers of proposals and noise of denoising queries take torch's random numbers."""
    images = write_set(tmp_path / "images", 4)
    whole = TrainRequest(detector, CLASSES, images, None, tmp_path / "whole", 3, "cpu", "random", max_iterations=3)
    cut = replace(whole, work_dir=tmp_path / "cut")
    polls = iter(range(100))
    with pytest.raises(RoundCancelled, match="step 2 of 3"):
        train(cut, should_stop=lambda: next(polls) >= 1)
    one, other = (load_checkpoint(train(request).checkpoint)["state_dict"] for request in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_gradients_that_add_up_are_not_cut_off(request_: TrainRequest, tmp_path: Path) -> None:
    """A checkpoint holds no half gradient: a training stops, and saves, between updates only."""
    assert request_.zoo_root is not None
    file = request_.zoo_root / "yolox.py"
    file.write_text(file.read_text().replace('loss_scale="dynamic"', 'loss_scale="dynamic", accumulative_counts=2'))
    whole = train(replace(request_, work_dir=tmp_path / "whole"))
    polls = iter(range(100))
    with pytest.raises(RoundCancelled, match="step 4 of 6"):
        train(request_, should_stop=lambda: next(polls) >= 1)
    one, other = (load_checkpoint(r.checkpoint)["state_dict"] for r in (whole, train(request_)))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_average_is_what_a_training_leaves(request_: TrainRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen, it is what the first step made of the weights: later steps do not move it."""
    first = train(replace(request_, max_iterations=1, work_dir=request_.work_dir / "one"))
    monkeypatch.setattr(
        "ppal_backend.detector.config.scaled_average",
        lambda average, total: {"type": "EMAHook", "momentum": 1e-12, "update_buffers": True},
    )
    frozen = train(replace(request_, max_iterations=1, work_dir=request_.work_dir / "frozen"))
    later = train(replace(request_, work_dir=request_.work_dir / "later"))
    monkeypatch.setattr("ppal_backend.detector.config._recipe_part", lambda *_: {})
    plain = train(replace(request_, work_dir=request_.work_dir / "plain"))
    name = "bbox_head.multi_level_conv_cls.0.weight"
    states = [load_checkpoint(result.checkpoint)["state_dict"][name] for result in (first, frozen, later, plain)]
    assert torch.equal(states[0], states[1])
    moved = [float((state - states[1]).abs().max()) for state in states]
    assert moved[2] < 1e-6 < moved[3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("retinanet/retinanet_r50_fpn_1x_coco.py", "anchor"),
        ("ssd/ssd300_coco.py", "anchor"),
        ("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", "fcos"),
        ("atss/atss_r50_fpn_1x_coco.py", "atss"),
        ("ddod/ddod_r50_fpn_1x_coco.py", "ddod"),
        ("gfl/gfl_r50_fpn_1x_coco.py", "gfl"),
        (RTMDET, "rtmdet"),
        ("yolox/yolox_tiny_8xb8-300e_coco.py", "yolox"),
        (YOLOX, "yolox"),
        ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "roi"),
        ("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py", "roi"),
        ("detr/detr_r50_8xb2-150e_coco.py", "detr"),
        ("deformable_detr/deformable-detr_r50_16xb2-50e_coco.py", "detr"),
        ("dino/dino-4scale_r50_8xb2-12e_coco.py", "detr"),
        ("soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py", "roi"),
    ],
)
def test_published_files_are_taken_as_they_are(name: str, family: str, tmp_path: Path) -> None:
    """Built, trained for two steps (the second late in the recipe) and run over images."""
    from ppal_backend.detector.zoo.add import add

    added = add(PUBLISHED / name, None, tmp_path / "zoo", name="published", device="cpu")
    assert added.entry.head_family == family
    assert added.report.steps == 2 and added.report.difficulty is not None
    assert sum(added.report.detections) > 0 and np.isfinite(added.report.difficulty).all()
    assert added.remarks == ()


def test_the_small_one_is_tried_like_any_other(request_: TrainRequest) -> None:
    report = check("yolox", "cpu", request_.zoo_root)
    assert report.steps == 2 and sum(report.detections) > 0
