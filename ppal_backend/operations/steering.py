"""People steer a project's queue: pins and quotas, once for the command line and the dashboard.

What they ask for is kept, and a ranking is asked for, which puts the queue in its new order without a training. A round
that has not chosen its candidates yet takes it up as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ppal_backend.errors import StateError
from ppal_backend.label_studio.schema import parse_label_config
from ppal_backend.settings import Settings
from ppal_backend.store import Store
from ppal_backend.store.steering import Place
from ppal_backend.structures.quality import count, listed
from ppal_backend.structures.steering import Quota, Steering

LARGEST_TASK_ID = 2**63 - 1


@dataclass(frozen=True)
class Steered:
    """What was changed, in a sentence, and the round that will put the queue in its new order; None: nothing was."""

    text: str
    round_number: int | None


def pin(store: Store, project_id: int, task_ids: Sequence[int], place: Place) -> Steered:
    """Put tasks in front of the queue, behind those that were put there before, or at its end.

    Raises:
        StateError: The project is not connected; a task is labelled already or no task id; there are too many.
    """
    store.projects.get(project_id)
    ids = list(dict.fromkeys(task_ids))
    if not ids or not all(0 < i <= LARGEST_TASK_ID for i in ids):
        raise StateError(f"expected ids of tasks, whole numbers from 1 on, got {ids[:5]}; see them in Label Studio")
    usable = store.ledger.labelled_tasks(project_id)
    labelled = [task_id for task_id in ids if task_id in usable]
    if labelled:
        named = ", ".join(map(str, labelled[:5]))
        raise StateError(f"expected tasks that are still to be labelled, got labelled ones: {named}; leave them out")
    store.steering.pin(project_id, ids, place)
    where = "in front of the queue" if place == "first" else "at the end of the queue"
    return _asked(store, project_id, f"{_tasks(ids)} {where}")


def unpin(store: Store, project_id: int, task_ids: Sequence[int]) -> Steered:
    """Take pins back: the tasks come where their round puts them.

    Raises:
        StateError: The project is not connected.
    """
    store.projects.get(project_id)
    removed = store.steering.unpin(project_id, task_ids)
    if not removed:
        return Steered("None of these tasks is pinned.", None)
    return _asked(store, project_id, f"{count(removed, 'pin')} taken back")


def add_quota(settings: Settings, store: Store, project_id: int, text: str) -> Steered:
    """Keep a quota (``30% label:stingray``); one on the same takes its place.

    Raises:
        StateError: The project is not connected, or the text is no quota of it.
    """
    project = store.projects.get(project_id)
    try:
        quota = Quota.parse(text)
    except ValueError as error:
        raise StateError(str(error)) from None
    if quota.kind == "label":
        options = settings.project_options(project.options)
        labels = parse_label_config(project.label_config, options.from_name).labels
        if quota.value not in labels:
            raise StateError(
                f"expected a label of the project ({listed(labels, 8)}), got {quota.value[:80]!r}; correct the quota"
            )
    store.steering.add_quota(project_id, quota)
    return _asked(store, project_id, f"kept: {quota.text}")


def remove_quota(store: Store, project_id: int, quota_id: int) -> Steered:
    """Take a quota back.

    Raises:
        StateError: The project is not connected, or has no such quota.
    """
    store.projects.get(project_id)
    if not store.steering.remove_quota(project_id, quota_id):
        raise StateError(f"project {project_id} has no quota {quota_id}; ppal pin {project_id} lists them")
    return _asked(store, project_id, "the quota is taken back")


def listing(store: Store, project_id: int) -> dict[str, Any]:
    """What is asked of the queue: ids of pinned tasks, and quotas with their words.

    Raises:
        StateError: The project is not connected.
    """
    store.projects.get(project_id)
    asked: Steering = store.steering.of_project(project_id)
    quotas = [{**asdict(quota), "text": quota.text} for quota in asked.quotas]
    return {"project": project_id, "first": list(asked.first), "last": list(asked.last), "quotas": quotas}


def _asked(store: Store, project_id: int, what: str) -> Steered:
    record = store.rounds.request(project_id, "rank", f"people steer the queue: {what}")
    after = f"round {record.number} puts the queue in its new order"
    if store.projects.get(project_id).paused:
        after += " once the project's rounds are resumed"
    return Steered(f"{what[:1].upper()}{what[1:]}; {after}.", record.number)


def _tasks(ids: Sequence[int]) -> str:
    return f"task{'' if len(ids) == 1 else 's'} {listed(ids)}"
