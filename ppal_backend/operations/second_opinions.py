"""Tasks that measure the detector, served once more to other people, to see how far two people agree.

Label Studio counts a task as done once as many people annotated it as its ``overlap`` says. That of some labelled
tasks of the evaluation set is raised by one, and a prediction without boxes puts them in front of the queue in force:
whoever annotated a task does not get it again, others get it among their next ones, with nothing drawn on it. Their
agreement is told on the page Quality, as that of every task with several people's annotations.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator
from typing import Any

from ppal_backend.datasets.consensus import annotator_of
from ppal_backend.errors import LabelStudioError, StateError
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.transport import NotFound
from ppal_backend.store import Store
from ppal_backend.structures.round import SECOND_OPINION_SCORE

log = logging.getLogger(__name__)


def serve_again(client: LabelStudioClient, store: Store, project_id: int, count: int) -> list[int]:
    """Have some labelled tasks of the evaluation set annotated by another person too.

    Args:
        client: the project's Label Studio.
        store: the state.
        project_id: the project.
        count: how many tasks at most; those that are served again already, or were, are not taken.

    Returns:
        The tasks, fewer than ``count`` where there are no more.

    Raises:
        StateError: the project is not connected, a round is running, or no task of the evaluation set is labelled.
        LabelStudioError: Label Studio refused something.
    """
    store.projects.get(project_id)
    active = store.versions.active(project_id)
    measuring = sorted(i for i, side in store.sides.of_project(project_id).items() if side == "evaluation")
    if active is None or not measuring:
        raise StateError(
            f"expected labelled tasks of project {project_id} that measure the detector, got none; label some, and let "
            "a round read them"
        )
    if any(record.state == "running" for record in store.rounds.of_project(project_id)):
        raise StateError(f"a round of project {project_id} is running and will publish; try again when it is done")
    chosen: list[int] = []
    for task in _tasks(client, measuring):
        if len(chosen) == count:
            break
        if len(_people(task)) == 1 and int(task.get("overlap") or 1) == 1:
            chosen.append(int(task["id"]))
    if not chosen:
        return []
    rows = [{"task": i, "result": [], "score": SECOND_OPINION_SCORE, "model_version": active.version} for i in chosen]
    created = client.import_predictions(project_id, json.dumps(rows).encode())
    if created != len(rows):
        raise LabelStudioError(f"expected Label Studio to take {len(rows)} predictions, got {created}; run it again")
    for task_id in chosen:
        client.transport.write("PATCH", f"/api/tasks/{task_id}", json={"overlap": 2, "is_labeled": False})
    log.info("project %d: %d tasks are served to a second person", project_id, len(chosen))
    return chosen


def take_back(client: LabelStudioClient, store: Store, project_id: int) -> list[int]:
    """Take the tasks that nobody else annotated since out of the queue again; which ones.

    Raises:
        StateError: the project is not connected.
        LabelStudioError: Label Studio refused something.
    """
    store.projects.get(project_id)
    measuring = sorted(i for i, side in store.sides.of_project(project_id).items() if side == "evaluation")
    waiting = [
        int(task["id"])
        for task in _tasks(client, measuring)
        if len(_people(task)) == 1 and int(task.get("overlap") or 1) == 2 and not task.get("is_labeled")
    ]
    for task_id in waiting:
        client.transport.write("PATCH", f"/api/tasks/{task_id}", json={"overlap": 1, "is_labeled": True})
    return waiting


def _tasks(client: LabelStudioClient, task_ids: Collection[int]) -> Iterator[dict[str, Any]]:
    """The tasks as Label Studio has them now; deleted ones are passed over."""
    for task_id in task_ids:
        try:
            yield client.transport.get(f"/api/tasks/{task_id}")
        except NotFound:
            log.info("task %d is gone", task_id)


def _people(task: dict[str, Any]) -> set[Any]:
    """Who annotated a task; those who skipped it did not."""
    rows = [a for a in task.get("annotations") or () if not a.get("was_cancelled")]
    return {annotator_of(row) for row in rows}
