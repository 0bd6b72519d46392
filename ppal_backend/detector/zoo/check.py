"""A short trial of a detector of the zoo: does it build, train, and run over a pool on this machine?"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config

from ppal_backend.detector.config import build_config
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.open_vocabulary import Prompts
from ppal_backend.detector.runtime import pick_device
from ppal_backend.detector.train.training import TrainRequest, train
from ppal_backend.detector.zoo import ZooEntry, find_entry
from ppal_backend.detector.zoo.fetch import weights_target
from ppal_backend.errors import DetectorError, WeightsUnavailable
from ppal_backend.structures.detections import Detections

CLASSES = ("square", "disc", "bar")
_STEPS = 2
_SIDE = 256
_BATCH = 2
_LARGE = 1000  # inputs with a longer side are halved in a trial
_SIZES = ("scale", "scales", "crop_size", "size", "img_scale", "border")
_COLOURS = ((40, 40, 220), (60, 180, 40), (220, 80, 50))  # in OpenCV's order: red, green, blue


@dataclass(frozen=True)
class CheckReport:
    """What a trial of a detector showed.

    Args:
        detector: Name in the zoo.
        device: Where it ran.
        parameters: Number of weights.
        weights: Where its initial weights lie, or why there are none; the trial itself starts from random ones.
        steps: Optimiser steps.
        difficulty: ``[C]`` class difficulties in [0, 1] after those steps, or None when they were not followed.
        detections: Detections in each image of the pool, with the score threshold set to nothing.
        embedding_shape: Shape of all embeddings together, ``[n, d]``; d is 0 for a detector without any.
        probability_shape: Shape of all probability vectors together.
        train_seconds: Time of the training, building included.
        infer_seconds: Time of the inference, loading included.
        memory_mb: Peak memory in MiB: of the GPU, or of the process on a CPU.
    """

    detector: str
    device: str
    parameters: int
    weights: str
    steps: int
    difficulty: tuple[float, ...] | None
    detections: tuple[int, ...]
    embedding_shape: tuple[int, int]
    probability_shape: tuple[int, int]
    train_seconds: float
    infer_seconds: float
    memory_mb: float

    def as_dict(self) -> dict[str, Any]:
        """The report, ready for JSON."""
        return asdict(self)


def check(
    name: str,
    device: str = "auto",
    zoo_root: Path | None = None,
    *,
    images: int = 4,
    difficulty: bool = True,
    full: bool = False,
    weights_dir: Path | None = None,
) -> CheckReport:
    """Build a detector, train it for two steps on generated images, and run it over them as a pool.

    Args:
        name: Its name in the zoo.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        zoo_root: Folder of the zoo; None for the packaged one.
        images: How many images to generate, at least 1.
        difficulty: Whether to follow class difficulty; without it, heads that no family covers can be tried too.
        full: Whether to use the detector's own batch size and input size. Otherwise two images make a batch and
            large inputs are halved, so that the trial takes a minute at most on a CPU.
        weights_dir: Folder for downloaded weights, to tell whether they are there; None for the default one.

    Returns:
        The report. Nothing is left on disk and nothing is downloaded.

    Raises:
        UnknownDetector: The zoo has no such detector.
        UnsupportedHead: No head family covers it.
        DetectorError: It cannot be built or trained, or its results are not finite.
    """
    if images < 1:
        raise ValueError(f"expected at least one image, got {images}")
    entry = find_entry(name, zoo_root)
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.reset_peak_memory_stats(chosen)
    with tempfile.TemporaryDirectory(prefix="ppal-check-") as folder:
        train_json, pool = _write_images(Path(folder) / "images", images)
        trial_root = zoo_root if full else _trial_zoo(entry, Path(folder) / "zoo", images, weights_dir)
        started = time.monotonic()
        result = train(
            TrainRequest(
                detector=entry.name,
                classes=CLASSES,
                train_json=train_json,
                val_json=None,
                work_dir=Path(folder) / "train",
                device=str(chosen),
                init_weights="random",
                max_iterations=_STEPS,
                difficulty=difficulty,
                zoo_root=trial_root,
                workers=0,
                unlabelled=tuple(image.path for image in pool),
            )
        )
        trained = time.monotonic()
        engine = PoolInference(entry.name, result.checkpoint, CLASSES, str(chosen), trial_root)
        _accept_every_score(engine.model)
        found = list(engine.run(pool))
        inferred = time.monotonic()
    _require_finite(name, found)
    return CheckReport(
        detector=entry.name,
        device=str(chosen),
        parameters=sum(item.numel() for item in engine.model.parameters()),
        weights=_weights_remark(entry, weights_dir),
        steps=result.iterations,
        difficulty=result.difficulty,
        detections=tuple(len(item) for item in found),
        embedding_shape=_joint_shape([item.embeddings for item in found]),
        probability_shape=_joint_shape([item.class_probs for item in found]),
        train_seconds=trained - started,
        infer_seconds=inferred - trained,
        memory_mb=_peak_memory(chosen),
    )


def _trial_zoo(entry: ZooEntry, root: Path, images: int, weights_dir: Path | None) -> Path:
    """A zoo of one entry: the given one with small batches and, where its inputs are large, smaller ones."""
    prompts = Prompts.of(entry, CLASSES, {}, weights_dir)
    config = build_config(entry, CLASSES, train_images=images, trained_backbone=False, prompts=prompts)
    factor = 0.5 if max(entry.input_size) > _LARGE else 1.0
    parts = config.to_dict()
    kept = {key: parts[key] for key in ("model", "optim_wrapper", "unlabelled_ratio", "max_epochs") if key in parts}
    if "custom_hooks" in parts:
        kept["custom_hooks"] = _resized(parts["custom_hooks"], factor)
    pipelines = {key: _resized(value, factor) for key, value in parts.items() if key.endswith("_pipeline")}
    root.mkdir()
    Config({**kept, **pipelines}).dump(str(root / "config.py"))
    batch = min(entry.schedule.batch_size, _BATCH)
    sides = [max(32, int(side * factor)) for side in entry.input_size]
    (root / "zoo.toml").write_text(
        f'["{entry.name}"]\ntitle = "a trial"\npaper = "none"\nconfig = "config.py"\n'
        f'head_family = "{entry.head_family}"\ninput_size = {sides}\n'
        f"schedule = {{ epochs = 1, min_iterations = {_STEPS}, max_iterations = {_STEPS}, "
        f"batch_size = {batch}, lr = {entry.schedule.lr} }}\n"
        f"inference = {{ batch_cpu = {min(entry.batch_cpu, _BATCH)}, batch_cuda = {min(entry.batch_cuda, _BATCH)} }}\n",
        encoding="utf-8",
    )
    return root


def _resized(node: Any, factor: float, inside: bool = False) -> Any:
    """A copy of a pipeline whose sizes in pixels are multiplied by ``factor``."""
    if isinstance(node, dict):
        return {key: _resized(value, factor, key in _SIZES) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_resized(value, factor, inside) for value in node)
    return round(node * factor) if inside and type(node) is int else node


def _accept_every_score(model: Any) -> None:
    """After two steps hardly any score passes a threshold, and a trial without detections would show little."""
    for owner in (getattr(model, "bbox_head", None), getattr(model, "roi_head", None)):
        config = getattr(owner, "test_cfg", None)
        if config is not None and "score_thr" in config:
            config.score_thr = 0.0


def _require_finite(name: str, found: Sequence[Detections]) -> None:
    if not sum(len(item) for item in found):
        raise DetectorError(f"expected detections from {name} with no score threshold, got none; check its test_cfg")
    for item in found:
        if not np.isfinite(np.asarray(item.embeddings)).all():
            raise DetectorError(f"expected finite embeddings from {name}, got others; check its neck")


def _joint_shape(parts: Sequence[Any]) -> tuple[int, int]:
    joined = np.concatenate([np.asarray(part) for part in parts])
    return int(joined.shape[0]), int(joined.shape[1])


def _weights_remark(entry: ZooEntry, weights_dir: Path | None) -> str:
    try:
        target = weights_target(entry, weights_dir)
    except WeightsUnavailable:
        return "none: it trains from scratch" if entry.from_scratch else "none in the zoo"
    return f"{target}" if target.is_file() else f"to be fetched into {target}"


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _write_images(folder: Path, count: int) -> tuple[Path, list[PoolImage]]:
    """Grey noise with a square, a disc and a bar in each image, and a COCO file that tells where."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    described: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        picture = rng.integers(100, 150, (_SIDE, _SIDE, 3), dtype=np.uint8)
        for kind in range(len(CLASSES)):
            box = _draw(picture, kind, rng)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": kind + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        path = folder / f"{image_id}.png"
        cv2.imwrite(str(path), picture)
        described.append({"id": image_id, "file_name": str(path), "width": _SIDE, "height": _SIDE})
    target = folder / "coco.json"
    categories = [{"id": i + 1, "name": label} for i, label in enumerate(CLASSES)]
    content = {"images": described, "annotations": annotations, "categories": categories}
    target.write_text(json.dumps(content), encoding="utf-8")
    return target, [PoolImage(item["id"], item["file_name"]) for item in described]


def _draw(picture: np.ndarray, kind: int, rng: np.random.Generator) -> list[int]:
    """Draw a shape in a third of the picture of its own, so that none hides another; its x, y, width, height."""
    third = _SIDE // 3
    width = int(rng.integers(third // 2, third))
    height = width // 2 if CLASSES[kind] == "bar" else width
    x, y = third * kind + int(rng.integers(0, third - width + 1)), int(rng.integers(0, _SIDE - height))
    if CLASSES[kind] == "disc":
        centre, radius = (x + width // 2, y + width // 2), width // 2
        cv2.circle(picture, centre, radius, _COLOURS[kind], -1)
    else:
        cv2.rectangle(picture, (x, y), (x + width - 1, y + height - 1), _COLOURS[kind], -1)
    return [x, y, width, height]
