"""A small zoo and a trained detector that the tests of this package share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from ppal_backend.detector.infer.inference import PoolImage
from ppal_backend.detector.train.training import TrainRequest, TrainResult, train
from tests.detector.shapes import CLASSES, write_set

REPOSITORY = Path(__file__).resolve().parents[2]


def zoo_entry(name: str, family: str, config: str = "", **schedule: object) -> str:
    """A detector of 64 px for a ``zoo.toml``; of its schedule what is unusual, None for nothing."""
    usual = {"epochs": 20, "min_iterations": 6, "max_iterations": 100, "batch_size": 4, "lr": 0.002}
    numbers = {**usual, "warmup_iterations": 2, "decay": "cosine", **schedule}
    table = {"title": f"{name} for tests", "paper": "none", "config": config or f"{name}.py", "head_family": family}
    lines = [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()), "input_size = [64, 64]"]
    lines += [f"[{name}.schedule]", *(f"{k} = {json.dumps(v)}" for k, v in numbers.items() if v is not None)]
    return "\n".join(lines) + "\n"


ZOO = (
    zoo_entry("small", "anchor")
    + "[small.inference]\nbatch_cpu = 4\nbatch_cuda = 4\n"
    + zoo_entry(  # its learning rate diverges
        "explosive", "anchor", "small.py", epochs=2, min_iterations=30, max_iterations=30, batch_size=2, lr=1e30,
        warmup_iterations=None, decay="constant",
    )
)  # fmt: skip

SMALL = """
_base_ = [{base!r}]
model = dict(backbone=dict(base_channels=8, stem_channels=8),
             neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
             bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models are fastest on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def zoo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with a detector of 64 px input that trains in a second."""
    root = tmp_path_factory.mktemp("zoo")
    (root / "zoo.toml").write_text(ZOO)
    base = REPOSITORY / "model_zoo" / "retinanet_tiny" / "config.py"
    (root / "small.py").write_text(SMALL.format(base=str(base)))
    return root


@pytest.fixture(scope="session")
def train_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of coloured shapes, two of them without objects."""
    return write_set(tmp_path_factory.mktemp("train"), 12, empty_every=6)


@pytest.fixture(scope="session")
def test_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of another seed and shape, ids from 101."""
    return write_set(tmp_path_factory.mktemp("test"), 8, seed=1, size=(120, 80), first_id=101)


@pytest.fixture(scope="session")
def images(test_json: Path) -> list[PoolImage]:
    """Those eight as a pool."""
    return [PoolImage(item["id"], item["file_name"]) for item in json.loads(test_json.read_text())["images"]]


@pytest.fixture(scope="session")
def trained(zoo_root: Path, train_json: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The small detector after 60 steps: not good, but with detections."""
    request = TrainRequest(
        detector="small",
        classes=CLASSES,
        train_json=train_json,
        val_json=None,
        work_dir=tmp_path_factory.mktemp("run") / "train",
        seed=3,
        device="cpu",
        init_weights="random",
        zoo_root=zoo_root,
    )
    return train(request)


@pytest.fixture
def request_(zoo_root: Path, train_json: Path, tmp_path: Path) -> TrainRequest:
    """Six steps of the small detector from random weights."""
    return TrainRequest("small", CLASSES, train_json, None, tmp_path / "work", 3, "cpu", "random", 6, zoo_root=zoo_root)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what is decoded."""
    shapes: list[tuple[int, ...]] = []
    whole = cv2.imdecode

    def imdecode(*arguments: Any) -> Any:
        image = whole(*arguments)
        shapes.append(image.shape[:2])
        return image

    monkeypatch.setattr(cv2, "imdecode", imdecode)
    return shapes
