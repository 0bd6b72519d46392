"""A detector before its first training: the zoo's weights, when they are at hand and a look is affordable."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.weights import load_checkpoint
from ppal_backend.detector.weights.initial import save_untrained
from ppal_backend.detector.zoo import find_entry
from ppal_backend.errors import UnknownDetector, WeightsUnavailable
from tests.detector.shapes import CLASSES, write_set


def test_it_holds_the_initial_weights_and_describes_images(tmp_path: Path) -> None:
    path = tmp_path / "model" / "untrained.pth"
    assert save_untrained("retinanet_tiny", CLASSES, path, "cpu")
    entry = find_entry("retinanet_tiny")
    assert entry.weights is not None and entry.weights.path is not None
    initial = load_checkpoint(entry.weights.path)["state_dict"]
    stored = load_checkpoint(path)["state_dict"]
    backbone = [name for name in initial if name.startswith("backbone.") and name.endswith(".weight")]
    assert len(backbone) > 10 and all(torch.equal(stored[name], initial[name].float()) for name in backbone)
    assert stored["bbox_head.retina_cls.bias"].max() < -4, "the prior of the loss, as in a training"
    write_set(tmp_path / "set", 3, 0)
    pictures = sorted((tmp_path / "set").rglob("*.png"))
    pool = [PoolImage(k, picture) for k, picture in enumerate(pictures)]
    found = list(PoolInference("retinanet_tiny", path, CLASSES, "cpu").run_with_features(pool))
    features = np.stack([result.features["global"] for result in found])
    assert np.isfinite(features).all() and np.abs(features[0] - features[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["retinanet_r50_fpn", "fcos_tiny"])
def test_nothing_is_downloaded_or_made_up(name: str, tmp_path: Path) -> None:
    assert not save_untrained(name, CLASSES, tmp_path / "untrained.pth", "cpu", weights_dir=tmp_path)
    assert not (tmp_path / "untrained.pth").exists()


def test_a_detector_for_gpus_does_not_look_at_a_pool_on_a_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = find_entry("retinanet_r50_fpn").weights
    assert weights is not None
    (tmp_path / weights.file_name).write_bytes(b"never read")
    with caplog.at_level("INFO"):
        assert not save_untrained("retinanet_r50_fpn", CLASSES, tmp_path / "u.pth", "cpu", weights_dir=tmp_path)
    assert "too slow on a CPU" in caplog.text


def test_unknown_detectors_and_damaged_weights_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownDetector):
        save_untrained("nonsense", CLASSES, tmp_path / "u.pth")
    weights = find_entry("retinanet_r50_fpn").weights
    assert weights is not None
    (tmp_path / weights.file_name).write_bytes(b"damaged")
    monkeypatch.setattr("ppal_backend.detector.weights.initial.pick_device", lambda device: torch.device("cuda"))
    with pytest.raises(WeightsUnavailable, match="sha256"):
        save_untrained("retinanet_r50_fpn", CLASSES, tmp_path / "u.pth", weights_dir=tmp_path)
