"""Must every task be ranked? What Label Studio does with a queue whose end has no prediction of the current version.

    python -m benchmarks.queue_tail [--tasks 10000] [--front 2000] [--postgres]

A project of unlabelled tasks in a real Label Studio. All of them are published with 10 boxes each, twice, then twice
the front alone: beside a whole older version, and after that was deleted. Each time it is noted

* how long publishing took, of it Label Studio's own time, and how long deleting the older version takes;
* whether a stream of ``SERVED`` tasks, each annotated when it comes, and the tab *PPAL queue* keep to the order;
* how long Label Studio takes for the next task;
* what is shown of a task behind the front.

At the end the front is labelled to its end, to see what comes then. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.large_project import BOXES, LABELS, Server, regions_of
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.publish import TAB_TITLE, QueueItem, delete_version, keep_queue_tab, publish
from ppal_backend.rig.label_studio_server import free_port
from ppal_backend.rig.servers import PostgresServer

SERVED = 40
SHORT_FRONT = 5
MORE = 10
PER_PAGE = 100


@contextmanager
def postgres_for_label_studio(folder: Path) -> Iterator[dict[str, str]]:
    """A PostgreSQL and the variables that make Label Studio use it."""
    folder.chmod(0o755)
    port, password = free_port(), "benchmark"
    server = PostgresServer(folder / "postgres", port, password, folder / "postgres.log", durable=False)
    server.start()
    try:
        server.ensure_database("labelstudio", "labelstudio", password)
        yield {
            "DJANGO_DB": "default", "POSTGRE_NAME": "labelstudio", "POSTGRE_USER": "labelstudio",
            "POSTGRE_PASSWORD": password, "POSTGRE_HOST": "127.0.0.1", "POSTGRE_PORT": str(port),
        }  # fmt: skip
    finally:
        server.stop()


class Queue:
    """A project whose tasks are published and served."""

    def __init__(self, place: Server, tasks: int, seed: int = 0) -> None:
        self.client, self.session = place.client, place.server.session
        self.project_id = place.project(tasks, 0)
        self.order = list(self.client.task_ids(self.project_id))
        random.Random(seed).shuffle(self.order)

    def publish(self, version: str, front: int | None = None) -> dict[str, Any]:
        """Publish the whole order, or its front alone; seconds in all and of Label Studio."""
        sent = _Seconds(self.client)
        items = (QueueItem(task_id, regions_of(task_id)) for task_id in self.order[:front])
        started = time.perf_counter()
        result = publish(self.client, self.project_id, version, items, keep=None)
        total_s = time.perf_counter() - started
        keep_queue_tab(self.client, self.project_id)
        return {
            "version": result.version,
            "stored": result.created,
            "publish_s": round(total_s, 2),
            "label_studio_s": round(sent.stop(), 2),
        }

    def serve(self, count: int) -> dict[str, Any]:
        """Let one annotator label so many tasks of the stream; whether they came in order, and seconds of a next."""
        wanted, got, seconds = self.order[:count], [], []
        for _ in range(count):
            started = time.perf_counter()
            task = self.session.get(f"/api/projects/{self.project_id}/next")
            seconds.append(time.perf_counter() - started)
            got.append(int(task["id"]))
            body = {"result": regions_of(got[-1]), "lead_time": 1.0}
            self.session.post(f"/api/tasks/{got[-1]}/annotations/", json=body)
        self.order = [task_id for task_id in self.order if task_id not in set(got)]
        return {"in_order": got == wanted, "next_median_s": round(statistics.median(seconds), 3), "served": got}

    def tab(self, count: int) -> dict[str, Any]:
        """Whether the first pages of the queue's tab are in order."""
        views = self.client.transport.get("/api/dm/views/", {"project": self.project_id})
        view = next(v["id"] for v in views if v["data"].get("title") == TAB_TITLE)
        found: list[int] = []
        started = time.perf_counter()
        for page in range(1, count // PER_PAGE + 1):
            query = {"view": view, "project": self.project_id, "page": page, "page_size": PER_PAGE, "include": "id"}
            found += [int(row["id"]) for row in self.client.transport.get("/api/tasks", query)["tasks"]]
        seconds = (time.perf_counter() - started) / max(count // PER_PAGE, 1)
        return {"in_order": found == self.order[: len(found)], "rows": len(found), "page_s": round(seconds, 2)}

    def shown_behind(self) -> dict[str, Any]:
        """What the last task of the order shows when it is opened from the list."""
        task = self.client.transport.get(f"/api/tasks/{self.order[-1]}", {"project": self.project_id})
        return {"versions": [p["model_version"] for p in task["predictions"]]}

    def delete(self, version: str) -> float:
        """Seconds that it takes to delete a version."""
        started = time.perf_counter()
        delete_version(self.client, self.project_id, version)
        return round(time.perf_counter() - started, 2)


class _Seconds:
    """Time spent in requests of a client until it is stopped."""

    def __init__(self, client: LabelStudioClient) -> None:
        self._http, self._send, self._sum = client.transport.http, client.transport.http.send, 0.0
        self._http.send = self._timed  # type: ignore[method-assign]

    def _timed(self, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._send(*arguments, **options)
        finally:
            self._sum += time.perf_counter() - started

    def stop(self) -> float:
        """The seconds."""
        self._http.send = self._send  # type: ignore[method-assign]
        return self._sum


def run(tasks: int, front: int, postgres: bool = False, folder: Path | None = None) -> dict[str, Any]:
    """All figures; in ``folder`` databases stay for another run, whose project is a new one."""
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        environment = stack.enter_context(postgres_for_label_studio(folder)) if postgres else {}
        place = Server(stack, folder, environment)
        queue = Queue(place, tasks)
        report: dict[str, Any] = {"tasks": tasks, "front": front, "boxes": BOXES, "labels": len(LABELS)}
        report["database"] = "PostgreSQL" if postgres else "SQLite"
        whole = queue.publish("whole")
        report["whole"] = {**whole, **_look(queue, front)}
        again = queue.publish("again")
        report["whole, beside a whole older one"] = again
        report["delete_whole_s"] = queue.delete(whole["version"])
        part = queue.publish("front", front)
        report["front, the rest older"] = {**part, **_look(queue, front)}
        report["delete_second_whole_s"] = queue.delete(again["version"])
        alone = queue.publish("alone", front)
        report["front, the rest without"] = {**alone, **_look(queue, front)}
        report["delete_front_s"] = queue.delete(part["version"])
        queue.publish("short", SHORT_FRONT)
        first, rest = queue.order[:SHORT_FRONT], queue.order[SHORT_FRONT:]
        got = queue.serve(SHORT_FRONT + MORE)["served"]
        report["past the front"] = {
            "front_in_order": got[:SHORT_FRONT] == first,
            "then_in_order": got[SHORT_FRONT:] == rest[:MORE],
            "all_of_the_project": set(got[SHORT_FRONT:]) <= set(rest),
            "repeated": len(got) - len(set(got)),
        }
        return {**report, "load_average": round(os.getloadavg()[0], 1)}


def _look(queue: Queue, front: int) -> dict[str, Any]:
    shown = queue.shown_behind()
    tab = queue.tab(min(front, 10 * PER_PAGE))
    served = queue.serve(SERVED)
    return {"tab": tab, "behind": shown, "stream": {k: served[k] for k in ("in_order", "next_median_s")}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="A queue whose end is not ranked, on a real Label Studio.")
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--front", type=int, default=2_000)
    parser.add_argument("--postgres", action="store_true", help="Label Studio on PostgreSQL instead of SQLite")
    parser.add_argument("--folder", type=Path, help="where databases are put; an empty one of its own by default")
    options = parser.parse_args(arguments)
    report = run(options.tasks, options.front, options.postgres, options.folder)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
