"""A round over pools of 1,000 to 200,000 images: seconds of every step and the peak memory of its process.

    python -m benchmarks.scale [--json] [--quick] [--sizes 1000 200000] [--front 5000] [--plot FILE]

Every size runs a real ranking round in a process of its own: what a detector leaves on disk, stage 1, stage 2, order,
map and publishing. Three things are doubles. The detector: 100 made-up detections an image by Zipf's law, 12 of them
valid, 256 numbers each. The images, which are only named. Label Studio: an HTTP transport in the process that counts
what it is sent. Budget 1,000, delta 8, the strategy ``ppal``. 20,000 tasks are then ranked once
more after 100 new ones. The disk must hold 55 KB an image.

Peak memory is read at the end of each step; ``round_gib`` is the highest of all steps but the detector's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.acquisition import CLASSES, DETECTIONS, PAPER_BUDGET, PAPER_SIZE, VALID, WIDTH, PeakObserver, peak_gib
from benchmarks.acquisition import in_fresh_process as acquisition_figures
from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.demo.run import label_config_of
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.publish import LabelStudioPublisher
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import Inferred, PoolEntry, Ports, PreparedData
from ppal_backend.rounds.run import run_round
from ppal_backend.settings import Settings
from ppal_backend.structures.detections import Detections
from ppal_backend.structures.round import ModelRef, RoundSpec

SIZES = (1_000, 5_000, 20_000, 50_000, 100_000, 200_000)
QUICK = (500, 1_000)
BUDGET = 1_000
DELTA = 8.0
LABELLED = 2_000
NEW_TASKS = 100
AGAIN_AT = 20_000
FRONT: int = Settings.model_fields["publish_tasks"].default
SIDE = 1000
LABELS = tuple(f"class {n:02d}" for n in range(CLASSES))
CHOOSING = ("candidates", "query")
_MADE_AT_ONCE = 64
_STORED = re.compile(rb'"task":')


class MadeUp:
    """Detections of any image by its id, made a few images at a time; rows that do not count share embeddings."""

    def __init__(self, seed: int = 0) -> None:
        odds = 1.0 / np.arange(1, CLASSES + 1)
        self._odds = np.cumsum(odds / odds.sum())
        self._rest = np.random.default_rng(seed).standard_normal((DETECTIONS, WIDTH), dtype=np.float32)
        self._boxes = np.tile(np.array([100, 100, 300, 250], np.float32), (DETECTIONS, 1))

    def of(self, image_ids: Sequence[int]) -> Iterator[Detections]:
        """Detections of these images; the same for the same list."""
        rng = np.random.default_rng([7, *image_ids[:1]])
        for image_id in image_ids:
            valid = min(DETECTIONS, int(rng.poisson(VALID)))
            scores = np.concatenate([rng.uniform(0.05, 1, valid), rng.uniform(0, 0.049, DETECTIONS - valid)])
            embeddings = self._rest.copy()
            embeddings[:valid] = rng.standard_normal((valid, WIDTH), dtype=np.float32)
            yield Detections(
                image_id=image_id,
                boxes_xyxy=self._boxes + rng.uniform(0, 600),
                scores=-np.sort(-scores).astype(np.float32),
                class_indices=np.searchsorted(self._odds, rng.random(DETECTIONS)).clip(max=CLASSES - 1),
                embeddings=embeddings,
                image_size=(SIDE, SIDE),
                softmax=False,
            )


class World(PeakObserver):
    """Source, detector and observer of a round."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks, self._made, self.looked_at = tasks, MadeUp(), 0
        self.cpu_s, self._cpu = dict[str, float](), time.process_time()

    def export(self, folder: Path) -> Sequence[int]:
        """Nothing to fetch."""
        return ()

    def prepare(self, folder: Path, on_progress: object) -> PreparedData:
        """So many tasks, named as the image cache names them, and the labelled images."""
        known = range(1, LABELLED + 1)
        images = [CocoImage(i, _path(i), SIDE, SIDE) for i in known]
        boxes = [CocoAnnotation(i, i, 1 + i % CLASSES, (10.0, 10.0, 120.0, 80.0)) for i in known]
        labelled = CocoDataset(tuple(images), tuple(boxes), tuple(CocoCategory(n + 1, x) for n, x in enumerate(LABELS)))
        ids = range(10_000_000, 10_000_000 + self.tasks)
        pool = [PoolEntry(i, _path(i), SIDE, SIDE, f"{i:064x}") for i in ids]
        return PreparedData(labelled, pool, LABELS, {})

    def infer(self, spec: RoundSpec, model: ModelRef, images: Iterable[PoolEntry], *_: object) -> Iterator[Inferred]:
        """Made-up detections and features."""
        ids = [entry.image_id for entry in images]
        for start in range(0, len(ids), _MADE_AT_ONCE):
            for found in self._made.of(ids[start : start + _MADE_AT_ONCE]):
                self.looked_at += 1
                yield Inferred(found, {"global": np.asarray(found.embeddings)[:VALID].mean(axis=0)})

    def step_started(self, step: str) -> None:
        """Note the peak and the processor time of the step before, and begin anew."""
        if self._step:
            self.cpu_s[self._step] = round(time.process_time() - self._cpu, 2)
        super().step_started(step)
        self._cpu = time.process_time()


class CountingLabelStudio:
    """What the publisher asks of Label Studio, answered in the process; predictions are counted and dropped."""

    def __init__(self) -> None:
        self.project: dict[str, Any] = {"id": 1, "label_config": label_config_of(LABELS), "sampling": ""}
        self.counts: dict[str, int] = {}
        self.body_bytes: list[int] = []
        self.seconds = 0.0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        started = time.perf_counter()
        answer = self._answer(request)
        self.seconds += time.perf_counter() - started
        return httpx.Response(200, json=answer)

    def _answer(self, request: httpx.Request) -> Any:
        path = request.url.path
        if path.endswith("/import/predictions"):
            body = request.content
            version = re.search(rb'"model_version":"([^"]+)"', body)
            count = sum(1 for _ in _STORED.finditer(body))
            self.body_bytes.append(len(body))
            name = version.group(1).decode() if version else ""
            self.counts[name] = self.counts.get(name, 0) + count
            return {"created": count}
        if path.endswith("/model-versions"):
            if request.method == "DELETE":
                return {"deleted_predictions": self.counts.pop(json.loads(request.content)["model_version"], 0)}
            return {"static": [{"model_version": n, "count": c} for n, c in reversed(self.counts.items())]}
        if path.endswith("/dm/views/"):
            return [{"id": 1, "data": {"title": "PPAL queue"}}]
        if request.method == "PATCH":
            self.project |= json.loads(request.content)
        return {"access": "x"} if path.endswith("/refresh") else self.project


def _path(image_id: int) -> str:
    return f"/data/images/{image_id % 256:02x}/{image_id:032x}.jpg"


def measure(tasks: int, folder: Path, number: int = 1, front: int = FRONT) -> dict[str, Any]:
    """One ranking round in this process, which publishes the front of the queue, or all of it (0)."""
    world, label_studio = World(tasks), CountingLabelStudio()
    weights = folder / "weights.pth"
    weights.write_bytes(b"weights")
    model = ModelRef("retinanet_r50_fpn", str(weights), LABELS, tuple(0.5 for _ in LABELS))
    spec = RoundSpec(
        project_id=1, project_key="1", number=number, kind="rank", detector=model.detector, strategy="ppal",
        budget=BUDGET, delta=DELTA, seed=0, score_threshold=0.3, holdout_fraction=0.0, model=model, draw_map=True,
    )  # fmt: skip
    start_gib, started = peak_gib(), time.perf_counter()
    transport = httpx.MockTransport(label_studio)
    with LabelStudioClient("http://label-studio", "0" * 40, http_transport=transport) as client:
        publisher = LabelStudioPublisher(client, most=front)
        ports = Ports(world, world, publisher, world)  # type: ignore[arg-type]
        result = run_round(spec, RoundFolder(folder / str(number)), ports)
    total_s = time.perf_counter() - started
    world.step_started("")
    query = RoundFolder(folder / str(number)).read("query_set.json")
    stored = sum(path.stat().st_size for path in (folder / str(number) / "detections").iterdir())
    return {
        "images": tasks,
        "candidates": len(query["candidate_ids"]),
        "chosen": len(query["image_ids"]),
        "ranked": len(result.queue),
        "looked_at": world.looked_at,
        "seconds": {step: round(seconds, 2) for step, seconds in result.seconds.items()},
        "cpu_s": world.cpu_s,
        "total_s": round(total_s, 2),
        "label_studio_s": round(label_studio.seconds, 2),
        "select_s": round(sum(result.seconds[step] for step in CHOOSING), 2),
        "select_cpu_s": round(sum(world.cpu_s[step] for step in CHOOSING), 2),
        "start_gib": round(start_gib, 3),
        "peak_gib": world.peaks_gib,
        "round_gib": max(gib for step, gib in world.peaks_gib.items() if step != "infer"),
        "disk_gib": round(stored / 2**30, 2),
        "bodies_mib": [round(n / 2**20, 1) for n in label_studio.body_bytes],
        "published": sum(label_studio.counts.values()),
        "load_average": round(os.getloadavg()[0], 1),
    }


def in_fresh_process(*arguments: str) -> dict[str, Any]:
    """One round in a new process, whose idle threads sleep as a round's do."""
    command = [sys.executable, "-m", "benchmarks.scale", *arguments]
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def run(
    sizes: Sequence[int] = SIZES, again_at: int = AGAIN_AT, folder: Path | None = None, front: int = FRONT
) -> dict[str, Any]:
    """All figures, under the keys that reports use.

    Args:
        sizes: Pool sizes.
        again_at: Size at which a second round ranks 100 more tasks; it must be one of ``sizes``.
        folder: Where rounds are put while they are measured; None for the system's folder of temporary files.
        front: Tasks at the front of each queue to publish, as ``PPAL_PUBLISH_TASKS``; 0 for all.
    """
    rows, again = [], {}
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            rows.append(in_fresh_process("--one", str(size), "--folder", place, "--front", str(front)))
            if size == again_at:
                more = ("--number", "2", "--front", str(front))
                again = in_fresh_process("--one", str(size + NEW_TASKS), "--folder", place, *more)
    largest: dict[str, Any] = next((row for row in rows if row["images"] == 200_000), {})
    ccms = acquisition_figures("--size", str(PAPER_SIZE), "--budget", str(PAPER_BUDGET)) if largest else {}
    beside = round(again["total_s"] - again["label_studio_s"], 2) if again_at == AGAIN_AT and again else None
    return {
        "round_gib_200000": largest.get("round_gib"),
        "select_200000_s": largest.get("select_s"),
        "rank_100_new_s": beside,
        "ccms_9460_gemm_share": ccms.get("gemm_share"),
        "table": rows,
        "again": again,
        "doubles": ["detector", "images", "Label Studio"],
        "load_average": round(os.getloadavg()[0], 1),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    steps = ("dataset", "infer", "candidates", "query", "publish")
    heads = ["images", "candidates", *(f"{step} s" for step in steps), "round GiB", "disk GiB", "bodies MiB", "load"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in [*report["table"], *([report["again"]] if report["again"] else [])]:
        cells = [f"{row['images']:,}", f"{row['candidates']:,}", *(f"{row['seconds'][s]:.1f}" for s in steps)]
        cells += [f"{row['round_gib']:.2f}", f"{row['disk_gib']:.2f}", ", ".join(map(str, row["bodies_mib"]))]
        lines.append("| " + " | ".join([*cells, str(row["load_average"])]) + " |")
    keys = ("round_gib_200000", "select_200000_s", "rank_100_new_s", "ccms_9460_gemm_share")
    return "\n".join([*lines, "", *(f"{key}: {report[key]}" for key in keys)])


def plot(report: dict[str, Any], path: Path) -> None:
    """Seconds of choosing and publishing, and peak memory, against the pool's size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["table"]
    images = [row["images"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for step, mark in (("candidates", "o"), ("query", "s"), ("publish", "^")):
        left.plot(images, [max(row["seconds"][step], 0.01) for row in rows], marker=mark, label=step)
    left.set(xscale="log", yscale="log", xlabel="images of the pool", ylabel="seconds")
    left.legend()
    right.plot(images, [row["round_gib"] for row in rows], marker="o")
    right.set(xscale="log", xlabel="images of the pool", ylabel="GiB, highest of the round's process")
    right.set_ylim(0, 1.6)
    right.axhline(1.5, linestyle=":", color="grey")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="A round over pools of growing size.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small pools; the keys of the large one are null")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--plot", type=Path, help="an image file for the plot")
    parser.add_argument("--folder", type=Path, help="where rounds are put while they are measured")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--front", type=int, default=FRONT, help="tasks of each queue to publish; 0: all")
    parser.add_argument("--number", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        sys.stdout.write(json.dumps(measure(options.one, options.folder, options.number, options.front)) + "\n")
        return
    sizes, again_at = (QUICK, QUICK[-1]) if options.quick else (options.sizes, AGAIN_AT)
    report = run(sizes, again_at, options.folder, options.front)
    if options.plot:
        plot(report, options.plot)
    sys.stdout.write((json.dumps(report, indent=1) if options.json else table(report)) + "\n")


if __name__ == "__main__":
    main()
