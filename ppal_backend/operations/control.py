"""What people tell a project, by a command or a button: cancel, pause, resume, try again, and back to a version; and
when a round starts without them.

The first four write a wish into the store, which the worker fulfils.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from ppal_backend.errors import StateError
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.publish import LabelStudioPublisher, activate_version
from ppal_backend.operations.pruning import move_lost_away
from ppal_backend.rounds.detections_store import read_queue
from ppal_backend.rounds.folder import RoundFolder, Rounds, need_intact
from ppal_backend.settings import Settings
from ppal_backend.store import ModelVersion, RoundRecord, Store
from ppal_backend.structures.quality import count
from ppal_backend.structures.round import ModelRef, RoundSpec

log = logging.getLogger(__name__)

PAUSED = "its rounds are paused; Resume on the dashboard or `ppal resume {}` lets them go on"
STATE = "rollback.json"


def cancel(store: Store, project_id: int) -> list[RoundRecord]:
    """Stop the open rounds for good; the annotations that asked for a training do not ask for another one.

    Returns:
        The rounds as they are now: one that runs stops at its next safe point.

    Raises:
        StateError: the project is not connected, or has no open round.
    """
    store.projects.get(project_id)
    rounds = [record for record in store.rounds.of_project(project_id) if record.finished_at is None]
    if not rounds:
        raise StateError(f"project {project_id} has no open round, so there is nothing to cancel")
    for record in rounds:
        store.rounds.ask_cancel(record.id)
        if record.kind == "train":
            store.ledger.postpone(project_id, record.number)
    return [store.rounds.get(record.id) for record in rounds]


def pause(store: Store, project_id: int) -> bool:
    """Hold a project's rounds: the running one saves what it has and leaves. Whether that is new.

    Raises:
        StateError: the project is not connected.
    """
    changed = store.projects.set_paused(project_id, True)
    store.projects.set_problem(project_id, "pause", PAUSED.format(project_id))
    return changed


def portion(store: Store, project_id: int, budget: int) -> int:
    """How many new annotations start a training by themselves: the budget, after a failure too, and twice as many for
    each further failure with the same settings. What can never succeed is tried ever more seldom, however fast people
    label.

    Args:
        store: the state.
        project_id: the project.
        budget: of the project's options.
    """
    return int(budget * 2 ** max(0, store.rounds.failed_trainings(project_id) - 1))


def corrections(store: Store, project_id: int) -> int:
    """Annotations of the newest training that were changed or deleted since, should it have failed; else 0."""
    return store.ledger.corrected(project_id) if store.rounds.failed_training(project_id) else 0


def annotations_missing(store: Store, project_id: int, budget: int) -> int:
    """How many more annotations start a training by themselves, none or less: it is due. A correction after a failure
    counts as much as a whole budget: it may be what the failed training asked for. As the portion doubles, twice as
    many are wanted after each further failure.

    Args:
        store: the state.
        project_id: the project.
        budget: of the project's options.
    """
    there = store.ledger.new_count(project_id) + budget * corrections(store, project_id)
    return portion(store, project_id, budget) - there


def again_in_words(store: Store, failed: RoundRecord, budget: int) -> str:
    """When what failed is tried again, and how at once, in a sentence without its end.

    Args:
        store: the state.
        failed: the round.
        budget: of the project's options.
    """
    left = annotations_missing(store, failed.project_id, budget)
    when = f"after {count(left, 'more annotation')}" if left > 0 else "within seconds"
    if left > 0 and store.rounds.failed_training(failed.project_id):
        earlier = count(-(-left // budget), "earlier annotation is", "earlier annotations are")
        when += f", or when {earlier} corrected or deleted"
    command = f"ppal round {failed.project_id}{' --rank' if failed.kind == 'rank' else ''}"
    return (
        f"A training starts by itself {when}, and round {failed.number} is tried again when the labeling config or an "
        f"option changes; Try again (or `{command}`) starts it at once"
    )


def try_again(store: Store, project_id: int) -> str:
    """Try at once what waits or has failed: the round, and the poll of the project. What was done, in a sentence.

    Raises:
        StateError: the project is not connected.
    """
    store.projects.get(project_id)
    store.projects.ask_poll(project_id)
    waiting = store.rounds.try_now(project_id)
    if waiting is not None:
        return f"Round {waiting.number} goes on now."
    failed = store.rounds.failure(project_id)
    if failed is not None:
        record = store.rounds.request(project_id, failed.kind, f"round {failed.number} failed and somebody tried again")
        return f"Round {record.number} is asked for."
    return "Label Studio is asked again within seconds."


def resume(store: Store, project_id: int) -> bool:
    """Let a paused project's rounds go on from where they were. Whether they were paused.

    Raises:
        StateError: the project is not connected.
    """
    changed = store.projects.set_paused(project_id, False)
    store.projects.set_problem(project_id, "pause", "")
    return changed


@dataclass(frozen=True)
class RolledBack:
    """The version now in force; another name than asked for when its queue had to be published again."""

    version: str
    predictions: int
    published_again: bool


def roll_back(settings: Settings, store: Store, client: LabelStudioClient, project_id: int, name: str) -> RolledBack:
    """Make an earlier version the one in force again; doing it twice changes nothing.

    While Label Studio holds the version's predictions this is one request, else its queue is published again from the
    round's files. Tasks imported since then come after the ranked ones.

    Raises:
        StateError: no such project or version, its files are gone or damaged, or a round is publishing right now.
        LabelStudioError: Label Studio did not take it; the queue is as it was.
    """
    store.projects.get(project_id)
    version = store.versions.get(project_id, name)
    move_lost_away(settings, store, project_id)
    with store.versions.going_back(version):  # before its files are looked at: they stay from now on
        return _roll_back(settings, store, client, version)


def _roll_back(settings: Settings, store: Store, client: LabelStudioClient, version: ModelVersion) -> RolledBack:
    project_id, name = version.project_id, version.version
    key, rounds = store.projects.get(project_id).key, Rounds(settings)
    if version.checkpoint:
        need_intact(rounds.fetch_checkpoint(key, version.checkpoint), name)
    running = store.rounds.running(project_id)
    if running is not None and running.step == "publish" and project_id in store.rounds.held_projects():
        raise StateError(f"round {running.number} of project {project_id} is publishing right now; try again soon")
    stored = client.model_version_counts(project_id).get(name, 0)
    if stored:
        activate_version(client, project_id, name)
        store.versions.activate(version)
        return RolledBack(name, stored, published_again=False)
    rounds.fetch(key, project_id, version.round_number, ("dataset", "infer", "query"))
    return _publish_again(settings, store, client, version)


def _publish_again(settings: Settings, store: Store, client: LabelStudioClient, version: ModelVersion) -> RolledBack:
    rounds = Rounds(settings)
    path = rounds.path(version.project_id, version.round_number)
    if not rounds.has_queue(version.project_id, version.round_number):
        raise StateError(
            f"expected version {version.version} in Label Studio or its files in {path}, got "
            "neither: they were removed (PPAL_KEEP_VERSIONS, PPAL_KEEP_ARTIFACTS); choose a newer version"
        )
    folder = RoundFolder(path)
    queue = read_queue(folder)
    if not queue:
        raise StateError(f"version {version.version} put no task in order, so there is no queue to go back to")
    spec = RoundSpec.from_dict(folder.read("spec.json"))
    model = None
    if version.checkpoint:
        checkpoint = str(settings.model_dir.resolve() / version.checkpoint)
        model = ModelRef(version.detector, checkpoint, version.labels, version.difficulty)
    state = folder.read(STATE) if (folder / STATE).is_file() else None
    again = LabelStudioPublisher(client, settings.keep_versions, most=settings.publish_tasks).publish(
        spec, model, queue, state, lambda new: folder.write(STATE, new)
    )
    store.versions.activate(replace(version, version=again))
    published = int(folder.read(STATE)["expected"])
    (folder / STATE).unlink()
    return RolledBack(again, published, published_again=True)
