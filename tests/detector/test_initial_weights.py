"""What a detector knows of a class goes over by label, whatever the order and number of classes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from ppal_backend.detector.config import build_config, find_entry
from ppal_backend.detector.data import build_pipeline, data_info, read_coco, run_pipeline
from ppal_backend.detector.models import build_model
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.weights import has_folded_statistics, save_final
from ppal_backend.detector.weights.initial import InitialWeights, carry_classes, initialiser, measure_statistics
from tests.detector.shapes import CLASSES, write_set

OLD = ("cat", "dog", "cow")
NEW = ("bird", "cow", "cat", "fish")


def carried_row(name: str, old_rows: int, new_rows: int, wider_rows: int) -> list[float]:
    """Row numbers of the old tensor in the new one; -1 where it stays fresh."""
    source, fresh = torch.arange(float(old_rows)), torch.full((new_rows,), -1.0)
    wider = {name: torch.Size([wider_rows])}
    return carry_classes({name: source}, OLD, NEW, {name: fresh}, wider)[name].tolist()


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("bbox_head.conv_cls.bias", (3, 4, 5), [-1, 2, 0, -1]),
        ("bbox_head.retina_cls.bias", (6, 8, 10), [-1, 2, 0, -1, -1, 5, 3, -1]),
        ("roi_head.bbox_head.fc_cls.bias", (4, 5, 6), [-1, 2, 0, -1, 3]),
        ("bbox_head.cls_convs.0.0.bias", (8, 10, 12), [-1, 2, 0, -1, 3, -1, 6, 4, -1, 7]),
        ("roi_head.bbox_head.fc_reg.bias", (12, 16, 20), [-1] * 4 + [8, 9, 10, 11, 0, 1, 2, 3] + [-1] * 4),
        ("bbox_head.odd_cls.bias", (7, 8, 10), [-1] * 8),
    ],
)
def test_rows_go_over_by_label(name: str, rows: tuple[int, int, int], expected: list[float]) -> None:
    assert carried_row(name, *rows) == expected


@pytest.mark.parametrize("detector", ["retinanet_tiny", "ssd_tiny", "fcos_tiny"])
def test_known_classes_score_as_before(detector: str, tmp_path: Path) -> None:
    """Logits of real heads, not only their rows."""
    path = tmp_path / "old.pth"
    with isolated("test-warm-start"):
        torch.manual_seed(0)
        old = build_model(build_config(find_entry(detector), OLD))
        for parameter in old.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        save_final(path, old.state_dict(), {"detector": detector, "classes": list(OLD)})
        config = build_config(find_entry(detector), NEW)
        new = build_model(config)
        initialiser(InitialWeights(path, "detector"), config, NEW)(new)
        old.eval(), new.eval()
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            before, after = (model.bbox_head(model.extract_feat(image))[0] for model in (old, new))
    background = detector == "ssd_tiny"
    for one, other in zip(before, after, strict=True):
        height, width = one.shape[-2:]
        was = one.reshape(-1, len(OLD) + background, height, width)
        now = other.reshape(-1, len(NEW) + background, height, width)
        for label in ("cow", "cat"):
            assert torch.allclose(now[:, NEW.index(label)], was[:, OLD.index(label)], atol=1e-5)
        assert not torch.allclose(now[:, NEW.index("fish")], was[:, OLD.index("dog")], atol=1e-3)
        if background:
            assert torch.allclose(now[:, -1], was[:, -1], atol=1e-5)


def test_the_same_classes_take_every_weight(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    with isolated("test-warm-start"):
        config = build_config(find_entry("retinanet_tiny"), OLD)
        old, new = build_model(config), build_model(config)
        save_final(path, old.state_dict(), {"detector": "retinanet_tiny", "classes": list(OLD)})
        initialiser(InitialWeights(path, "detector"), config, OLD)(new)
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())


def folded(model: torch.nn.Module) -> None:
    """Fold every batch norm into the convolution before it, as an export for speed does."""
    layers = list(model.modules())
    pairs = [(block.conv, block.bn) for block in layers if hasattr(block, "bn")]
    assert len(pairs) == sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in layers) > 10
    for conv, norm in pairs:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        conv.weight.mul_(scale[:, None, None, None])
        norm.bias.sub_(scale * norm.running_mean)
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
        norm.weight.fill_(1)


def yolox() -> Any:
    """mmdetection's own YOLOX: every convolution has a batch norm."""
    file = Path(mmdet.__file__).parent / ".mim" / "configs" / "yolox" / "yolox_tiny_8xb8-300e_coco.py"
    model = Config.fromfile(str(file)).model
    model.backbone.widen_factor = 0.125
    model.neck.update(in_channels=[32, 64, 128], out_channels=32)
    model.bbox_head.update(in_channels=32, feat_channels=32, num_classes=3)
    model.data_preprocessor.pop("batch_augments")
    return Config({"model": model, "test_pipeline": build_config(find_entry("yolox_toy"), OLD).test_pipeline})


def statistics(model: torch.nn.Module, images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the head with the statistics of the checkpoint, and with those of the batch."""
    outs = []
    with torch.no_grad():
        for mode in (False, True):
            copied = deepcopy(model).train(mode)
            outs.append(torch.cat([level.flatten(1) for level in copied(torch.cat(images), mode="tensor")[0]], 1))
    return outs[0], outs[1]


def test_folded_batch_norms_are_measured_again(tmp_path: Path) -> None:
    """Trained on blindly, such a detector starts from noise: the batch's statistics are nothing like 0 and 1."""
    records = read_coco(write_set(tmp_path / "images", 6), CLASSES)
    with isolated("test-folded"):
        torch.manual_seed(0)
        config = yolox()
        model = build_model(config)
        model.init_weights()
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, torch.nn.BatchNorm2d):
                    layer.bias.uniform_(-0.5, 0.5)
        measure_statistics(model, config.test_pipeline, records)  # a detector whose statistics fit these images
        pipeline = build_pipeline(config.test_pipeline)
        packed = [run_pipeline(pipeline, data_info(record)) for record in records]
        images = [model.data_preprocessor(pseudo_collate([item]), False)["inputs"] for item in packed]
        plain, _ = statistics(model, images)
        with torch.no_grad():
            folded(model)
        as_they_come, blindly = statistics(model, images)
        save = tmp_path / "folded.pth"
        torch.save(model.state_dict(), save)
        fresh, unmeasured = build_model(config), build_model(config)
        initialiser(InitialWeights(save, "detector"), config, CLASSES, records)(fresh)
        initialiser(InitialWeights(save, "detector"), config, CLASSES)(unmeasured)
        measured, in_training = statistics(fresh, images)
    assert torch.allclose(plain, as_they_come, atol=1e-3)
    assert torch.allclose(measured, plain, atol=1e-3)
    assert float((in_training - plain).std()) < 0.2 * float((blindly - plain).std())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in unmeasured.state_dict().items())
    assert fresh.training and not has_folded_statistics(fresh.state_dict())


def test_random_weights_are_not_taken_for_folded_ones() -> None:
    with isolated("test-folded"):
        tensors = build_model(yolox()).state_dict()
    assert not has_folded_statistics(tensors)
    name = next(name for name in tensors if name.endswith("bn.bias"))
    assert has_folded_statistics({**tensors, name: tensors[name] + 0.1})
    assert not has_folded_statistics({name: value for name, value in tensors.items() if "bn" not in name})
