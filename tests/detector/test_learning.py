"""Every family of detectors can learn: its smallest entry must fit a handful of scenes, from random weights."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ppal_backend.detector.train.training import TrainRequest, evaluate, train
from ppal_backend.detector.zoo import load_zoo
from ppal_backend.synthetic.scenes import generate

STEPS = {
    "retinanet_tiny": 250,
    "atss_tiny": 250,
    "gfl_tiny": 250,
    "ddod_tiny": 250,
    "fcos_tiny": 250,
    "ssd_tiny": 250,
    "faster_rcnn_tiny": 250,
    "rtmdet_toy": 250,
    "yolox_toy": 250,
    "dino_tiny": 300,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen scenes of the demo data as a COCO file with absolute paths."""
    source = generate(tmp_path_factory.mktemp("scenes"), 16)
    content = json.loads(source.read_text(encoding="utf-8"))
    for image in content["images"]:
        image["file_name"] = str(source.parent / "images" / image["file_name"])
    target = source.parent / "absolute.json"
    target.write_text(json.dumps(content), encoding="utf-8")
    return target


def test_every_family_of_the_zoo_has_to_learn() -> None:
    zoo = load_zoo()
    learning = [
        entry for entry in zoo.values() if entry.vocabulary is None
    ]  # others need a text encoder that has learned
    assert {zoo[name].head_family for name in STEPS} == {entry.head_family for entry in learning}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), STEPS.items())
def test_sixteen_scenes_are_learnt_by_heart(
    name: str, steps: int, scenes: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    content = json.loads(scenes.read_text(encoding="utf-8"))
    classes = tuple(item["name"] for item in content["categories"])
    seen = {item["category_id"] - 1 for item in content["annotations"]}
    request = TrainRequest(
        name, classes, scenes, None, tmp_path / "train", device="cpu", init_weights="random", max_iterations=steps
    )
    started = time.process_time()
    result = train(request)
    seconds = time.process_time() - started
    metrics = evaluate(name, result.checkpoint, classes, scenes, "cpu")
    weights = torch.load(result.checkpoint, weights_only=True)["state_dict"]
    record_property("AP50", metrics.map50)
    record_property("seconds", seconds)
    record_property("parameters", sum(item.numel() for item in weights.values()))
    assert metrics.map50 is not None and metrics.map50 >= 0.8
    assert result.difficulty is not None
    for index, value in enumerate(result.difficulty):
        assert value < 0.9 if index in seen else value == 1.0
