"""A page opens in under a second with 20,000 tasks and 50 rounds."""

import time

import numpy as np
import pytest

from ppal_backend.files import write_json
from ppal_backend.service.dashboard import round_files
from ppal_backend.store import ModelVersion, SeenAnnotation
from ppal_backend.store.rounds import Lease
from tests.service.dashboard.conftest import ShownPlace

TASKS, ROUNDS, CLASSES, LONGEST_S = 20_000, 50, 20, 1.0
LABELS = tuple(f"class-{i}" for i in range(CLASSES))
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    + "".join(f'<Label value="{label}"/>' for label in LABELS)
    + "</RectangleLabels></View>"
)
PAGES = ["", "projects/1/", "projects/1/live", "projects/1/learning", "projects/1/classes", "projects/1/queue",
         "projects/1/queue?page=900", "projects/1/quality", "projects/1/settings"]  # fmt: skip


def explanation(task_id, rank):
    boxes = [
        {"box_index": i, "box_xyxy": [1.0, 2.0, 30.0, 40.0], "class_index": i, "score": 0.4, "contribution": 0.7}
        for i in range(5)
    ]
    classes = [{"class_index": i, "boxes": 3, "contribution": 2.0} for i in range(5)]
    return {
        "image_id": task_id, "rank": rank, "utility": 40.0, "utility_rank": rank, "classes": classes, "boxes": boxes,
        "cluster_size": 4, "nearest_chosen": 1, "nearest_similarity": 1.2, "nearest_distance": 0.8,
    }  # fmt: skip


def review(pool):
    box = [100.0, 100.0, 200.0, 200.0]
    disputes = [
        {"kind": "swapped", "score": 0.1, "annotated": 0, "box_xyxy": box, "label": LABELS[1], "confidence": 0.9}
    ] * 5
    task = {"round": ROUNDS, "width": 640, "height": 480, "disputes": disputes}
    task["annotated"] = [{"box_xyxy": box, "label": LABELS[0]}] * 20
    tasks = [{"task_id": i, **task} for i in pool[:120]]
    return {"labelled": TASKS, "compared": TASKS, "disputed": 900, "tasks": tasks}


def write_round(folder, number, cache):
    """A round's files as large as the real ones; detections of 100 boxes an image for the last round only."""
    pool = list(range(1, TASKS + 1))
    chosen = pool[:200]
    query = {
        "strategy": "ppal", "image_ids": chosen, "candidate_ids": pool[:800], "queue": pool,
        "utilities": [[i, 50.0 - i / 1000 - number / 10] for i in pool],
        "explanations": {str(i): explanation(i, rank) for rank, i in enumerate(chosen)},
    }  # fmt: skip
    write_json(folder / "query_set.json", query)
    counts = {"tasks": 200, "kept": 300, "moved": 200, "relabelled": 20, "removed": 100, "added": 90}
    facts = {
        "labelled_per_class": dict.fromkeys(LABELS, 50),
        "agreement": {f"ppal-r{n}": counts for n in range(1, ROUNDS + 1)},
    }
    stamp = "2026-01-01T00:00:00+00:00"
    write_json(folder / "steps" / "dataset.json", {"seconds": 1.0, "finished_at": stamp, "facts": facts})
    if number < ROUNDS:
        return
    entries = [{"image_id": i, "path": str(cache / f"{i}.png"), "width": 640, "height": 480} for i in pool]
    write_json(folder / "dataset" / "pool.json", entries)
    write_json(folder / "dataset" / "quality.json", review(pool))
    (folder / "detections").mkdir()
    for shard, start in enumerate(range(0, TASKS, 256)):
        ids = np.array(pool[start : start + 256])
        rows = 100 * len(ids)
        np.savez(
            folder / "detections" / f"shard-{shard:05d}.npz", image_ids=ids, counts=np.full(len(ids), 100),
            boxes_xyxy=np.ones((rows, 4), np.float32), scores=np.full(rows, 0.5, np.float32),
            class_indices=np.zeros(rows, np.int64), embeddings=np.zeros((rows, 16), np.float32),
        )  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    place = ShownPlace(tmp_path_factory.mktemp("large") / "data")
    store = place.store
    store.projects.connect(1, "1.1", CONFIG, "http://ls.test:8080", {"budget": 200})
    store.ledger.see(1, [SeenAnnotation(i, i) for i in range(1, TASKS + 1)])
    for number in range(1, ROUNDS + 1):
        record = store.rounds.request(1, "train", "200 new annotations, 200 start a round")
        store.rounds.claim(1, Lease.mine())
        value = 0.8 - 3.0 / (200 * number) ** 0.5
        metrics = {
            "map": value, "map50": value, "per_class": dict.fromkeys(LABELS, value), "images": 100,
            "labelled_images": 200 * number, "labelled_boxes": 1000 * number, "pool_images": TASKS - 200 * number,
            "seconds": {"train": 60.0},
        }  # fmt: skip
        version, checkpoint = f"ppal-r{number}", f"projects/1/rounds/{number}/train/final.pth"
        difficulty = tuple(i / CLASSES for i in range(CLASSES))
        store.versions.activate(ModelVersion(1, version, number, "tiny", checkpoint, LABELS, difficulty, metrics))
        store.rounds.finish(record.id, {**metrics, "version": version})
        if number in (1, ROUNDS):
            write_round(place.folder(number), number, place.world.cache)
        else:  # as large as the first one's, and another file
            place.folder(number).mkdir(parents=True)
            (place.folder(number) / "query_set.json").hardlink_to(place.folder(1) / "query_set.json")
    yield place
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_in_under_a_second(large, page, record_property):
    client = large.app().test_client()
    client.get("/ui/static/ppal.css")
    for kept in (round_files._query, round_files._pool):
        kept.cache_clear()  # the first visitor has to read the files
    started, used = time.perf_counter(), time.process_time()
    answer = client.get(f"/ui/{page}")
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - used
    record_property("seconds", seconds)
    record_property("cpu_seconds", cpu_s)
    assert answer.status_code == 200
    assert cpu_s < LONGEST_S, f"{seconds:.2f} s, of them {cpu_s:.2f} s of computing"
