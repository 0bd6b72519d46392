"""What PPAL adds to a detector: the difficulty hook to a training step, the one pass to plain inference.

    python -m benchmarks.detector [--json] [--quick]

Training: blocks of steps with and without the hook take turns in one process on the same batches; the ratio is that of
the medians. The time inside the hook's own code is measured apart, as the noise of a shared machine is larger than
what the hook costs. Inference: the same images in the same batches, decoding included, by mmdet's ``test_step``, by our
one pass (with image features, as in a round), and in two passes: ``test_step`` first, then all images again through
backbone and neck to sample the features. Passes take turns too. Inputs of ``retinanet_r50_fpn`` are made smaller, so
that two CPU cores finish; its weights are random and its score threshold 0, so that every image has its 100
detections. ``retinanet_tiny`` has its own size and batch and has learnt for as long as its steps were measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks.detector_loops import (
    CLASSES,
    Trainer,
    middle,
    own_time,
    scaled_zoo,
    synchronised,
    write_images,
)
from ppal_backend.detector.data import ImageRecord
from ppal_backend.detector.infer.embeddings import sample_embeddings
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.infer.prediction import batch_size_for, predict_packed, read_batches, readable
from ppal_backend.detector.models import LoadedDetector
from ppal_backend.detector.runtime import isolated, pick_device
from ppal_backend.detector.weights import save_final
from ppal_backend.detector.zoo import ZooEntry

HOOK_TARGET = 1.02
PASS_TARGET = 1.15


@dataclass(frozen=True)
class Plan:
    """How a detector is measured: input size against its own, steps a block, blocks of each kind, pool, rounds."""

    detector: str
    factor: float
    picture: tuple[int, int]
    steps: int
    blocks: int
    pool: int
    rounds: int
    threshold: float | None = None


PLANS = (
    Plan("retinanet_tiny", 1.0, (160, 128), 10, 10, 192, 7),
    Plan("retinanet_r50_fpn", 0.24, (640, 480), 1, 9, 8, 5, 0.0),
)
QUICK = (Plan("retinanet_tiny", 0.5, (160, 128), 2, 2, 32, 2),)


def measure_training(trainer: Trainer, plan: Plan) -> dict[str, float]:
    """Seconds a step with and without the hook, their ratio, and the time inside the hook's own code."""
    batches = cycle(trainer.batches(4))
    hook = trainer.hook()
    for _ in range(2):
        trainer.step(next(batches))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for block in range(plan.blocks):
        for hooked in (True, False) if block % 2 else (False, True):
            if hooked:
                trainer.attach(hook)
            for _ in range(plan.steps):
                started = synchronised(trainer.device)
                trainer.step(next(batches), hook if hooked else None)
                seconds[hooked].append(synchronised(trainer.device) - started)
            hook.detach()
    steps = max(3, plan.steps)
    with own_time(trainer, hook) as clock:
        for _ in range(steps):
            trainer.step(next(batches), hook)
    plain, own = middle(seconds[False]), clock.seconds / steps
    return {
        "batch": trainer.batch_size,
        "steps": len(seconds[False]),
        "step_s": plain,
        "step_with_hook_s": middle(seconds[True]),
        "hook_ratio": middle(seconds[True]) / plain,
        "hook_own_ms": own * 1000,
        "hook_own_share": own / plain,
    }


class Passes:
    """Three ways over one pool: mmdet's own, ours, and the two passes of the paper's authors."""

    def __init__(self, engine: PoolInference, records: Sequence[ImageRecord]) -> None:
        self.engine, self.records = engine, tuple(records)
        self.loaded: LoadedDetector = engine.loaded
        self._size = batch_size_for(self.loaded, None)
        self._images = [PoolImage(record.image_id, record.path) for record in records]

    def _packed(self) -> Any:
        for batch in read_batches(self.loaded.pipeline, self.records, self._size):
            yield readable(batch)[1]

    def plain(self) -> int:
        """mmdet's batched inference; the number of detections."""
        return sum(len(s.pred_instances) for packed in self._packed() for s in predict_packed(self.loaded, packed))

    def one(self) -> int:
        """Our one pass, image features included."""
        return sum(len(result.detections) for result in self.engine.run_with_features(self._images))

    def two(self) -> int:
        """Detections first, then every image again through backbone and neck for the features of its detections."""
        first = [s.pred_instances for packed in self._packed() for s in predict_packed(self.loaded, packed)]
        total = 0
        for packed in self._packed():
            with torch.no_grad():
                data = self.loaded.model.data_preprocessor({k: [p[k] for p in packed] for k in packed[0]}, False)
                maps = self.loaded.model.extract_feat(data["inputs"])
            for index, sample in enumerate(data["data_samples"]):
                scale = torch.tensor(sample.scale_factor).repeat(2)
                boxes = first[total + index].bboxes * scale.to(maps[0].device)
                of_image, any_level = torch.full_like(boxes[:, 0], index).long(), torch.zeros_like(boxes[:, 0]).long()
                sample_embeddings(maps, of_image, boxes, any_level, sample.batch_input_shape).cpu()
            total += len(packed)
        return sum(len(item) for item in first)


def measure_passes(passes: Passes, rounds: int) -> dict[str, float]:
    """Seconds an image of the three ways, their ratios by wall clock, and by processor time on a CPU."""
    ways: dict[str, Callable[[], int]] = {"plain": passes.plain, "one": passes.one, "two": passes.two}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    found = {name: way() for name, way in ways.items()}
    order = list(ways)
    for turn in range(rounds):
        for name in order[turn % 3 :] + order[: turn % 3]:
            started, cpu = synchronised(passes.loaded.device), time.process_time()
            ways[name]()
            wall[name].append(synchronised(passes.loaded.device) - started)
            busy[name].append(time.process_time() - cpu)
    images = len(passes.records)
    seconds = {name: middle(values) / images for name, values in wall.items()}
    cpu_seconds = {name: middle(values) for name, values in busy.items()}
    return {
        "images": images,
        "infer_batch": batch_size_for(passes.loaded, None),
        "detections_per_image": found["one"] / images,
        "plain_s": seconds["plain"],
        "one_pass_s": seconds["one"],
        "two_pass_s": seconds["two"],
        "one_pass_ratio": seconds["one"] / seconds["plain"],
        "two_pass_ratio": seconds["two"] / seconds["plain"],
        "one_pass_cpu_ratio": cpu_seconds["one"] / cpu_seconds["plain"],
        "two_pass_cpu_ratio": cpu_seconds["two"] / cpu_seconds["plain"],
    }


def engine_of(trainer: Trainer, entry: ZooEntry, root: Path, device: str, **options: Any) -> PoolInference:
    """The detector as it is now, ready for a pool."""
    checkpoint = root / "detector.pth"
    meta = {"detector": entry.name, "classes": list(CLASSES), "difficulty": None}
    save_final(checkpoint, trainer.model.state_dict(), meta)
    return PoolInference(entry.name, checkpoint, CLASSES, device, root, **options)


def measure(plan: Plan) -> dict[str, Any]:
    """All figures of one detector."""
    with tempfile.TemporaryDirectory(prefix="ppal-bench-") as folder:
        root = Path(folder) / "zoo"
        entry = scaled_zoo(plan.detector, root, plan.factor)
        train_json = write_images(Path(folder) / "images", max(plan.pool, 4 * entry.schedule.batch_size), plan.picture)
        with isolated(f"ppal-bench-{plan.detector}"):
            trainer = Trainer(entry, train_json, pick_device("cpu"))
            training = measure_training(trainer, plan)
            engine = engine_of(trainer, entry, root, "cpu")
        if plan.threshold is not None:
            engine.model.bbox_head.test_cfg.score_thr = plan.threshold
        passes = measure_passes(Passes(engine, trainer.records[: plan.pool]), plan.rounds)
    return {"detector": plan.detector, "input": list(entry.input_size), **training, **passes}


def run(plans: Sequence[Plan] = PLANS) -> dict[str, Any]:
    """All figures, and whether the targets are met."""
    rows = [measure(plan) for plan in plans]
    return {
        "table": rows,
        "hook_met": all(row["hook_ratio"] <= HOOK_TARGET for row in rows),
        "hook_own_met": all(1 + row["hook_own_share"] <= HOOK_TARGET for row in rows),
        "one_pass_met": all(row["one_pass_ratio"] <= PASS_TARGET for row in rows),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def table(report: dict[str, Any]) -> str:
    """The report as two tables and the targets."""
    training = (
        ("detector", "{}"), ("input", "{}"), ("batch", "{}"), ("steps", "{}"), ("step_s", "{:.4f}"),
        ("step_with_hook_s", "{:.4f}"), ("hook_ratio", "{:.4f}"), ("hook_own_ms", "{:.2f}"),
        ("hook_own_share", "{:.4f}"),
    )  # fmt: skip
    passes = (
        ("detector", "{}"), ("images", "{}"), ("infer_batch", "{}"), ("detections_per_image", "{:.1f}"),
        ("plain_s", "{:.4f}"), ("one_pass_s", "{:.4f}"), ("two_pass_s", "{:.4f}"), ("one_pass_ratio", "{:.3f}"),
        ("one_pass_cpu_ratio", "{:.3f}"), ("two_pass_ratio", "{:.3f}"), ("two_pass_cpu_ratio", "{:.3f}"),
    )  # fmt: skip
    targets = [
        f"| {text} | {shown} | {'met' if met else '**missed**'} |"
        for text, shown, met in (
            (f"step with the hook ≤ {HOOK_TARGET} × without", _worst(report, "hook_ratio"), report["hook_met"]),
            ("the hook's own code ≤ 0.02 of a step", _worst(report, "hook_own_share"), report["hook_own_met"]),
            (f"one pass ≤ {PASS_TARGET} × plain", _worst(report, "one_pass_ratio"), report["one_pass_met"]),
        )
    ]
    state = f"threads {report['threads']}, load average {report['load_average']:.1f}"
    lines = [
        *_rows(report, training),
        "",
        *_rows(report, passes),
        "",
        "| target | worst | |",
        "|---|---|---|",
        *targets,
    ]
    return "\n".join([*lines, "", state])


def _worst(report: dict[str, Any], key: str) -> str:
    row = max(report["table"], key=lambda item: item[key])
    return f"{row[key]:.4f} ({row['detector']})"


def _rows(report: dict[str, Any], columns: Sequence[tuple[str, str]]) -> list[str]:
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|" + "---|" * len(columns)]
    return lines + [
        "| " + " | ".join(shape.format(row[name]) for name, shape in columns) + " |" for row in report["table"]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="the tiny detector alone, at half its size")
    options = parser.parse_args(arguments)
    report = run(QUICK if options.quick else PLANS)
    sys.stdout.write((json.dumps(report) if options.json else table(report)) + "\n")


if __name__ == "__main__":
    main()
