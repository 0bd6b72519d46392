from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from ppal_backend.detector.config import (
    build_config,
    find_entry,
    read_config,
    schedulers,
    set_class_count,
    strip_pretrained,
    unfreeze,
)
from ppal_backend.detector.models import build_model
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.zoo import Schedule, ZooEntry
from ppal_backend.errors import DetectorError
from tests.detector.families import FILES, shrunk, ssd


def test_class_count_reaches_every_head_but_proposals() -> None:
    model = {
        "rpn_head": {"type": "RPNHead", "num_classes": 1},
        "roi_head": {"bbox_head": [{"type": "A", "num_classes": 80}, {"type": "B", "num_classes": 80}]},
        "bbox_head": {"type": "RetinaHead", "num_classes": 80},
    }
    set_class_count(model, 3)
    assert model["rpn_head"]["num_classes"] == 1
    assert [head["num_classes"] for head in model["roi_head"]["bbox_head"]] == [3, 3]
    assert model["bbox_head"]["num_classes"] == 3


def test_instructions_to_fetch_weights_are_removed_wherever_they_stand() -> None:
    model = {
        "pretrained": "torchvision://resnet50",
        "backbone": {"init_cfg": {"type": "Pretrained", "checkpoint": "x"}},
        "neck": {"init_cfg": [{"type": "Kaiming"}, {"type": "Pretrained", "checkpoint": "y"}]},
        "bbox_head": {"init_cfg": {"type": "Normal"}},
    }
    strip_pretrained(model)
    assert model == {
        "backbone": {},
        "neck": {"init_cfg": [{"type": "Kaiming"}]},
        "bbox_head": {"init_cfg": {"type": "Normal"}},
    }


def test_frozen_parts_are_freed_only_for_random_starts() -> None:
    entry = find_entry("retinanet_r50_fpn")
    with_weights = build_config(entry, ("a",)).model.backbone
    assert (with_weights.frozen_stages, with_weights.norm_eval) == (1, True)
    without = build_config(entry, ("a",), trained_backbone=False).model.backbone
    assert (without.norm_eval, without.norm_cfg.requires_grad) == (False, True)
    assert "init_cfg" not in with_weights and "init_cfg" not in without
    node = {"backbone": [{"frozen_stages": 2, "norm_cfg": {"type": "BN", "requires_grad": False}}]}
    unfreeze(node)
    assert node == {"backbone": [{"norm_cfg": {"type": "BN", "requires_grad": True}}]}


@pytest.mark.parametrize(
    "backbone",
    [
        {"type": "ResNet", "depth": 18, "base_channels": 8, "frozen_stages": 1, "norm_eval": True,
         "norm_cfg": {"type": "BN", "requires_grad": False}},
        {"type": "MobileNetV2", "widen_factor": 0.25, "frozen_stages": 2},
        {"type": "EfficientNet", "arch": "b0", "frozen_stages": 1, "norm_eval": True},
        {"type": "CSPDarknet", "widen_factor": 0.125, "frozen_stages": 2},
        {"type": "Darknet", "depth": 53, "frozen_stages": 2, "norm_eval": True},
        {"type": "SwinTransformer", "embed_dims": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1),
         "frozen_stages": 1},
    ],
    ids=lambda backbone: str(backbone["type"]),
)  # fmt: skip
def test_every_backbone_trains_whole_from_a_random_start(backbone: dict[str, Any]) -> None:
    """Whether 0 or -1 stands for no frozen stage differs between them."""
    with isolated("test-freed"):
        frozen = MODELS.build(copy.deepcopy(backbone))
        frozen.train()
        assert not all(parameter.requires_grad for parameter in frozen.parameters())
        unfreeze(backbone)
        free = MODELS.build(backbone)
        free.train()
    assert all(parameter.requires_grad for parameter in free.parameters())
    norms = [layer for layer in free.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert all(layer.training for layer in norms)


def test_r50_is_the_papers_recipe() -> None:
    entry = find_entry("retinanet_r50_fpn")
    config = build_config(entry, ("a", "b"), train_images=1000)
    assert config.model.bbox_head.num_classes == 2
    assert config.train_cfg.max_iters == 26 * 1000 // 2
    assert config.train_dataloader.batch_size == 2
    assert config.optim_wrapper.optimizer.lr == entry.schedule.lr
    step = config.param_scheduler[-1]
    assert (step["type"], step["milestones"], step["gamma"]) == ("MultiStepLR", [10000], 0.1)
    assert config.filter_cfg.filter_empty_gt is False


def test_warm_up_never_takes_more_than_a_fifth() -> None:
    schedule = Schedule(26, 300, 900, 16, 0.002, warmup_iterations=50, decay="cosine")
    warm, cosine = schedulers(schedule, 20)
    assert (warm["begin"], warm["end"]) == (0, 4)
    assert (cosine["begin"], cosine["end"], cosine["T_max"]) == (4, 20, 16)
    assert [part["type"] for part in schedulers(schedule, 1)] == ["CosineAnnealingLR"]
    assert schedulers(Schedule(1, 1, 1, 1, 0.1, decay="constant"), 10) == []


@pytest.mark.parametrize("classes", [(), ("a", "a")])
def test_classes_must_be_there_and_differ(classes: tuple[str, ...]) -> None:
    with pytest.raises(DetectorError, match="class"):
        build_config(find_entry("retinanet_tiny"), classes)


def test_no_training_images_is_an_error() -> None:
    with pytest.raises(DetectorError, match="at least one training image"):
        build_config(find_entry("retinanet_tiny"), ("a",), train_images=0)


def test_an_operators_own_config_is_read_from_its_data_loaders(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    base = find_entry("retinanet_tiny").config
    own.write_text(
        f"_base_ = [{str(base)!r}]\n"
        "train_pipeline = None\n"
        "train_dataloader = dict(dataset=dict(type='RepeatDataset', dataset=dict(pipeline=[dict(type='Mine')])))\n"
    )
    from dataclasses import replace

    config = build_config(replace(find_entry("retinanet_tiny"), config=own), ("a",))
    assert config.train_pipeline == [{"type": "Mine"}]
    own.write_text("model = dict(type='RetinaNet')\n")
    with pytest.raises(DetectorError, match="train_pipeline"):
        build_config(replace(find_entry("retinanet_tiny"), config=own), ("a",))


def test_tiny_has_under_a_million_parameters_and_builds() -> None:
    with isolated("test-build"):
        model = build_model(build_config(find_entry("retinanet_tiny"), tuple("abcdef")))
    assert 700_000 < sum(item.numel() for item in model.parameters()) < 1_000_000
    assert model.bbox_head.retina_cls.out_channels == 2 * 6


def test_what_mmdetection_cannot_build_is_a_detector_error() -> None:
    config = build_config(find_entry("retinanet_tiny"), ("a",))
    config.model.bbox_head.type = "NoSuchHead"
    with isolated("test-build"), pytest.raises(DetectorError, match="NoSuchHead"):
        build_model(config)


def test_what_a_package_is_missing_for_is_a_detector_error() -> None:
    """mmdetection's wrapper of Detectron2 asks for it when it is built."""
    config = build_config(find_entry("retinanet_tiny"), ("a",))
    config.model = {"type": "Detectron2Wrapper", "detector": {"META_ARCHITECTURE": "RetinaNet"}}
    with isolated("test-build"), pytest.raises(DetectorError, match="install Detectron2"):
        build_model(config)


@pytest.mark.parametrize("name", FILES)
def test_a_detector_writes_nothing_into_the_config_it_is_built_of(name: str) -> None:
    """DETR's head puts a tensor of class weights into its loss, and the config of a training is kept as JSON."""
    model = ssd() if name == "ssd" else shrunk(name)
    config = Config({"model": model})
    before = config.to_dict()
    with isolated("test-build"):
        build_model(config)
    assert json.dumps(config.to_dict()) == json.dumps(before)


def own_entry(tmp_path: Path, text: str) -> ZooEntry:
    (tmp_path / "own.py").write_text(text)
    return dataclasses.replace(find_entry("retinanet_tiny"), config=tmp_path / "own.py")


@pytest.mark.parametrize(
    "text", ["x = undefined", "__import__('no_such_package')", "1 / 0", "raise RuntimeError('no')"]
)
def test_a_config_file_that_fails_is_a_detector_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(DetectorError, match=r"own\.py, which cannot be read"):
        build_config(own_entry(tmp_path, text), ("a",))


def test_what_a_config_file_prints_is_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a command with --json, standard output is one document."""
    read_config(own_entry(tmp_path, "print('hello')\nroot = '{{$HOME:/tmp}}'\n").config)
    told = capsys.readouterr()
    assert told.out == "" and "hello" in told.err


@pytest.mark.parametrize(
    "text", ["custom_hooks = ['EMAHook']", "custom_hooks = [dict(type='PipelineSwitchHook')]", "test_pipeline = ['a']"]
)
def test_values_that_no_config_of_mmdetection_has_are_told(text: str, tmp_path: Path) -> None:
    base = find_entry("retinanet_tiny").config
    with pytest.raises(DetectorError, match=r"expected values as mmdetection's own.*own\.py"):
        build_config(own_entry(tmp_path, f"_base_ = [{str(base)!r}]\n{text}\n"), ("a",), train_images=4)


@pytest.mark.parametrize("images", [None, 4])
@pytest.mark.parametrize("key", ["teacher_ckpt", "teacher_config"])
def test_a_detector_that_learns_from_a_trained_teacher_is_refused(key: str, images: int | None, tmp_path: Path) -> None:
    """mmengine would fetch the teacher's weights while it builds, and unpickle whatever they hold."""
    base = find_entry("retinanet_tiny").config
    entry = own_entry(tmp_path, f"_base_ = [{str(base)!r}]\nmodel = dict({key}='http://127.0.0.1:9/teacher.pth')\n")
    with pytest.raises(DetectorError, match=f"{key}.*without distillation"):
        build_config(entry, ("a",), train_images=images)


def test_norms_learn_from_a_random_start_where_the_config_says_nothing(tmp_path: Path) -> None:
    """ResNet's own default keeps the statistics that it has, which would be 0 and 1 for ever."""
    backbone = "dict(_delete_=True, type='ResNet', depth=18, base_channels=16, stem_channels=16)"
    base = find_entry("retinanet_tiny").config
    entry = own_entry(tmp_path, f"_base_ = [{str(base)!r}]\nmodel = dict(backbone={backbone})\n")
    with isolated("test-norms"):
        for trained in (True, False):
            model = build_model(build_config(entry, ("a",), train_images=4, trained_backbone=trained))
            model.train()
            norms = [layer for layer in model.backbone.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
            assert len(norms) == 20 and {layer.training for layer in norms} == {not trained}
