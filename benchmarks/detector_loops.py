"""Training steps and passes over a pool, ours and plain mmdet's, for measurements on generated images."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper

from ppal_backend.acquisition.difficulty import DifficultyEMA
from ppal_backend.detector.config import build_config
from ppal_backend.detector.data import ImageRecord, TrainingData, build_pipeline, read_coco
from ppal_backend.detector.heads import detection_head
from ppal_backend.detector.heads.base import Restore, override
from ppal_backend.detector.models import build_model
from ppal_backend.detector.recipe import device_optimizer
from ppal_backend.detector.train.hooks import DifficultyHook
from ppal_backend.detector.train.runner import half_precision, in_fastest_layout
from ppal_backend.detector.zoo import ZooEntry, find_entry

CLASSES = ("square", "disc", "bar")
_SIZES = ("scale", "scales", "crop_size", "size", "img_scale")
_COLOURS = ((40, 40, 220), (60, 180, 40), (220, 80, 50))
_BOXES = 8


def write_images(folder: Path, count: int, size: tuple[int, int], seed: int = 0) -> Path:
    """Write JPEG files of coloured boxes on a smooth background, and a COCO file.

    Args:
        folder: Where to.
        count: Number of images.
        size: Width and height in pixels.
        seed: Of the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    width, height = size
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    for image_id in range(1, count + 1):
        coarse = rng.integers(60, 190, (height // 16 + 1, width // 16 + 1, 3)).astype(np.uint8)
        picture = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
        for _ in range(int(rng.integers(1, _BOXES + 1))):
            kind = int(rng.integers(0, len(CLASSES)))
            wide = int(rng.integers(height // 8, height // 3))
            high = wide // 2 if kind == 2 else wide
            x, y = int(rng.integers(0, width - wide)), int(rng.integers(0, height - high))
            picture[y : y + high, x : x + wide] = _COLOURS[kind]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": kind + 1,
                    "bbox": [x, y, wide, high],
                    "area": wide * high,
                    "iscrowd": 0,
                }
            )
        path = folder / f"{image_id}.jpg"
        cv2.imwrite(str(path), picture)
        content["images"].append({"id": image_id, "file_name": str(path), "width": width, "height": height})
    target = folder / "coco.json"
    target.write_text(json.dumps(content), encoding="utf-8")
    return target


def scaled_zoo(name: str, root: Path, factor: float = 1.0, batch_cpu: int | None = None) -> ZooEntry:
    """Write a zoo of one detector whose inputs are ``factor`` times as large, and return its entry."""
    entry = find_entry(name)
    config = build_config(entry, CLASSES, train_images=1, trained_backbone=False).to_dict()
    parts = {key: config[key] for key in ("model", "optim_wrapper")}
    pipelines = {key: _scaled(config[key], factor) for key in ("train_pipeline", "test_pipeline")}
    root.mkdir(parents=True)
    Config({**parts, **pipelines}).dump(str(root / "config.py"))
    sides = [round(side * factor) for side in entry.input_size]
    (root / "zoo.toml").write_text(
        f'["{entry.name}"]\ntitle = "measured"\npaper = "none"\nconfig = "config.py"\n'
        f'head_family = "{entry.head_family}"\ninput_size = {sides}\n'
        f"schedule = {{ epochs = 1, min_iterations = 1, max_iterations = 1000, "
        f"batch_size = {entry.schedule.batch_size}, lr = {entry.schedule.lr} }}\n"
        f"inference = {{ batch_cpu = {batch_cpu or entry.batch_cpu}, batch_cuda = {entry.batch_cuda} }}\n",
        encoding="utf-8",
    )
    return find_entry(entry.name, root)


def _scaled(node: Any, factor: float, inside: bool = False) -> Any:
    if isinstance(node, dict):
        return {key: _scaled(value, factor, key in _SIZES) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_scaled(value, factor, inside) for value in node)
    return round(node * factor) if inside and type(node) is int else node


class Trainer:
    """A detector with random weights and its optimiser, trained step by step; build it inside ``isolated``.

    Args:
        entry: Detector.
        train_json: COCO file.
        device: Where it trains.
        amp: Whether to train in mixed precision, of the kind that a round takes for this detector.
    """

    def __init__(self, entry: ZooEntry, train_json: Path, device: torch.device, amp: bool = False) -> None:
        self.device = device
        self.records: tuple[ImageRecord, ...] = read_coco(train_json, CLASSES)
        self.config = build_config(entry, CLASSES, train_images=len(self.records), trained_backbone=False)
        self.batch_size: int = self.config.train_dataloader.batch_size
        torch.manual_seed(0)
        self.model = build_model(self.config)
        self.model.init_weights()
        self.model = in_fastest_layout(self.model.to(device).train())
        self.half = half_precision(self.model, entry.head_family, device) if amp else None
        optimiser = device_optimizer(self.config.optim_wrapper, device.type, self.half)
        self._optimiser = build_optim_wrapper(self.model, ConfigDict(optimiser))
        self.data = TrainingData(self.records, build_pipeline(self.config.train_pipeline), CLASSES, seed=0)

    def batches(self, count: int) -> list[Any]:
        """Batches that are read once and used again and again."""
        size = self.batch_size
        return [pseudo_collate([self.data[i] for i in range(k * size, (k + 1) * size)]) for k in range(count)]

    def hook(self) -> DifficultyHook:
        """A hook that is not attached."""
        return DifficultyHook(DifficultyEMA(len(CLASSES)))

    def attach(self, hook: DifficultyHook) -> None:
        """Attach a hook to the detector's head, as before a training."""
        hook.before_train(SimpleNamespace(model=self.model))

    def step(self, batch: Any, hook: DifficultyHook | None = None) -> None:
        """One optimiser step."""
        self.model.train_step(batch, optim_wrapper=self._optimiser)
        if hook is not None:
            hook.after_train_iter(None, 0)


@dataclass
class Clock:
    """Seconds spent inside what :func:`own_time` watches."""

    seconds: float = 0.0

    def watch(self, work: Any, sign: int) -> Any:
        """The same callable, whose time is added, or taken off with ``sign`` -1."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds += sign * (time.perf_counter() - started)

        return timed


@contextmanager
def own_time(trainer: Trainer, hook: DifficultyHook) -> Iterator[Clock]:
    """Attach a hook so that the time of its own code is known.

    Every method of the head that the hook wraps is timed outside the wrapper, and taken off again inside it.
    """
    head: Any = detection_head(trainer.model)
    before = set(head.__dict__)
    trainer.attach(hook)
    wrapped = sorted(set(head.__dict__) - before)
    hook.detach()
    clock, undo = Clock(), list[Restore]()
    undo += [override(head, **{name: clock.watch(getattr(head, name), -1)}) for name in wrapped]
    trainer.attach(hook)
    undo += [override(head, **{name: clock.watch(getattr(head, name), 1)}) for name in wrapped]
    undo.append(override(hook, after_train_iter=clock.watch(hook.after_train_iter, 1)))
    try:
        yield clock
    finally:
        undo.pop()()
        for step in reversed(undo[len(wrapped) :]):
            step()
        hook.detach()
        for step in reversed(undo[: len(wrapped)]):
            step()


def synchronised(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def middle(values: Sequence[float]) -> float:
    """The median."""
    return float(np.median(values))
