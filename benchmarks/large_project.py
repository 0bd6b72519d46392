"""A project of 20,000 tasks on a real Label Studio: what a round's export, ranking and publishing cost.

    python -m benchmarks.large_project [--tasks 20000] [--publish 5000]

imports tasks with annotations, then runs a real ranking round in a process of its own. Only looking at images is left
out: every image has made-up detections of the size that a large detector leaves (100 a picture, about 12 above the
threshold, 256 numbers each, 80 classes). Peak memory is read at the end of each step. Afterwards publishing 5,000 tasks
with 10 boxes takes turns with a bare import: one POST of the same predictions. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import requests

from benchmarks.acquisition import CLASSES, PeakObserver, peak_gib, synthetic_pool
from ppal_backend.datasets.images import ImageInfo
from ppal_backend.datasets.label_studio_json import annotations_to_coco
from ppal_backend.demo.run import label_config_of
from ppal_backend.label_studio.client import LabelStudioClient, read_export
from ppal_backend.label_studio.publish import LabelStudioPublisher, QueueItem, publish, queue_scores
from ppal_backend.label_studio.schema import parse_label_config
from ppal_backend.rig.label_studio_server import LabelStudioServer
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import Inferred, PoolEntry, Ports, PreparedData
from ppal_backend.rounds.run import run_round
from ppal_backend.settings import load_settings
from ppal_backend.structures.detections import to_numpy
from ppal_backend.structures.round import ModelRef, RoundSpec

LABEL_STUDIO = Path(".venv-label-studio/bin/label-studio")
LABELS = tuple(f"class {n:02d}" for n in range(CLASSES))
ANNOTATED_SHARE = 0.1
BOXES = 10
BUDGET = 500
PER_IMPORT = 2_500
TURNS = 3
SIDE = 1000
IMPORT_TIMEOUT_S = 600.0
START_S = 450.0
TOKEN = "LABEL_STUDIO_API_KEY"


class World(PeakObserver):
    """Source and engine of the round: the real export, and detections made up for each image."""

    def __init__(self, client: LabelStudioClient, project_id: int) -> None:
        super().__init__()
        self._client, self._project_id = client, project_id

    def export(self, folder: Path) -> Sequence[int]:
        """As ``LabelStudioSource`` does."""
        from ppal_backend.label_studio.source import LabelStudioSource

        return LabelStudioSource(self._client, None, self._project_id).export(folder)  # type: ignore[arg-type]

    def prepare(self, folder: Path, on_progress: object) -> PreparedData:
        """The snapshot as data; every image is said to be there."""
        schema = parse_label_config((folder / "label_config.xml").read_text())
        tasks = [int(task["id"]) for task in read_export(folder / "annotated.json")]
        found = {i: ImageInfo(i, Path(f"{i}.jpg"), SIDE, SIDE) for i in tasks}
        labelled, _ = annotations_to_coco(read_export(folder / "annotated.json"), schema, found)
        lines = (folder / "pool.jsonl").read_text().splitlines()
        pool = [PoolEntry(int(json.loads(line)[0]), "", SIDE, SIDE) for line in lines]
        return PreparedData(labelled, pool, schema.labels, {})

    def infer(self, spec: RoundSpec, model: ModelRef, images: Iterable[PoolEntry], *_: object) -> Iterator[Inferred]:
        """Made-up detections."""
        for entry in images:
            found = replace(synthetic_pool(1, entry.image_id)[0], image_id=entry.image_id)
            yield Inferred(found, {"global": to_numpy(found.embeddings).mean(axis=0)})


def run_ranking(url: str, project_id: int, folder: Path) -> dict[str, Any]:
    """The round in this process: seconds and peak memory by step."""
    client = LabelStudioClient(url, os.environ[TOKEN])
    world = World(client, project_id)
    model = ModelRef("retinanet_r50_fpn", "", LABELS, tuple(0.5 for _ in LABELS))
    defaults = load_settings().project_options({})
    spec = RoundSpec(
        project_id=project_id, project_key=str(project_id), number=1, kind="rank", detector=model.detector,
        strategy=defaults.strategy, budget=BUDGET, delta=defaults.delta, seed=0, score_threshold=0.3,
        holdout_fraction=0.1, model=model, draw_map=True,
    )  # fmt: skip
    before = peak_gib()
    ports = Ports(world, world, LabelStudioPublisher(client), world)  # type: ignore[arg-type]
    result = run_round(spec, RoundFolder(folder), ports)
    world.step_started("")
    client.close()
    return {
        "tasks_ranked": len(result.queue),
        "start_gib": round(before, 3),
        "seconds": {step: round(seconds, 2) for step, seconds in result.seconds.items()},
        "peak_gib": world.peaks_gib,
    }


class Server:
    """A Label Studio to measure against, and projects in it."""

    def __init__(self, stack: ExitStack, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        template = None if environment else load_settings().cache_dir / "label-studio"
        started = LabelStudioServer(
            LABEL_STUDIO,
            folder / "label-studio",
            template_cache=template,
            environment=environment,
            start_timeout_s=START_S,
        )
        self.server = stack.enter_context(started)
        self.client = stack.enter_context(LabelStudioClient(self.server.url, self.server.token))

    def project(self, tasks: int, annotated: int) -> int:
        """A project of so many tasks, the first ones annotated with ``BOXES`` boxes."""
        project_id = self.server.create_project(f"{tasks} tasks", label_config_of(LABELS))
        rows = [_task(number, number < annotated) for number in range(tasks)]
        for start in range(0, tasks, PER_IMPORT):
            self.server.session.post(f"/api/projects/{project_id}/import", json=rows[start : start + PER_IMPORT])
        return project_id


def rank_large(place: Server, tasks: int, folder: Path) -> dict[str, Any]:
    """Import a project, then rank it in a process of its own."""
    started = time.perf_counter()
    project_id = place.project(tasks, round(tasks * ANNOTATED_SHARE))
    imported_s = time.perf_counter() - started
    command = [sys.executable, "-m", "benchmarks.large_project", "--round", place.server.url]
    command += ["--project", str(project_id), "--folder", str(folder)]
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, TOKEN: place.server.token}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    counts = place.client.model_version_counts(project_id)
    return {"tasks": tasks, "imported_s": round(imported_s, 1), **figures, "published": counts}


def compare_publishing(place: Server, tasks: int, turns: int = TURNS) -> dict[str, Any]:
    """Publishing and a bare import of the same predictions, taking turns; their medians and the ratio."""
    project_id = place.project(tasks, 0)
    items = [QueueItem(task_id, regions_of(task_id)) for task_id in place.client.task_ids(project_id)]
    bare: list[float] = []
    ours: list[float] = []
    for turn in range(turns):
        bare.append(_bare_import(place, project_id, items, f"bare-{turn}"))
        started = time.perf_counter()
        publish(place.client, project_id, f"turn-{turn}", items, keep=None)
        ours.append(time.perf_counter() - started)
    counts = place.client.model_version_counts(project_id)
    if set(counts.values()) != {tasks}:
        raise RuntimeError(f"expected {tasks} predictions of every version, got {counts}")
    return {
        "tasks": tasks,
        "boxes": BOXES,
        "bare_s": [round(s, 2) for s in bare],
        "publish_s": [round(s, 2) for s in ours],
        "ratio": round(statistics.median(ours) / statistics.median(bare), 3),
    }


def _bare_import(place: Server, project_id: int, items: Sequence[QueueItem], version: str) -> float:
    """Seconds of one POST; its body and its token are made before the clock starts."""
    rows = [
        {"task": item.task_id, "result": list(item.result), "score": score, "model_version": version}
        for item, score in zip(items, queue_scores(len(items)), strict=True)
    ]
    body = json.dumps(rows, separators=(",", ":")).encode()
    url, token = place.server.url, {"refresh": place.server.token}
    access = requests.post(f"{url}/api/token/refresh/", json=token, timeout=IMPORT_TIMEOUT_S).json()["access"]
    headers = {"Authorization": f"Bearer {access}", "Content-Type": "application/json"}
    started = time.perf_counter()
    route = f"{url}/api/projects/{project_id}/import/predictions"
    answer = requests.post(route, body, headers=headers, timeout=IMPORT_TIMEOUT_S)
    seconds = time.perf_counter() - started
    if answer.json().get("created") != len(items):
        raise RuntimeError(f"expected {len(items)} predictions, got {answer.text[:200]}")
    return seconds


def _task(number: int, annotated: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"data": {"image": f"https://images.example.com/{number:06d}.jpg"}}
    return {**row, "annotations": [{"result": regions_of(number)}]} if annotated else row


def regions_of(number: int) -> list[dict[str, Any]]:
    """``BOXES`` boxes of a task."""
    return [
        {
            "id": f"b{number}x{n}", "from_name": "label", "to_name": "image", "type": "rectanglelabels",
            "original_width": SIDE, "original_height": SIDE, "image_rotation": 0, "score": 0.5,
            "value": {"x": 5.0 * n, "y": 4.0 * n, "width": 12.5, "height": 9.25, "rotation": 0,
                      "rectanglelabels": [LABELS[(number + n) % CLASSES]]},
        }
        for n in range(BOXES)
    ]  # fmt: skip


def run(tasks: int = 20_000, publishing: int = 5_000) -> dict[str, Any]:
    """Both measurements; 0 leaves one out.

    Raises:
        RuntimeError: Label Studio did not store what it was sent.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place = Server(stack, folder)
        report: dict[str, Any] = {}
        if publishing:
            report["publishing"] = compare_publishing(place, publishing)
        if tasks:
            report["large"] = rank_large(place, tasks, folder / "round")
        return {**report, "load_average": os.getloadavg()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Export, ranking and publishing of a large project.")
    parser.add_argument("--tasks", type=int, default=20_000, help="0: not")
    parser.add_argument("--publish", type=int, default=5_000, help="0: not")
    parser.add_argument("--round", help=argparse.SUPPRESS)
    parser.add_argument("--project", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.round:
        sys.stdout.write(json.dumps(run_ranking(options.round, options.project, options.folder)) + "\n")
    else:
        sys.stdout.write(json.dumps(run(options.tasks, options.publish), indent=1) + "\n")


if __name__ == "__main__":
    main()
