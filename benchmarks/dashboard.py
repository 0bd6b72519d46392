"""How fast the dashboard's pages open with many tasks and rounds.

    python -m benchmarks.dashboard [--json] [--quick] [--tasks 200000] [--rounds 50]

writes a project of 20,000 tasks and 50 rounds into a temporary MODEL_DIR, as large on disk and in the database as
real rounds leave it, and asks for every page and for ``/metrics`` in this process: first with nothing remembered of
the round's files, then again. The project is written by another process, so that memory is that of the pages alone.
Nothing is trained, and no page may load torch. The disk must hold 9 KB a task.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flask.testing import FlaskClient

from ppal_backend.datasets.coco import (
    CocoAnnotation,
    CocoCategory,
    CocoDataset,
    CocoImage,
    result_row,
    write_predictions,
)
from ppal_backend.datasets.precision import SUMS, THRESHOLDS
from ppal_backend.files import write_json
from ppal_backend.rounds.folder import Rounds
from ppal_backend.rounds.pool_map import pool_to_draw
from ppal_backend.service.app import create_app
from ppal_backend.service.dashboard import errors, project
from ppal_backend.settings import Settings, load_settings
from ppal_backend.store import Lease, ModelVersion, SeenAnnotation, Store, open_store

CLASSES, BOXES, SHARD = 20, 100, 256
MOST_EVALUATED = 1_000
BOX = (100.0, 100.0, 200.0, 200.0)
LABELS = tuple(f"class-{i}" for i in range(CLASSES))
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    + "".join(f'<Label value="{label}"/>' for label in LABELS)
    + "</RectangleLabels></View>"
)
WARM_CALLS = 5
STAMP = "2026-01-01T00:00:00+00:00"


@dataclass(frozen=True)
class Size:
    """How large the project is: tasks, rounds, images chosen in each round."""

    tasks: int = 20_000
    rounds: int = 50
    budget: int = 200


@dataclass(frozen=True)
class PageTime:
    """One page: milliseconds until it is there, first and later (median), of which the processor worked; its size; the
    highest memory of the process meanwhile, with all that it remembers of the pages before."""

    page: str
    cold_ms: float
    cold_cpu_ms: float
    warm_ms: float
    warm_cpu_ms: float
    kib: float
    peak_mib: float


@dataclass(frozen=True)
class Report:
    """All pages, and whether any of them loaded torch."""

    tasks: int
    rounds: int
    start_mib: float
    pages: tuple[PageTime, ...]
    torch_loaded: bool
    load_average: float


def run(size: Size = Size()) -> Report:
    """Write the project and time its pages."""
    with tempfile.TemporaryDirectory() as name:
        writer = multiprocessing.get_context("spawn").Process(target=_write, args=(name, size))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise RuntimeError(f"the project could not be written: exit code {writer.exitcode}")
        settings = _settings(name)
        store = open_store(settings)
        try:
            client = create_app(settings, store).test_client()
            client.get("/ui/static/ppal.css")
            start = _peak_mib()
            pages = tuple(_timed(client, page) for page in pages_of(size))
        finally:
            store.close()
    return Report(size.tasks, size.rounds, start, pages, "torch" in sys.modules, round(os.getloadavg()[0], 1))


def _settings(folder: str) -> Settings:
    return load_settings(MODEL_DIR=Path(folder), LABEL_STUDIO_API_KEY="x" * 40, host="127.0.0.1", min_free_gib=0)


def _write(folder: str, size: Size) -> None:
    settings = _settings(folder)
    store = open_store(settings)
    try:
        build(settings, store, size)
    finally:
        store.close()


def pages_of(size: Size) -> list[str]:
    """Addresses of every page of the project, of what the pages fetch, and of the metrics."""
    project, pages = "ui/projects/1", size.tasks // 12
    return ["ui/", f"{project}/", f"{project}/live", f"{project}/learning", f"{project}/classes", f"{project}/errors",
            f"{project}/errors?show=all&score=0.05", f"{project}/queue", f"{project}/queue?page={pages // 2}",
            f"{project}/queue?page={pages}", f"{project}/rounds/{size.rounds}/map", f"{project}/approve?at=0.5",
            f"{project}/quality", f"{project}/settings", "metrics"]  # fmt: skip


def build(settings: Settings, store: Store, size: Size) -> None:
    """Write a project with id 1 whose last round holds everything and whose earlier rounds hold what pruning leaves."""
    store.projects.connect(1, "1.1", CONFIG, "http://ls.test:8080", {"budget": size.budget})
    store.ledger.see(1, [SeenAnnotation(i, i) for i in range(size.tasks // 2, size.tasks + 1)])
    store.ledger.used_by(1, size.rounds, range(1, size.tasks - size.budget // 2))
    folders = Rounds(settings).of_project(1)
    for number in range(1, size.rounds + 1):
        _stored_round(store, number, size)
        folder = folders / str(number)
        if number == 1:
            write_json(folder / "query_set.json", _query(size))
        else:  # as large as the first one's, and another file
            folder.mkdir(parents=True)
            (folder / "query_set.json").hardlink_to(folders / "1" / "query_set.json")
        _marks(folder, size)
    _last_round(folders / str(size.rounds), settings.image_folder, size)


def _stored_round(store: Store, number: int, size: Size) -> None:
    record = store.rounds.request(1, "train", f"{size.budget} new annotations, {size.budget} start a round")
    store.rounds.claim(1, Lease.mine())
    images, value = size.budget * number, max(0.01, 0.8 - 3.0 / (size.budget * number) ** 0.5)
    measured = {
        "map": value, "interval": [value * 0.95, min(1.0, value * 1.05)], "classes": dict.fromkeys(LABELS, value),
        "too_few": {}, "images": 100,
    }  # fmt: skip
    metrics = {
        "map": value, "map50": value, "measured": measured, "image_set": "the same", "images_wanted": 40,
        "per_class": dict.fromkeys(LABELS, value), "images": 100, "labelled_images": images,
        "labelled_boxes": 5 * images, "pool_images": max(0, size.tasks - images), "seconds": {"train": 60.0},
    }  # fmt: skip
    version, checkpoint = f"ppal-r{number}", f"projects/1/rounds/{number}/train/final.pth"
    difficulty = tuple(i / CLASSES for i in range(CLASSES))
    store.versions.activate(ModelVersion(1, version, number, "tiny", checkpoint, LABELS, difficulty, metrics))
    store.rounds.finish(record.id, {**metrics, "version": version})


def _query(size: Size) -> dict[str, Any]:
    pool = list(range(1, size.tasks + 1))
    chosen = pool[: size.budget]
    return {
        "strategy": "ppal", "image_ids": chosen, "candidate_ids": pool[: 4 * size.budget], "queue": pool,
        "utilities": [[i, 50.0 - i / 1000] for i in pool],
        "explanations": {str(i): _explanation(i, rank) for rank, i in enumerate(chosen)},
    }  # fmt: skip


def _explanation(task_id: int, rank: int) -> dict[str, Any]:
    box = {"box_xyxy": [1.0, 2.0, 30.0, 40.0], "score": 0.4, "contribution": 0.7}
    return {
        "image_id": task_id, "rank": rank, "utility": 40.0, "utility_rank": rank,
        "classes": [{"class_index": i, "boxes": 3, "contribution": 2.0} for i in range(5)],
        "boxes": [{"box_index": i, "class_index": i, **box} for i in range(5)],
        "cluster_size": 4, "nearest_chosen": 1, "nearest_similarity": 1.2, "nearest_distance": 0.8,
    }  # fmt: skip


def _marks(folder: Path, size: Size) -> None:
    counts = {"tasks": size.budget, "kept": 300, "moved": 200, "relabelled": 20, "removed": 100, "added": 90}
    kept = {name: 900 if "kept" in name else 1000 for name in SUMS} | {"images": 200}
    facts = {
        "precision": {"ppal-r1": {f"{threshold:g}": kept for threshold in THRESHOLDS}},
        "labelled_per_class": dict.fromkeys(LABELS, 50),
        "agreement": {f"ppal-r{n}": counts for n in range(1, size.rounds + 1)},
    }
    for step in ("export", "dataset", "train", "evaluate", "infer", "candidates", "query", "publish"):
        mark = {"seconds": 1.0, "finished_at": STAMP, "facts": facts if step == "dataset" else {}}
        write_json(folder / "steps" / f"{step}.json", mark)


def _last_round(folder: Path, cache: Path, size: Size) -> None:
    pool = list(range(1, size.tasks + 1))
    frame = {"width": 640, "height": 480}
    entries = [{"image_id": i, "path": str(cache / f"{i}.png"), **frame} for i in pool]
    write_json(folder / "dataset" / "pool.json", entries)
    write_json(folder / "dataset" / "quality.json", _review(pool, size))
    write_json(folder / "map.json", _map(pool, size.budget, cache))
    _evaluation(folder, cache, size)
    (folder / "detections").mkdir()
    for shard, start in enumerate(range(0, size.tasks, SHARD)):  # as ``DetectionsWriter`` leaves them, but narrow
        ids = np.array(pool[start : start + SHARD])
        images, rows = len(ids), BOXES * len(ids)
        np.savez(
            folder / "detections" / f"shard-{shard:05d}.npz", image_ids=ids, counts=np.full(images, BOXES),
            softmax=np.zeros(images, bool), stamps=np.zeros(images, np.int64), boxes_xyxy=np.full((rows, 4), BOX, "f4"),
            scores=np.full(rows, 0.5, np.float32), class_indices=np.zeros(rows, np.int64),
            embeddings=np.zeros((rows, 16), np.float16), embedding_exponents=np.zeros(rows, np.int16),
            image_sizes=np.full((images, 2), (640, 480)),
        )  # fmt: skip


def _map(pool: Sequence[int], budget: int, cache: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 0.3, (12, 2))
    drawn = [pool[row] for row in pool_to_draw(pool, pool[:budget])]
    labelled = [-i for i in range(1, len(pool) // 10 + 1)]
    points = centres[rng.integers(0, 12, len(drawn) + len(labelled))]
    points = (points + rng.normal(0, 0.06, points.shape)).round(4).tolist()
    known = [
        {"image_id": i, "path": str(cache / f"{-i}.png"), "width": 640, "height": 480, "x": x, "y": y}
        for i, (x, y) in zip(labelled, points[len(drawn) :], strict=True)
    ]
    xs, ys = ([point[axis] for point in points[: len(drawn)]] for axis in (0, 1))
    return {"feature": "global", "explained": [0.31, 0.12], "labelled_images": 2 * len(known), "ids": drawn,
            "pool_images": len(pool), "x": xs, "y": ys, "labelled": known}  # fmt: skip


def _review(pool: Sequence[int], size: Size) -> dict[str, Any]:
    box = list(BOX)
    dispute = {"kind": "swapped", "score": 0.1, "annotated": 0, "box_xyxy": box, "label": LABELS[1], "confidence": 0.9}
    task = {"round": size.rounds, "width": 640, "height": 480, "disputes": [dispute] * 5}
    task["annotated"] = [{"box_xyxy": box, "label": LABELS[0]}] * 20
    tasks = [{"task_id": i, **task} for i in pool[:120]]
    return {"labelled": size.tasks, "compared": size.tasks, "disputed": 900, "tasks": tasks}


def _evaluation(folder: Path, cache: Path, size: Size) -> None:
    """An evaluation set and a hundred predictions on each of its images; by default it has 120 at most."""
    rng = np.random.default_rng(0)
    images = [
        CocoImage(i, str(cache / f"{i}.png"), 640, 480) for i in range(1, min(size.tasks // 20, MOST_EVALUATED) + 1)
    ]
    rows: list[CocoAnnotation] = []
    found: dict[int, list[dict[str, Any]]] = {}
    for image in images:
        corners, classes = rng.uniform(0, 400, (BOXES, 2)), rng.integers(0, CLASSES, BOXES).tolist()
        boxes = [(x, y, 60.0, 60.0) for x, y in corners.tolist()]
        for box, c in zip(boxes[:10], classes[:10], strict=True):
            rows.append(CocoAnnotation(len(rows) + 1, image.id, c + 1, box))
        scores = rng.random(BOXES).tolist()
        found[image.id] = [
            result_row(image.id, np.array(box), score, c) for box, score, c in zip(boxes, scores, classes, strict=True)
        ]
    categories = [CocoCategory(n, label) for n, label in enumerate(LABELS, start=1)]
    CocoDataset(tuple(images), tuple(rows), tuple(categories)).write(folder / "dataset" / "val.json")
    kept = folder / "evaluation" / f"{size.rounds}.npz"
    kept.parent.mkdir()
    write_predictions(kept, found, LABELS)


def forget() -> None:
    """Drop what was remembered of rounds' files, as in a process that has just started."""
    for kept in (project._query, project._pool, project._map, project._evaluated, errors._judged):
        kept.cache_clear()


def _peak_mib() -> float:
    """Highest resident memory of this process since the last call."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    return round(int(line.split()[1]) / 1024, 1)


def _timed(client: FlaskClient, page: str) -> PageTime:
    forget()
    _peak_mib()
    started, used = time.perf_counter(), time.process_time()
    answer = client.get(f"/{page}")
    cold, cpu = time.perf_counter() - started, time.process_time() - used
    if answer.status_code != 200:
        raise RuntimeError(f"/{page} answered {answer.status_code}")
    warm, used = [], time.process_time()
    for _ in range(WARM_CALLS):
        started = time.perf_counter()
        client.get(f"/{page}")
        warm.append(time.perf_counter() - started)
    warm_cpu = (time.process_time() - used) / WARM_CALLS
    cold, cpu, again, again_cpu = (round(s * 1000, 1) for s in (cold, cpu, statistics.median(warm), warm_cpu))
    return PageTime(page, cold, cpu, again, again_cpu, round(len(answer.data) / 1024, 1), _peak_mib())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="How fast the dashboard's pages open.")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="a project of 2,000 tasks and 5 rounds")
    parser.add_argument("--tasks", type=int, default=Size.tasks)
    parser.add_argument("--rounds", type=int, default=Size.rounds)
    options = parser.parse_args(arguments)
    report = run(Size(2000, 5, 100) if options.quick else Size(options.tasks, options.rounds))
    if options.json:
        sys.stdout.write(json.dumps(asdict(report), indent=1) + "\n")
        return
    from rich.console import Console
    from rich.table import Column, Table

    title = (
        f"{report.tasks} tasks, {report.rounds} rounds, {report.start_mib:.0f} MiB before the first page, load average "
        f"{report.load_average}; torch {'was' if report.torch_loaded else 'was not'} loaded"
    )
    table = Table(
        Column("page", no_wrap=True), "first, ms", "of it CPU", "again, ms", "of it CPU", "KiB", "peak MiB", title=title
    )
    for p in report.pages:
        figures = (p.cold_ms, p.cold_cpu_ms, p.warm_ms, p.warm_cpu_ms, p.kib, p.peak_mib)
        table.add_row(f"/{p.page}", *(f"{v:,.0f}" for v in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
