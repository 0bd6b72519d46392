"""Reading a large project: whole, as a training does, and from the last snapshot and what changed, as a ranking does.

    python -m benchmarks.exports [--tasks 200000] [--real 0] [--json]

200,000 tasks, a tenth of them annotated with 10 boxes, answered in the process by a double of Label Studio; then a real
one with so many tasks. Between the two snapshots ``CHANGED`` tasks are annotated. Memory is the highest of the process,
the double included. The real project has just been imported, so there the last hour is not asked for once more.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx

from benchmarks.large_project import ANNOTATED_SHARE, LABELS, Server, regions_of
from ppal_backend.demo.run import label_config_of
from ppal_backend.label_studio import snapshot
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.snapshot import SNAPSHOT, take_snapshot

CHANGED = 100
_OLD, _NEW = "2026-01-01T00:00:00.000000Z", "2026-01-02T00:00:00.000000Z"


class ManyTasks:
    """A project of so many tasks; a tenth are annotated, and those in ``changed`` since yesterday."""

    def __init__(self, tasks: int) -> None:
        self.tasks, self.annotated, self.changed = tasks, round(tasks * ANNOTATED_SHARE), set[int]()
        self.sent_bytes = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        path, params = request.url.path, request.url.params
        if path == "/api/tasks":
            return self._sent(json.dumps({"tasks": list(self._page(params))}).encode())
        if path.endswith("/export"):
            wanted = [int(i) for i in params.get_list("ids[]")]
            return httpx.Response(200, stream=_Stream(self._export(wanted or range(1, self.tasks + 1))))
        counts = {"task_number": self.tasks, "total_annotations_number": self.annotated + len(self.changed)}
        return httpx.Response(200, json={"id": 1, "label_config": label_config_of(LABELS), **counts})

    def is_annotated(self, task_id: int) -> bool:
        """Whether it has an annotation."""
        return task_id <= self.annotated or task_id in self.changed

    def _page(self, params: httpx.QueryParams) -> Iterator[dict[str, Any]]:
        query, size = json.loads(params["query"]), int(params["page_size"])
        items = {item["filter"].rsplit(":", 1)[-1]: item["value"] for item in query["filters"]["items"]}
        if "updated_at" in items or query["ordering"] == ["-tasks:updated_at"]:
            ids: Sequence[int] = sorted(self.changed) or [self.tasks]
        else:
            ids = range(max(int(items.get("id", 0)), 0) + 1, self.tasks + 1)
            ids = [i for i in ids[: size + self.annotated + len(self.changed)] if not self.is_annotated(i)]
        for task_id in ids[:size]:
            image = f"s3://images/{task_id:08d}.jpg"
            yield {"id": task_id, "data": {"image": image}, "updated_at": _NEW if task_id in self.changed else _OLD,
                   "total_annotations": int(self.is_annotated(task_id)), "cancelled_annotations": 0}  # fmt: skip

    def _export(self, ids: Sequence[int]) -> Iterator[bytes]:
        first = True
        for task_id in ids:
            if self.is_annotated(task_id):
                annotation = {"id": task_id, "was_cancelled": False, "result": regions_of(task_id)}
                data = {"image": f"s3://images/{task_id:08d}.jpg"}
                row = json.dumps({"id": task_id, "data": data, "annotations": [annotation]}).encode()
                yield (b"[" if first else b",") + row
                self.sent_bytes += len(row)
                first = False
        yield b"[]" if first else b"]"

    def _sent(self, body: bytes) -> httpx.Response:
        self.sent_bytes += len(body)
        return httpx.Response(200, content=body)


class _Stream(httpx.SyncByteStream):
    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[bytes]:
        return self._parts


def _timed(client: LabelStudioClient, project_id: int, folder: Path, earlier: Path | None) -> dict[str, Any]:
    started, cpu = time.perf_counter(), time.process_time()
    ids = take_snapshot(client, project_id, folder, None, earlier)
    return {
        "s": round(time.perf_counter() - started, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "annotations": len(ids),
        "taken_over": json.loads((folder / SNAPSHOT).read_text())["taken_over"],
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    }


def with_double(tasks: int, folder: Path) -> dict[str, Any]:
    """Both snapshots of a project that is answered in the process; seconds hold the double's."""
    world = ManyTasks(tasks)
    with LabelStudioClient("http://label-studio", "0" * 40, http_transport=httpx.MockTransport(world)) as client:
        whole = _timed(client, 1, folder / "1", None)
        whole["sent_mib"], world.sent_bytes = round(world.sent_bytes / 2**20, 1), 0
        world.changed = set(range(world.annotated + 1, world.annotated + 1 + CHANGED))
        later = _timed(client, 1, folder / "2", folder / "1")
        later["sent_mib"] = round(world.sent_bytes / 2**20, 1)
    return {"tasks": tasks, "whole": whole, "what changed": later}


def with_label_studio(tasks: int, folder: Path) -> dict[str, Any]:
    """Both snapshots of a real project."""
    with ExitStack() as stack:
        place = Server(stack, folder)
        project_id = place.project(tasks, round(tasks * ANNOTATED_SHARE))
        whole = _timed(place.client, project_id, folder / "1", None)
        time.sleep(1.0)
        for task_id, _ in zip(place.client.unlabelled_tasks(project_id), range(CHANGED), strict=False):
            place.server.session.post(f"/api/tasks/{task_id[0]}/annotations/", json={"result": regions_of(1)})
        snapshot.OVERLAP = timedelta(0)
        later = _timed(place.client, project_id, folder / "2", folder / "1")
        return {"tasks": tasks, "whole": whole, "what changed": later}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Snapshots of a large project.")
    parser.add_argument("--tasks", type=int, default=200_000, help="tasks of the double; 0: not")
    parser.add_argument("--real", type=int, default=0, help="tasks of a real Label Studio; 0: not")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        if options.tasks:
            report["double"] = with_double(options.tasks, Path(name) / "double")
        if options.real:
            report["label_studio"] = with_label_studio(options.real, Path(name) / "real")
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
