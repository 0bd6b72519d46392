"""Training, pool inference, CCMS and a whole round on a GPU, beside plain mmdet on the same machine.

    python -m benchmarks.gpu [--json] [--out FILE] [--device cpu] [--quick] [--detectors NAME …]

Generated JPEG images of 640 x 480, random weights, the zoo's own input and batch sizes, full and mixed precision.
Training: steps of the zoo's batch from a data loader with workers; ours with our data stream and the difficulty hook,
plain with mmdet's ``CocoDataset`` and no hook. Pool: ours is the one pass with image features; plain is ``test_step``
on mmdet's ``CocoDataset`` through a data loader. Score thresholds are 0, so that every image has its detections. Each
is measured twice, ours between the two of plain mmdet. ``--quick`` takes sizes of seconds and leaves out the round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import DATASETS
from mmengine.dataset import InfiniteSampler, pseudo_collate
from torch.utils.data import DataLoader

from benchmarks.acquisition import synthetic_pool
from benchmarks.detector import engine_of
from benchmarks.detector_loops import CLASSES, Trainer, scaled_zoo, synchronised, write_images
from ppal_backend.acquisition.ccms import similarity_matrix
from ppal_backend.detector.data import StreamSampler
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.infer.prediction import mixed_precision
from ppal_backend.detector.runtime import isolated, pick_device, quiet_stdout
from ppal_backend.detector.train.hooks import DifficultyHook
from ppal_backend.errors import DetectorError, PPALError

DETECTORS = ("retinanet_r50_fpn", "faster_rcnn_r50", "fcos_r50", "rtmdet_s")
_MIB = float(1 << 20)
_PLAIN_BETWEEN = ("plain", "ours", "ours", "plain")


@dataclass(frozen=True)
class Size:
    """How much is measured: inputs against the zoo's, pictures, pool, steps, images of CCMS, preset of the round."""

    factor: float
    picture: tuple[int, int]
    pool: int
    steps: int
    warm_up: int
    ccms: int
    preset: str | None


FULL = Size(1.0, (640, 480), 128, 20, 5, 9_460, "emoji-tiny")
QUICK = Size(0.2, (160, 120), 8, 1, 1, 200, None)


def require(device: torch.device) -> None:
    """Check that a measurement on the device can work, before anything long begins.

    Raises:
        DetectorError: mmcv's operators were compiled without CUDA.
    """
    from mmcv.ops import get_compiling_cuda_version

    if device.type == "cuda" and get_compiling_cuda_version() == "not available":
        raise DetectorError(
            "expected mmcv with CUDA operators, got one compiled without; run make gpu-check, which compiles it again"
        )


def rates(work: dict[str, Callable[[], int]], device: torch.device) -> dict[str, float | None]:
    """Images a second of ``ours`` and ``plain``, their ratio in time, and the peak memory of each on the GPU."""
    seconds, images = dict.fromkeys(work, 0.0), dict.fromkeys(work, 0)
    figures: dict[str, float | None] = {}
    for name in _PLAIN_BETWEEN:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = synchronised(device)
        images[name] += work[name]()
        seconds[name] += synchronised(device) - started
        peak = torch.cuda.max_memory_allocated(device) / _MIB if device.type == "cuda" else None
        figures[f"{name}_mib"] = peak
    for name in work:
        figures[f"{name}_per_s"] = images[name] / seconds[name]
    figures["time_ratio"] = (seconds["ours"] / images["ours"]) / (seconds["plain"] / images["plain"])
    return figures


def mmdet_data(train_json: Path, pipeline: Sequence[dict[str, Any]], test: bool) -> Any:
    """mmdet's own data set on the same images; call it inside ``isolated``."""
    with quiet_stdout():
        return DATASETS.build(
            {
                "type": "CocoDataset",
                "ann_file": str(train_json),
                "data_prefix": {"img": ""},
                "metainfo": {"classes": CLASSES},
                "pipeline": [dict(step) for step in pipeline],
                "test_mode": test,
                "filter_cfg": {"filter_empty_gt": False},
            }
        )


def measure_training(trainer: Trainer, train_json: Path, workers: int, size: Size) -> dict[str, float | None]:
    """Training with our data and hook, and with mmdet's data and no hook."""
    options: dict[str, Any] = {
        "batch_size": trainer.batch_size,
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "collate_fn": pseudo_collate,
    }
    theirs = mmdet_data(train_json, trainer.config.train_pipeline, test=False)
    loaders = {
        "ours": DataLoader(trainer.data, sampler=StreamSampler(len(trainer.data)), **options),
        "plain": DataLoader(theirs, sampler=InfiniteSampler(theirs, seed=0), **options),
    }
    batches = {name: iter(loader) for name, loader in loaders.items()}
    hook = trainer.hook()

    def steps(name: str, count: int) -> int:
        attached: DifficultyHook | None = hook if name == "ours" else None
        if attached is not None:
            trainer.attach(attached)
        for _ in range(count):
            trainer.step(next(batches[name]), attached)
        hook.detach()
        return count * trainer.batch_size

    for name in batches:
        steps(name, size.warm_up)
    return rates({name: lambda name=name: steps(name, size.steps) for name in batches}, trainer.device)  # type: ignore[misc]


def measure_pool(
    engine: PoolInference, images: Sequence[PoolImage], train_json: Path, workers: int, amp: bool
) -> dict[str, float | None]:
    """One pass over the pool, and mmdet's test on it."""
    loaded = engine.loaded
    batch = loaded.entry.batch_cuda if loaded.device.type == "cuda" else loaded.entry.batch_cpu
    data = mmdet_data(train_json, loaded.config.test_pipeline, test=True)
    loader: Iterable[Any] = DataLoader(data, batch, num_workers=workers, collate_fn=pseudo_collate)

    def plain() -> int:
        count = 0
        for packed in loader:
            with torch.no_grad(), mixed_precision(loaded.device, amp):
                count += len(loaded.model.test_step(packed))
        return count

    def ours() -> int:
        return sum(1 for _ in engine.run_with_features(images))

    plain(), ours()
    return rates({"ours": ours, "plain": plain}, loaded.device)


def measure_detector(name: str, device: torch.device, folder: Path, size: Size) -> list[dict[str, Any]]:
    """Figures of one detector: a row for full precision and, on a GPU, one for mixed precision."""
    entry = scaled_zoo(name, folder / name, size.factor)
    batch = max(size.pool, entry.schedule.batch_size)
    train_json = write_images(folder / f"images-{name}", batch, size.picture)
    workers = 0 if device.type == "cpu" else min(4, os.cpu_count() or 1)
    rows = []
    for amp in (False, True) if device.type == "cuda" else (False,):
        with isolated(f"ppal-gpu-{name}-{amp}"):
            trainer = Trainer(entry, train_json, device, amp)
            half, training = trainer.half, measure_training(trainer, train_json, workers, size)
            engine = engine_of(trainer, entry, folder / name, str(device), amp=amp, workers=workers)
            head = getattr(engine.model, "roi_head", None) or engine.model.bbox_head
            head.test_cfg.score_thr = 0.0
            images = [PoolImage(record.image_id, record.path) for record in trainer.records[: size.pool]]
            del trainer
            pool = measure_pool(engine, images, train_json, workers, amp)
        rows.append(
            {"detector": name, "amp": amp, "half": half, "batch": entry.schedule.batch_size}
            | {f"train_{key}": value for key, value in training.items()}
            | {f"pool_{key}": value for key, value in pool.items()}
        )
    return rows


def measure_ccms(images: int, device: torch.device) -> float:
    """Best of three, in seconds."""
    pool = synthetic_pool(images)
    best = math.inf
    for _ in range(3):
        started = synchronised(device)
        similarity_matrix(pool, device=device)
        best = min(best, synchronised(device) - started)
    return best


def measure_round(preset: str, device: str, folder: Path) -> float:
    """Seconds of a simulation of one seed and one round of ``ppal``.

    Raises:
        DetectorError: It failed; the message has the end of what it said.
    """
    started = time.monotonic()
    arguments = ["simulate", "--preset", preset, "--strategies", "ppal", "--seeds", "1", "--rounds", "1"]
    command = [sys.executable, "-m", "ppal_backend.cli", *arguments, "--device", device, "--out", str(folder / "round")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise DetectorError(
            f"expected a round of preset {preset} to end well, got: {(done.stdout + done.stderr)[-800:]}"
        )
    return time.monotonic() - started


def run(device: str = "cuda", size: Size = FULL, detectors: Sequence[str] = DETECTORS) -> dict[str, Any]:
    """All figures.

    Args:
        device: Where to measure.
        size: How much.
        detectors: Names in the zoo.

    Raises:
        DetectorError: The device is missing, mmcv lacks its operators for it, or the round failed.
    """
    chosen = pick_device(device)
    require(chosen)
    with tempfile.TemporaryDirectory(prefix="ppal-gpu-") as folder:
        rows = []
        for name in detectors:
            found = measure_detector(name, chosen, Path(folder), size)
            rows += found
            for row in found:
                _say(
                    f"{name}, AMP {'on' if row['amp'] else 'off'}: training {row['train_ours_per_s']:.1f} images/s "
                    f"(mmdet {row['train_plain_per_s']:.1f}), "
                    f"pool {row['pool_ours_per_s']:.1f} ({row['pool_plain_per_s']:.1f})"
                )
        ccms = measure_ccms(size.ccms, chosen)
        _say(f"CCMS of {size.ccms} images: {ccms:.2f} s")
        seconds = None if size.preset is None else measure_round(size.preset, device, Path(folder))
    return {
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "table": rows,
        "ccms_images": size.ccms,
        "ccms_s": ccms,
        "round_preset": size.preset,
        "round_s": seconds,
    }


def _say(text: str) -> None:
    sys.stderr.write(f"gpu-check: {text}\n")


def table(report: dict[str, Any]) -> str:
    """The report as Markdown, for ``docs/gpu.md``."""
    parts = [f"{report['device']}, torch {report['torch']}.", ""]
    for kind in ("train", "pool"):
        parts += [
            f"| {kind} | AMP | ours images/s | plain mmdet images/s | time ratio | ours peak MiB | plain peak MiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in report["table"]:
            keys = ("ours_per_s", "plain_per_s", "time_ratio", "ours_mib", "plain_mib")
            shapes = ("{:.1f}", "{:.1f}", "{:.3f}", "{:.0f}", "{:.0f}")
            values = [row[f"{kind}_{key}"] for key in keys]
            cells = ["" if value is None else shape.format(value) for shape, value in zip(shapes, values, strict=True)]
            parts.append("| " + " | ".join([row["detector"], "on" if row["amp"] else "off", *cells]) + " |")
        parts.append("")
    full = {row["detector"]: row["train_plain_per_s"] for row in report["table"] if not row["amp"]}
    gains = [
        f"{row['detector']} {row['train_ours_per_s'] / full[row['detector']]:.2f} ({row['half'] or 'full precision'})"
        for row in report["table"]
        if row["amp"]
    ]
    if gains:
        parts += [
            f"Training, ours in mixed precision against plain mmdet in full: {', '.join(gains)} times as fast.",
            "",
        ]
    parts.append(f"CCMS of {report['ccms_images']:,} images: {report['ccms_s']:.2f} s.")
    if report["round_s"] is not None:
        parts.append(f"One round of `{report['round_preset']}`, start to report: {report['round_s']:.0f} s.")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, help="write JSON to this file too")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the measurement itself")
    parser.add_argument("--quick", action="store_true", help="sizes of seconds, no round")
    parser.add_argument("--detectors", nargs="+", default=DETECTORS, help="names in the zoo (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        report = run(options.device, QUICK if options.quick else FULL, options.detectors)
    except PPALError as error:
        _say(str(error))
        raise SystemExit(1) from error
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write((json.dumps(report) if options.json else table(report)) + "\n")


if __name__ == "__main__":
    main()
