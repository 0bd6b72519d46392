"""What a detector knows of a class goes over by label, whatever the order and number of classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ppal_backend.detector.config import build_config, find_entry
from ppal_backend.detector.models import build_model
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.weights.checkpoints import save_final
from ppal_backend.detector.weights.initial import InitialWeights, carry_classes, initialiser

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
