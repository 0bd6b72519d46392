"""What holds in Label Studio between rounds: that it serves the queue, sends its events here, and in which order.

Every poll looks. What is wrong is a problem of the project, which status, doctor, dashboard and metrics read from the
state. The two fields that a published queue sets, and the webhook, are set right once; who changes them again means
it, and is told what it costs instead.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ppal_backend.errors import LabelStudioError, LabelStudioUnavailable
from ppal_backend.files import read_json
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.connection import check_webhook, model_connections
from ppal_backend.label_studio.publish import EMPTY, SAMPLING, sampling_problem, version_problem
from ppal_backend.rounds.folder import Rounds
from ppal_backend.settings import Settings
from ppal_backend.store import ModelVersion, ProjectRecord, Store

log = logging.getLogger(__name__)

FIRST_TASKS = 20
FRONT = 3 * FIRST_TASKS
LEAST_QUEUE = 4 * FRONT
_ONCE, _LEFT = 1, 2


def check_project(
    settings: Settings, store: Store, client: LabelStudioClient, project_id: int, token: str | None
) -> dict[str, str]:
    """Look at a project in Label Studio and set right what is ours.

    Args:
        settings: the operator's settings.
        store: the state.
        client: the project's Label Studio.
        project_id: the project.
        token: what its webhook must send; None when nobody has to identify himself.

    Returns:
        What is wrong by topic, "" where all is well; a topic that could not be judged now is missing.

    Raises:
        LabelStudioUnavailable: it is down.
    """
    project = store.projects.get(project_id)
    found: dict[str, str] = {}
    for topic, check in (("webhook", keep_webhook), ("queue", _keep_queue), ("order", _served_order)):
        try:
            found |= check(settings, store, client, project, token)
        except LabelStudioUnavailable:
            raise
        except LabelStudioError as error:
            found[topic] = f"it could not be looked at: {error}"
    return found


def keep_webhook(
    settings: Settings, store: Store, client: LabelStudioClient, project: ProjectRecord, token: str | None
) -> dict[str, str]:
    """See that the project's events come here: as :func:`check_project`, for the topic ``webhook``."""
    times = project.repairs.get("webhook", 0)
    user = settings.basic_auth_user
    problem, undone = check_webhook(client, project.id, settings.public_url, token, user, restore=times < _ONCE)
    if undone:
        log.warning("project %d: its webhook was gone or switched off, and is back", project.id)
        _remember(store, project.id, "webhook", _ONCE)
    elif problem and times == _ONCE:
        _remember(store, project.id, "webhook", _LEFT)
    elif not problem and times == _LEFT:
        _remember(store, project.id, "webhook", 0)
    return {"webhook": problem}


def keeps_own_sampling(project: ProjectRecord) -> bool:
    """Whether the project's people have chosen another task sampling a second time, so that it stays theirs."""
    return bool(project.repairs.get("sampling", 0) >= _LEFT)


def _keep_queue(
    settings: Settings, store: Store, client: LabelStudioClient, project: ProjectRecord, _token: str | None
) -> dict[str, str]:
    if _publishing(store, project.id):
        return {}
    active = store.versions.active(project.id)
    if active is None or active.version.endswith(EMPTY):
        return {"queue": ""}
    shown = client.project(project.id)
    if _publishing(store, project.id) or store.versions.active(project.id) != active:
        return {}  # what was read may be of before or after: the next poll looks again
    sampling = sampling_problem(shown.get("sampling"))
    titles: list[object] = []
    if shown.get("model_version") not in (active.version, "", None):
        titles = [row.get("title") for row in model_connections(client, project.id)]
    version = version_problem(project.id, shown.get("model_version"), active.version, titles)
    chosen = _is_chosen(shown.get("model_version"), store, project.id, titles)
    texts = [
        _repair(settings, store, client, project.id, "sampling", {"sampling": SAMPLING}, sampling, True),
        _repair(
            settings, store, client, project.id, f"model_version {active.version}",
            {"model_version": active.version}, version, not chosen,
        ),
    ]  # fmt: skip
    return {"queue": ". Also: ".join(text for text in texts if text)}


def _is_chosen(shown: object, store: Store, project_id: int, titles: list[object]) -> bool:
    """Whether somebody chose this model version: not when it is empty, an older one of ours, or the one live model
    (which Label Studio sets when a model is connected to a project that shows none)."""
    if not shown or titles == [shown]:
        return False
    return not any(version.version == shown for version in store.versions.of_project(project_id))


def _repair(
    settings: Settings,
    store: Store,
    client: LabelStudioClient,
    project_id: int,
    name: str,
    fields: Mapping[str, Any],
    problem: str,
    ours: bool,
) -> str:
    """Set fields of the project right unless a person insists; what is wrong then."""
    times = store.projects.get(project_id).repairs.get(name, 0)
    if not problem:
        if times == _LEFT:
            _remember(store, project_id, name, 0)
        return ""
    if not settings.repair_queue or not ours:
        return problem
    if times < _ONCE:
        _remember(store, project_id, name, _ONCE)  # before the request: one that is cut off counts
        client.patch_project(project_id, **fields)
        log.warning("project %d: %s was set right: %s", project_id, name.split()[0].replace("_", " "), problem)
        return ""
    _remember(store, project_id, name, _LEFT)
    seen, _, advice = problem.rpartition("; ")
    return f"{seen}. It was set right once and has been changed again, so it stays; {advice}"


def _remember(store: Store, project_id: int, name: str, times: int) -> None:
    """Keep how often something was set right; what was said of other model versions goes."""
    kept = store.projects.get(project_id).repairs
    stale = {key for key in kept if key.split()[0] == name.split()[0]}
    others = {key: value for key, value in kept.items() if key not in stale}
    store.projects.set_repairs(project_id, others | ({name: times} if times else {}))


def _publishing(store: Store, project_id: int) -> bool:
    running = store.rounds.running(project_id)
    return running is not None and running.step == "publish"


def _served_order(
    settings: Settings, store: Store, client: LabelStudioClient, project: ProjectRecord, _token: str | None
) -> dict[str, str]:
    """Once for each queue: whether the tasks annotated first stood in its front.

    Asking Label Studio for the next task would tell at once, and lock that task for a day against everybody else.
    """
    versions = store.versions.of_project(project.id)
    active = versions[-1] if versions and versions[-1].active else None
    judged = project.repairs.get("order", "")
    if active is None or active.created_at is None:
        return {"order": ""}
    if judged == active.version:
        return {}
    first = store.ledger.first_annotated(project.id, active.created_at, FIRST_TASKS)
    queue = _queue(settings, project, active) if len(first) == FIRST_TASKS else ()
    ranked = [task_id for task_id in first if task_id in set(queue)]
    if len(ranked) < FIRST_TASKS or len(queue) < LEAST_QUEUE:
        return {"order": ""}
    kept = store.projects.get(project.id).repairs
    store.projects.set_repairs(project.id, {**kept, "order": active.version})
    front = set(queue[:FRONT])
    behind = sum(task_id not in front for task_id in ranked)
    if behind <= FIRST_TASKS / 2:
        return {"order": ""}
    return {
        "order": f"{behind} of the first {FIRST_TASKS} tasks annotated since {active.version} was published stood "
        f"behind place {FRONT} of its queue: it is not what is labelled; label with Label All Tasks, or where Label "
        "Studio itself mixes the order (Enterprise with several annotators) open the tab PPAL queue and use Label "
        "Tasks As Displayed"
    }


def _queue(settings: Settings, project: ProjectRecord, version: ModelVersion) -> tuple[int, ...]:
    """The published order, () where this machine does not hold it."""
    path = Rounds(settings).path(project.id, version.round_number) / "query_set.json"
    try:
        return tuple(int(i) for i in read_json(path)["queue"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()
