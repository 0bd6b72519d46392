"""A project's tasks and annotations on disk: read whole, or taken over from an earlier round with what changed since.

A snapshot is a folder with ``label_config.xml``, ``annotated.json`` (every task with an annotation, as Label Studio
exports it), ``pool.jsonl`` (id, image address and comparable data of every task without a submitted one, by rising id)
and, written last, ``snapshot.json``: up to when it knows of changes.

Label Studio tells which tasks changed since a time: annotations made, edited or deleted, tasks made or edited. What it
does not tell (deleted tasks, changes in bulk) shows in its counts of tasks, annotations and skips: where one differs
from what was put together, the project is read whole. What was changed in bulk and left all counts and times as they
were would be seen by neither; so only rankings take over, and a training reads everything.
"""

from __future__ import annotations

import heapq
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from ppal_backend.files import atomic_file, numbered_before, read_json, write_json
from ppal_backend.label_studio.client import DamagedExport, LabelStudioClient, read_export
from ppal_backend.label_studio.schema import LabelSchema, parse_label_config
from ppal_backend.structures.steering import comparable

log = logging.getLogger(__name__)

SNAPSHOT = "snapshot.json"
OVERLAP = timedelta(hours=1)
"""How much before the last change is asked from: a long transaction shows at its end, with times from before it."""
MOST_CHANGED = 0.25
"""Share of the tasks that may have changed; above, reading everything is as fast."""
_COUNTS = ("task_number", "total_annotations_number", "skipped_annotations_number")


def take_snapshot(
    client: LabelStudioClient, project_id: int, folder: Path, from_name: str | None, earlier: Path | None = None
) -> list[int]:
    """Write a snapshot; the ids of all annotations in it.

    Args:
        client: Label Studio.
        project_id: Project.
        folder: Where to.
        from_name: The control to use; see ``parse_label_config``.
        earlier: Folder of an earlier snapshot of the project to go on from; None reads everything.
    """
    project = client.project(project_id)
    config = str(project["label_config"])
    schema = parse_label_config(config, from_name)
    with atomic_file(folder / "label_config.xml", "w") as file:
        file.write(config)
    most = MOST_CHANGED * int(project.get("task_number") or 0)
    note = None if earlier is None else _update_earlier(client, project_id, folder, schema, earlier, config, most)
    if note is None:
        note = _read_whole(client, project_id, folder, schema)
    write_json(folder / SNAPSHOT, note["told"])
    ids: list[int] = note["annotation_ids"]
    return ids


def earlier_snapshot(folder: Path) -> Path | None:
    """The newest snapshot of an earlier round beside the round that ``folder`` belongs to; None where there is none."""
    found = (earlier / folder.name for earlier in numbered_before(folder.parent))
    return next((place for place in found if (place / SNAPSHOT).is_file()), None)


def _read_whole(client: LabelStudioClient, project_id: int, folder: Path, schema: LabelSchema) -> dict[str, Any]:
    until = client.last_change(project_id)  # first: what changes from here on is asked for the next time
    listed = set()
    with atomic_file(folder / "pool.jsonl", "w") as file:
        for task_id, data in client.unlabelled_tasks(project_id):
            file.write(_pool_line(task_id, data, schema))
            listed.add(task_id)
    client.download_export(project_id, folder / "annotated.json")
    ids: list[int] = []
    for task in read_export(folder / "annotated.json"):
        ids += _annotation_ids(task)
        listed.add(int(task["id"]))
    if client.task_count(project_id) > len(listed):
        _add_unlisted(client, project_id, folder / "pool.jsonl", schema, listed)
    return {"annotation_ids": ids, "told": {"until": until, "taken_over": None}}


def _add_unlisted(
    client: LabelStudioClient, project_id: int, pool: Path, schema: LabelSchema, listed: Collection[int]
) -> None:
    """Add to the pool what neither listing held: tasks that came meanwhile, and those of which Label Studio's counter
    says that they are annotated while they are not."""
    missing = {i: _pool_line(i, data, schema) for i, data in client.all_tasks(project_id) if i not in listed}
    log.info("project %d: %d tasks were in no listing, they are in the pool", project_id, len(missing))
    _write_merged(pool, pool, (), missing)


def _update_earlier(
    client: LabelStudioClient,
    project_id: int,
    folder: Path,
    schema: LabelSchema,
    earlier: Path,
    config: str,
    most: float,
) -> dict[str, Any] | None:
    """Put the snapshot together; None where that cannot be done, does not add up, or more than ``most`` changed."""
    try:
        until = str(read_json(earlier / SNAPSHOT)["until"])
        same = (earlier / "label_config.xml").read_text(encoding="utf-8") == config
        before = datetime.fromisoformat(until) - OVERLAP
    except (OSError, ValueError, KeyError) as error:
        log.info("project %d is read whole: the snapshot in %s cannot be used (%r)", project_id, earlier, error)
        return None
    if not same:
        return None  # the image may stand elsewhere in the tasks' data
    changed: dict[int, Mapping[str, Any]] = {}
    for task in client.changed_tasks(project_id, before):
        changed[int(task["id"])] = task
        until = max(until, str(task["updated_at"]))
        if len(changed) > most:
            return None
    try:
        return _put_together(client, project_id, folder, schema, earlier, changed, until)
    except (OSError, ValueError, KeyError, DamagedExport) as error:
        log.warning("project %d is read whole: the snapshot in %s is damaged (%r)", project_id, earlier, error)
        return None


def _put_together(
    client: LabelStudioClient,
    project_id: int,
    folder: Path,
    schema: LabelSchema,
    earlier: Path,
    changed: Mapping[int, Mapping[str, Any]],
    until: str,
) -> dict[str, Any] | None:
    """The snapshot of an earlier one and what changed; None where it is not what Label Studio counts."""
    pooled = {i: t for i, t in changed.items() if not t["total_annotations"]}
    annotated = sorted(i for i, t in changed.items() if t["total_annotations"] or t["cancelled_annotations"])
    ids, tasks = _merge_annotated(client, project_id, folder, earlier, annotated, changed)
    _merge_pool(folder, earlier, schema, pooled, changed, tasks)
    told = client.project(project_id)
    wanted = [int(told.get(name) or 0) for name in _COUNTS]
    got = [len(tasks), ids["submitted"], ids["skipped"]]
    if got != wanted:
        counts = dict(zip(_COUNTS, wanted, strict=True))
        log.info("project %d is read whole: expected %s, got %s", project_id, counts, got)
        return None
    return {"annotation_ids": ids["all"], "told": {"until": until, "taken_over": len(tasks) - len(changed)}}


def _merge_annotated(
    client: LabelStudioClient,
    project_id: int,
    folder: Path,
    earlier: Path,
    annotated: Iterable[int],
    changed: Collection[int],
) -> tuple[dict[str, Any], set[int]]:
    """Write ``annotated.json``; ids of its annotations, how many are submitted and skipped, and ids of its tasks."""
    all_ids: list[int] = []
    tasks: set[int] = set()
    skipped = 0
    kept = (t for t in read_export(earlier / "annotated.json") if int(t["id"]) not in changed)
    with atomic_file(folder / "annotated.json", "w") as file:
        file.write("[")
        for task in chain(kept, client.exported_tasks(project_id, annotated)):
            file.write(("," if tasks else "") + "\n" + json.dumps(task, separators=(",", ":")))
            tasks.add(int(task["id"]))
            all_ids += _annotation_ids(task)
            skipped += sum(bool(a.get("was_cancelled")) for a in task.get("annotations") or ())
        file.write("\n]")
    return {"all": all_ids, "submitted": len(all_ids) - skipped, "skipped": skipped}, tasks


def _merge_pool(
    folder: Path,
    earlier: Path,
    schema: LabelSchema,
    pooled: Mapping[int, Mapping[str, Any]],
    changed: Collection[int],
    tasks: set[int],
) -> None:
    """Write ``pool.jsonl`` and add its tasks to ``tasks``."""
    new = {i: _pool_line(i, task["data"], schema) for i, task in pooled.items()}
    tasks.update(_write_merged(folder / "pool.jsonl", earlier / "pool.jsonl", changed, new))


def _write_merged(path: Path, earlier: Path, gone: Collection[int], new: Mapping[int, str]) -> list[int]:
    """Write a pool of another one's lines, without those of some tasks and with new ones; ids of its tasks."""
    written = []
    with earlier.open(encoding="utf-8") as old, atomic_file(path, "w") as file:
        known = ((int(line[1 : line.index(",")]), line) for line in old)
        kept = ((task_id, line) for task_id, line in known if task_id not in gone)
        for task_id, line in heapq.merge(kept, sorted(new.items())):
            file.write(line)
            written.append(task_id)
    return written


def _pool_line(task_id: int, data: Mapping[str, Any], schema: LabelSchema) -> str:
    return json.dumps([task_id, schema.image.url(data), comparable(data)]) + "\n"


def read_pool(path: Path) -> Iterator[tuple[int, str | None, dict[str, str]]]:
    """Id, image address and comparable data of each task of a ``pool.jsonl``; older releases wrote no data."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            task_id, url, *data = json.loads(line)
            yield int(task_id), url, data[0] if data else {}


def _annotation_ids(task: Mapping[str, Any]) -> list[int]:
    return [int(a["id"]) for a in task.get("annotations") or ()]
