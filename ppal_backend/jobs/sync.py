"""From events and polls to a round: apply what came in to the ledger, then decide."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from ppal_backend.errors import LabelStudioError, SettingsError
from ppal_backend.settings import Settings
from ppal_backend.store import EventRecord, ProjectRecord, SeenAnnotation, Store

log = logging.getLogger(__name__)

BEFORE_EXPORT_ENDS = ("", "export")
EVENT_TRIES = 5
EVENT_BATCH = 100  # events that share a transaction; webhooks wait while it writes
POLL_BATCH = 1000  # tasks that a poll holds at a time
_UNEXPECTED_CONTENT = (KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class TaskUpdate:
    """A task that changed: when, and the annotations it has now."""

    task_id: int
    updated_at: str
    annotations: tuple[SeenAnnotation, ...]


UpdatesPort = Callable[[int, str], Iterable[TaskUpdate]]
"""Reads from Label Studio, piece by piece, which tasks of a project changed at or after a time ("" = ever); the oldest
change first."""


class Synchroniser:
    """Handles a project's events; safe to call at any time, any number of times.

    Args:
        store: the backend's memory.
        settings: for the options in force.
        updates: reads changed tasks from Label Studio.
        enqueue_round: tells the job queue that a project has a round to run.
    """

    def __init__(
        self, store: Store, settings: Settings, updates: UpdatesPort, enqueue_round: Callable[[int], None]
    ) -> None:
        self._store, self._settings = store, settings
        self._updates, self._enqueue_round = updates, enqueue_round
        self._next_poll: dict[int, float] = {}

    def __call__(self, project_id: int) -> None:
        project = self._store.projects.find(project_id)
        if project is None:
            log.warning("a job names project %d, which is not connected; ignored", project_id)
            return
        new_tasks = self._apply_events(project)
        if self.poll_is_due(project_id):
            self._poll(project)
        self._decide(project, new_tasks)

    def poll_is_due(self, project_id: int) -> bool:
        """Whether it is time to ask Label Studio what changed."""
        return time.monotonic() >= self._next_poll.get(project_id, 0.0)

    def _apply_events(self, project: ProjectRecord) -> bool:
        """Handle what is pending; whether tasks were imported."""
        new_tasks = False
        waiting = iter(self._store.events.pending(project.id))
        while batch := list(islice(waiting, EVENT_BATCH)):
            new_tasks |= self._handle_batch(project, batch)
        return new_tasks

    def _handle_batch(self, project: ProjectRecord, batch: Sequence[EventRecord]) -> bool:
        """Handle events together or, when one of them may be bad, one by one, so that it takes no other with it."""
        if not any(event.attempts for event in batch):
            try:
                return self._handle(project, batch)
            except _UNEXPECTED_CONTENT:
                log.info("one of %d events has unexpected content; they are handled one by one", len(batch))
        return any([self._handle_alone(project, event) for event in batch])

    def _handle_alone(self, project: ProjectRecord, event: EventRecord) -> bool:
        if event.attempts >= EVENT_TRIES:  # it ends the process or breaks in a way nobody foresaw
            log.error("event %d (%s) parked: its handling never ended", event.id, event.action)
            self._store.events.settle(event.id, f"its handling was begun {EVENT_TRIES} times and never ended")
            return False
        try:
            return self._handle(project, [event])
        except _UNEXPECTED_CONTENT as error:
            log.warning("event %d (%s) parked: %r", event.id, event.action, error)
            self._store.events.settle(event.id, f"its content is not as expected: {error!r}")
            return False

    def _handle(self, project: ProjectRecord, events: Sequence[EventRecord]) -> bool:
        """Let events take effect, all or none; whether they tell of imported tasks."""
        ids = [event.id for event in events]
        self._store.events.begin(ids)
        with self._store.events.handling(ids) as ours:
            mine = [event for event in events if event.id in ours]
            self._apply(project, mine)
        return any(event.action == "TASKS_CREATED" for event in mine)

    def _apply(self, project: ProjectRecord, events: Sequence[EventRecord]) -> None:
        seen = [
            SeenAnnotation(int(a["id"]), a.get("task_id"), bool(a.get("usable", True)))
            for event in events
            for a in event.body.get("annotations", [])
        ]
        self._store.ledger.see(project.id, seen)
        configs = [event.body["label_config"] for event in events if event.body.get("label_config")]
        if configs:
            self._store.projects.set_label_config(project.id, configs[-1])
        if any(event.action == "START_TRAINING" for event in events):
            # The wish is stored with the event: a crash between here and the decision must not lose it.
            self._store.rounds.request(project.id, "train", "training was started by hand")

    def _poll(self, project: ProjectRecord) -> None:
        self._next_poll[project.id] = time.monotonic() + self._settings.poll_interval_s
        until = project.polled_until
        try:
            updates = iter(self._updates(project.id, until))
            while batch := list(islice(updates, POLL_BATCH)):
                self._store.ledger.see_tasks(project.id, {u.task_id: u.annotations for u in batch})
                until = max(until, *(u.updated_at for u in batch))
                self._store.projects.polled(project.id, until)  # a poll that is cut off goes on from here
        except (LabelStudioError, SettingsError) as error:
            log.warning("project %d could not be polled: %s", project.id, error)
            self._store.projects.set_problem(project.id, "poll", str(error))
            return
        self._store.projects.polled(project.id, until)
        self._store.projects.set_problem(project.id, "poll", "")

    def _decide(self, project: ProjectRecord, new_tasks: bool) -> None:
        with self._store.projects.locked(project.id):  # two workers that decide at once would both ask
            self._ask(project, new_tasks)
        if self._store.rounds.is_open(project.id):
            self._enqueue_round(project.id)

    def _ask(self, project: ProjectRecord, new_tasks: bool) -> None:
        rounds = self._store.rounds
        running = rounds.running(project.id)
        if running is not None and running.kind == "train" and running.step in BEFORE_EXPORT_ENDS:
            return  # its snapshot will hold what came; it is decided again when the round ends
        budget = self._settings.project_options(project.options).budget
        new = self._store.ledger.new_count(project.id)
        if new >= budget:
            rounds.request(project.id, "train", f"{new} new annotations, {budget} start a round")
        elif new_tasks:
            rounds.request(project.id, "rank", "new tasks were imported")
        elif not rounds.of_project(project.id):
            rounds.request(project.id, "rank", "the project was connected")
