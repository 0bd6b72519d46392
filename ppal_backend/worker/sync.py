"""From events and polls to a round: apply what came in to the ledger, then decide."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice

from ppal_backend.datasets.label_studio_json import read_time
from ppal_backend.errors import (
    LabelStudioAuthError,
    LabelStudioError,
    LabelStudioUnavailable,
    QueueUnavailable,
    SettingsError,
    StoreUnavailable,
)
from ppal_backend.label_studio.client import LabelStudioClient, TaskStamp
from ppal_backend.label_studio.source import open_client
from ppal_backend.logs import log_context
from ppal_backend.operations import upkeep
from ppal_backend.operations.control import again_in_words, annotations_missing, corrections, portion
from ppal_backend.operations.detectors import known_or_none
from ppal_backend.service.auth import webhook_token
from ppal_backend.settings import ProjectOptions, Settings
from ppal_backend.store import LABEL_STUDIO_NOTE, EventRecord, ProjectRecord, RoundRecord, SeenAnnotation, Store, now
from ppal_backend.structures.quality import count

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class ProjectState:
    """What Label Studio says of a project as a whole: tasks, those with annotations other than ground truths, labeling
    config, name, submitted annotations."""

    tasks: int
    annotated_tasks: int
    label_config: str
    title: str = ""
    annotations: int = 0


class RemoteProjects:
    """What a poll asks of Label Studio. A request that fails is not sent again: the next poll is.

    Every method may raise ``LabelStudioError`` or ``SettingsError``.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._clients: dict[str, LabelStudioClient] = {}
        self._lock = threading.Lock()

    def state(self, project_id: int) -> ProjectState:
        """The project as a whole, in one request."""
        found = self._client(project_id).project(project_id)
        config, title = (str(found.get(name) or "") for name in ("label_config", "title"))
        counts = ("task_number", "num_tasks_with_annotations", "total_annotations_number")
        tasks, annotated, annotations = (int(found.get(name) or 0) for name in counts)
        return ProjectState(tasks, annotated, config, title, annotations)

    def updates(self, project_id: int, since: str) -> Iterator[TaskUpdate]:
        """Tasks that changed at or after a time ("" = ever), piece by piece, the oldest change first."""
        return map(_update, self._client(project_id).tasks_updated_since(project_id, since or None))

    def annotated_tasks(self, project_id: int) -> Iterator[int]:
        """Ids of all tasks that have an annotation now."""
        return self._client(project_id).annotated_task_ids(project_id)

    def annotated_count(self, project_id: int) -> int:
        """How many tasks have an annotation now."""
        return self._client(project_id).annotated_task_count(project_id)

    def exported(self, project_id: int, task_ids: Sequence[int]) -> Iterator[TaskUpdate]:
        """Those of some tasks that have an annotation, by the annotations themselves and no counter."""
        return map(_update, self._client(project_id).exported_stamps(project_id, task_ids))

    def check(self, project_id: int) -> Mapping[str, str]:
        """What is wrong with the queue that is served and with the webhook, by topic ("" = nothing); what is ours to
        set right is set right."""
        token = webhook_token(self._settings, project_id)
        return upkeep.check_project(self._settings, self._store, self._client(project_id), project_id, token)

    def _client(self, project_id: int) -> LabelStudioClient:
        url = self._store.projects.get(project_id).url
        with self._lock:
            if url not in self._clients:
                self._clients[url] = open_client(self._settings, url, tries=1)
            return self._clients[url]


class Synchroniser:
    """Handles a project's events and polls; safe to call at any time, any number of times.

    Handling events asks nobody but the store. A poll waits for Label Studio, so each project's runs in a thread of its
    own (``poll_in_background``): one that does not answer holds up no other project.

    Args:
        store: the backend's memory.
        settings: for the options in force.
        remote: reads from Label Studio.
        enqueue_round: tells the job queue that a project has a round to run.
    """

    def __init__(
        self, store: Store, settings: Settings, remote: RemoteProjects, enqueue_round: Callable[[int], None]
    ) -> None:
        self._store, self._settings = store, settings
        self._remote, self._enqueue_round = remote, enqueue_round
        self._next_poll: dict[int, float] = {}
        self._polling: dict[int, threading.Thread] = {}
        self._polled_from: dict[int, str] = {}  # the time of change from which the last whole poll read
        self._missed: dict[int, int] = {}  # annotations that Label Studio counts and no listing showed

    def __call__(self, project_id: int) -> None:
        """Handle the events of a project that wait, and decide on a round."""
        project = self._find(project_id)
        if project is not None:
            self._apply_events(project)
            self._decide(project)

    def poll(self, project_id: int) -> None:
        """Ask Label Studio what no event told, and decide on a round."""
        self._next_poll[project_id] = time.monotonic() + self._settings.poll_interval_s
        project = self._find(project_id)
        if project is not None:
            self._store.projects.polling(project_id, now() + timedelta(seconds=self._settings.poll_interval_s))
            self._poll(project)
            self._decide(project)

    def poll_in_background(self, project_id: int, asked: bool = False) -> bool:
        """Begin a poll when one is due or asked for and none of this project is under way; whether one was begun."""
        under_way = self._polling.get(project_id)
        is_due = asked or time.monotonic() >= self._next_poll.get(project_id, 0.0)
        if not is_due or (under_way and under_way.is_alive()):
            return False
        thread = threading.Thread(target=self._poll_alone, args=(project_id,), name=f"poll-{project_id}", daemon=True)
        self._polling[project_id] = thread
        thread.start()
        return True

    def _poll_alone(self, project_id: int) -> None:
        try:
            with log_context(project=project_id):
                self.poll(project_id)
        except (StoreUnavailable, QueueUnavailable) as error:
            log.warning("project %d is polled again later: %s", project_id, error)

    def _find(self, project_id: int) -> ProjectRecord | None:
        project = self._store.projects.find(project_id)
        if project is None:
            log.warning("a job names project %d, which is not connected; ignored", project_id)
        return project

    def _apply_events(self, project: ProjectRecord) -> None:
        """Handle what is pending."""
        waiting = iter(self._store.events.pending(project.id))
        while batch := list(islice(waiting, EVENT_BATCH)):
            self._handle_batch(project, batch)

    def _handle_batch(self, project: ProjectRecord, batch: Sequence[EventRecord]) -> None:
        """Handle events together or, when one of them may be bad, one by one, so that it takes no other with it."""
        if not any(event.attempts for event in batch):
            try:
                return self._handle(project, batch)
            except _UNEXPECTED_CONTENT:
                log.info("one of %d events has unexpected content; they are handled one by one", len(batch))
        for event in batch:
            self._handle_alone(project, event)

    def _handle_alone(self, project: ProjectRecord, event: EventRecord) -> None:
        if event.attempts >= EVENT_TRIES:  # it ends the process or breaks in a way nobody foresaw
            log.error("event %d (%s) parked: its handling never ended", event.id, event.action)
            self._store.events.settle(event.id, f"its handling was begun {EVENT_TRIES} times and never ended")
            return
        try:
            self._handle(project, [event])
        except _UNEXPECTED_CONTENT as error:
            log.warning("event %d (%s) parked: %r", event.id, event.action, error)
            self._store.events.settle(event.id, f"its content is not as expected: {error!r}")

    def _handle(self, project: ProjectRecord, events: Sequence[EventRecord]) -> None:
        """Let events take effect, all or none."""
        ids = [event.id for event in events]
        self._store.events.begin(ids)
        with self._store.events.handling(ids) as ours:
            self._apply(project, [event for event in events if event.id in ours])

    def _apply(self, project: ProjectRecord, events: Sequence[EventRecord]) -> None:
        seen = [
            SeenAnnotation(int(a["id"]), a.get("task_id"), bool(a.get("usable", True)), _moment(a.get("changed_at")))
            for event in events
            for a in event.body.get("annotations", [])
        ]
        self._store.ledger.see(project.id, seen)
        gone = [task_id for event in events for task_id in event.body.get("deleted_tasks", ())]
        self._store.ledger.tasks_deleted(project.id, gone)
        # What people wish is stored with the event: a crash between here and the decision must not lose it.
        if any(event.action == "TASKS_CREATED" for event in events):
            self._store.projects.set_task_count(project.id, None)  # so that the poll does not tell of them again
            self._request_for_new_tasks(project)
        configs = [event.body["label_config"] for event in events if event.body.get("label_config")]
        if configs:
            self._store.projects.set_label_config(project.id, configs[-1])
        if any(event.action == "START_TRAINING" for event in events):
            self._store.rounds.request(project.id, "train", "training was started by hand")

    def _poll(self, project: ProjectRecord) -> None:
        """Take in what changed, and tasks that no event told of.

        Tasks of the time at which the last poll ended are read once more, since another one may have come to that time
        meanwhile, but not by every poll: a bulk action gives thousands of tasks one time.
        """
        projects, until = self._store.projects, project.polled_until
        since = _after(until) if self._polled_from.get(project.id) == until else until
        annotated = self._store.ledger.task_count(project.id)  # read first: events come in meanwhile
        try:
            state = self._remote.state(project.id)
            for batch in self._take_in(project.id, self._remote.updates(project.id, since)):
                until = max(until, *(u.updated_at for u in batch))
                projects.polled(project.id, until)  # a poll that is cut off goes on from here
            fewer = project.task_count is not None and state.tasks < project.task_count
            # A change of tasks does not show that tasks are gone, and the count may lack no more than ground truths.
            if fewer or (state.annotated_tasks < annotated and self._remote.annotated_count(project.id) < annotated):
                self._forget_deleted(project.id)
            self._find_missed(project.id, state.annotations)
        except (LabelStudioError, SettingsError) as error:
            log.warning("project %d could not be polled: %s", project.id, error)
            projects.set_problem(project.id, "poll", str(error))
            projects.poll_ended(project.id, failure_of(error))
            return
        self._polled_from[project.id] = project.polled_until
        projects.polled(project.id, until)
        projects.set_problem(project.id, "poll", "")
        projects.poll_ended(project.id, title=state.title)
        projects.set_label_config(project.id, state.label_config)
        self._check_upkeep(project.id)
        with projects.locked(project.id):
            if projects.set_task_count(project.id, state.tasks):
                self._request_for_new_tasks(project)

    def _take_in(self, project_id: int, updates: Iterable[TaskUpdate]) -> Iterator[list[TaskUpdate]]:
        """Take in tasks as they are now, and yield them, a batch at a time."""
        waiting = iter(updates)
        while batch := list(islice(waiting, POLL_BATCH)):
            self._store.ledger.see_tasks(project_id, {u.task_id: u.annotations for u in batch})
            yield batch

    def _check_upkeep(self, project_id: int) -> None:
        try:
            for topic, problem in self._remote.check(project_id).items():
                self._store.projects.set_problem(project_id, topic, problem)
        except (LabelStudioError, SettingsError) as error:
            log.warning("project %d: its queue and webhook are looked at by the next poll: %s", project_id, error)

    def _forget_deleted(self, project_id: int) -> None:
        """Take back the annotations of tasks that Label Studio does not list as annotated, unless it still has them
        when asked for these tasks: it lists by a counter in each task, which may be too low."""
        known = self._store.ledger.usable(project_id)  # read first: what is annotated after this is not looked at
        there = set(self._remote.annotated_tasks(project_id))
        unlisted = {annotation: task for annotation, task in known.items() if task is not None and task not in there}
        kept = self._remote.exported(project_id, sorted(set(unlisted.values())))
        gone = unlisted.keys() - {a.annotation_id for u in kept for a in u.annotations if a.usable}
        self._store.ledger.deleted(project_id, gone)
        log.info("project %d: %d annotations are gone with their tasks", project_id, len(gone))

    def _find_missed(self, project_id: int, counted: int) -> None:
        """Take in annotated tasks that no change showed: an import shows at its end, with times from its beginning, and
        a poll may have seen later ones by then. What this does not find is not looked for again until it is more.

        Args:
            project_id: Project.
            counted: Submitted annotations by Label Studio's count, which was made before the changes were read.
        """
        ledger = self._store.ledger
        missed = max(0, counted - ledger.count(project_id))
        if missed > self._missed.get(project_id, 0):
            unknown = set(self._remote.annotated_tasks(project_id)) - ledger.labelled_tasks(project_id)
            found = 0
            for batch in self._take_in(project_id, self._remote.exported(project_id, sorted(unknown))):
                found += sum(a.usable for u in batch for a in u.annotations)
            log.info("project %d: %d of %d annotations that no change showed were found", project_id, found, missed)
            missed = max(0, missed - found)
        self._missed[project_id] = missed

    def _request_for_new_tasks(self, project: ProjectRecord) -> None:
        """Tasks came: they are ranked, unless a training is going to list them itself. One whose export has begun may
        have listed the tasks before."""
        running = self._store.rounds.running(project.id)
        if running is None or running.kind != "train" or running.step:
            known = known_or_none(self._settings, project)
            self._store.rounds.request(project.id, "rank", "new tasks were imported", as_is=bool(known))

    def _decide(self, project: ProjectRecord) -> None:
        with self._store.projects.locked(project.id):  # two workers that decide at once would both ask
            self._request_rounds(self._store.projects.get(project.id))
        if project.id in self._store.rounds.claimable_projects():
            self._enqueue_round(project.id)

    def _request_rounds(self, project: ProjectRecord) -> None:
        rounds = self._store.rounds
        running = rounds.running(project.id)
        if running is not None and running.kind == "train":
            return  # it is decided again when that one ends: what comes meanwhile may have to wait, should it fail
        options = self._settings.project_options(project.options)
        self._store.projects.set_options_digest(project.id, _digest(options))
        last, failed = rounds.last(project.id), rounds.failure(project.id)
        edits = self._store.projects.get(project.id).edits
        problem = ""
        if annotations_missing(self._store, project.id, options.budget) <= 0:
            rounds.request(project.id, "train", self._why(project.id, options.budget))
        elif failed is not None and failed.edits != edits:
            rounds.request(project.id, failed.kind, f"round {failed.number} failed, and settings changed since")
        elif failed is not None:
            again = again_in_words(self._store, failed, options.budget)
            problem = f"round {failed.number} failed: {failed.error}. {again}"
        elif last is None or self._is_known_anew(project, last):
            self._request_ranking(project, last)
        self._store.projects.set_problem(project.id, "round", problem)

    def _why(self, project_id: int, budget: int) -> str:
        """Why a training is due, for people."""
        new, wanted = self._store.ledger.new_count(project_id), portion(self._store, project_id, budget)
        failed, corrected = self._store.rounds.failed_training(project_id), corrections(self._store, project_id)
        if new >= wanted or failed is None:
            return f"{new} new annotations, {wanted} start a round"
        were = count(corrected, "annotation was", "annotations were")
        return f"round {failed.number} failed, and {were} corrected since"

    def _request_ranking(self, project: ProjectRecord, last: RoundRecord | None) -> None:
        known = known_or_none(self._settings, project)
        if last is None and known and not project.task_count:
            return  # nothing to put boxes on, or not polled yet: a project with annotations trains first
        reason = "the project was connected" if last is None else "what the detector knows of the labels has changed"
        self._store.rounds.request(project.id, "rank", reason, as_is=bool(known))

    def _is_known_anew(self, project: ProjectRecord, last: RoundRecord) -> bool:
        """Whether, before any training, the detector knows other labels than when it ordered the pool."""
        if last.kind != "rank" or last.state != "done" or "known" not in last.metrics:
            return False
        if any(version.is_trained for version in self._store.versions.of_project(project.id)):
            return False
        return bool(known_or_none(self._settings, project).plain != last.metrics["known"])


class LabelStudioProbe:
    """Looks at the one Label Studio of the settings now and then, so that pages need not ask it: whether it answers and
    takes the token, and which projects it has. The note ``label_studio`` holds ``problem`` (a sentence, "" = none),
    ``failed`` (as of a poll) and ``projects`` (their ``id``, ``title`` and ``tasks``).

    Args:
        settings: the operator's settings.
        store: where the note is kept.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._next = 0.0
        self._thread: threading.Thread | None = None

    def probe_in_background(self) -> None:
        """Begin a look when one is due and none is under way."""
        if time.monotonic() < self._next or (self._thread and self._thread.is_alive()):
            return
        self._next = time.monotonic() + self._settings.poll_interval_s
        self._thread = threading.Thread(target=self.probe, name="label-studio", daemon=True)
        self._thread.start()

    def probe(self) -> None:
        """Ask, and keep the note. Without an address in the settings only connected projects tell where it is."""
        if not self._settings.label_studio_url:
            return
        note: dict[str, object] = {"problem": "", "failed": "", "projects": []}
        try:
            with open_client(self._settings, tries=1) as client:
                note["projects"] = client.projects()
        except (LabelStudioError, SettingsError) as error:
            kept, _ = self._store.notes.get(LABEL_STUDIO_NOTE)
            note |= {"problem": str(error), "failed": failure_of(error), "projects": kept.get("projects", [])}
        try:
            self._store.notes.put(LABEL_STUDIO_NOTE, note)
        except StoreUnavailable as error:
            log.warning("what Label Studio says is kept later: %s", error)


def failure_of(error: Exception) -> str:
    """Which kind of failure a request to Label Studio ended in: ``unavailable``, ``token`` or ``other``."""
    kinds = ((LabelStudioUnavailable, "unavailable"), (LabelStudioAuthError, "token"))
    return next((name for kind, name in kinds if isinstance(error, kind)), "other")


def _update(stamp: TaskStamp) -> TaskUpdate:
    seen = (SeenAnnotation(a.id, stamp.id, not a.was_cancelled, _moment(a.updated_at)) for a in stamp.annotations)
    return TaskUpdate(stamp.id, stamp.updated_at, tuple(seen))


def _after(told: str) -> str:
    """The next moment after a time that Label Studio told."""
    moment = _moment(told)
    return told if moment is None else (moment + timedelta(microseconds=1)).isoformat() + "Z"


def _moment(text: object) -> datetime | None:
    """A time that Label Studio tells, as the store keeps times; None where it tells none."""
    told = read_time(text)
    try:
        return None if told is None else told.astimezone(UTC).replace(tzinfo=None)
    except OverflowError:
        return None


def _digest(options: ProjectOptions) -> str:
    return hashlib.sha256(options.model_dump_json().encode()).hexdigest()[:16]
