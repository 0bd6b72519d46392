"""The queue of a round as its folder holds it."""

from __future__ import annotations

from ppal_backend.rounds.detections_store import read_detections
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import PoolEntry, QueueEntry


def read_queue(folder: RoundFolder) -> list[QueueEntry]:
    """Every ranked task, the one to label first in front, with what was detected on its image, without embeddings."""
    sizes = {entry["image_id"]: PoolEntry(**entry) for entry in folder.read("dataset/pool.json")}
    detections = {d.image_id: d for d, _ in read_detections(folder / "detections", only_boxes=True)}
    queue = []
    for task_id in folder.read("query_set.json")["queue"]:
        entry = sizes.get(task_id)
        width, height = (entry.width, entry.height) if entry else (0, 0)
        queue.append(QueueEntry(task_id, detections.get(task_id), width, height))
    return queue
