"""What people tell a project's rounds, by a command or a button: cancel, pause, resume.

They write a wish into the store; the worker fulfils it.
"""

from __future__ import annotations

from ppal_backend.errors import StateError
from ppal_backend.store import RoundRecord, Store

PAUSED = "its rounds are paused; Resume on the dashboard or `ppal resume {}` lets them go on"


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
            store.ledger.put_off(project_id, record.number)
    return [store.rounds.get(record.id) for record in rounds]


def pause(store: Store, project_id: int) -> bool:
    """Hold a project's rounds: the running one saves what it has and leaves. Whether that is new.

    Raises:
        StateError: the project is not connected.
    """
    changed = store.projects.set_paused(project_id, True)
    store.projects.set_problem(project_id, "pause", PAUSED.format(project_id))
    return changed


def resume(store: Store, project_id: int) -> bool:
    """Let a paused project's rounds go on from where they were. Whether they were paused.

    Raises:
        StateError: the project is not connected.
    """
    changed = store.projects.set_paused(project_id, False)
    store.projects.set_problem(project_id, "pause", "")
    return changed
