"""Tiny detectors without weights of their own can learn: they must fit a handful of images almost perfectly."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppal_backend.detector.training import TrainRequest, evaluate, train
from tests.detector.shapes import CLASSES, write_set


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcos_tiny", "ssd_tiny"])
def test_sixteen_images_are_learnt_by_heart(name: str, tmp_path: Path) -> None:
    images = write_set(tmp_path / "images", 16, size=(128, 128))
    request = TrainRequest(
        detector=name,
        classes=CLASSES,
        train_json=images,
        val_json=None,
        work_dir=tmp_path / "train",
        device="cpu",
        init_weights="random",
        max_iterations=250,
    )
    result = train(request)
    metrics = evaluate(name, result.checkpoint, CLASSES, images, "cpu")
    assert metrics.map50 >= 0.8
    assert result.difficulty is not None and max(result.difficulty) < 0.9
