"""How a detector lies in memory while it trains."""

import pytest
import torch

from ppal_backend.detector.config import build_config
from ppal_backend.detector.models import build_model
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.train.runner import in_fastest_layout
from ppal_backend.detector.zoo import find_entry
from tests.detector.shapes import CLASSES


def detector(name: str) -> torch.nn.Module:
    with isolated("ppal-layout"):
        torch.manual_seed(0)
        model: torch.nn.Module = build_model(build_config(find_entry(name), CLASSES))
        return model


@pytest.mark.parametrize(
    ("name", "last"), [("retinanet_tiny", True), ("faster_rcnn_tiny", False), ("dino_tiny", False)]
)
def test_channels_are_last_where_all_operators_take_that(name: str, last: bool) -> None:
    weight = in_fastest_layout(detector(name)).backbone.layer1[0].conv1.weight  # type: ignore[union-attr,index]
    assert weight.is_contiguous(memory_format=torch.channels_last) == last


def test_swish_is_torchs_own() -> None:
    model = detector("yolox_toy")
    before = {type(m).__name__ for m in model.modules()}
    after = {type(m).__name__ for m in in_fastest_layout(model).modules()}
    assert "Swish" in before and "SiLU" not in before and after == before - {"Swish"} | {"SiLU"}


def test_regions_are_cut_from_maps_as_they_are() -> None:
    """mmcv's RoIAlign reads channels-last maps as if they were not, without a word."""
    model = in_fastest_layout(detector("faster_rcnn_tiny")).eval()
    regions = torch.tensor([[0, 8.0, 8.0, 60.0, 50.0], [1, 20.0, 30.0, 90.0, 100.0]])
    with torch.no_grad():
        maps = model.extract_feat(torch.randn(2, 3, 128, 128))  # type: ignore[operator]
        extract = model.roi_head.bbox_roi_extractor  # type: ignore[union-attr]
        count = extract.num_inputs  # type: ignore[union-attr]
        cut = extract(maps[:count], regions)  # type: ignore[operator]
        wanted = extract([level.contiguous() for level in maps[:count]], regions)  # type: ignore[operator]
    assert cut.abs().max() > 1e-3
    torch.testing.assert_close(cut, wanted)
