"""The job process: composes stores, Label Studio, engine and rounds, and keeps the queue turning.

``ppal worker`` runs :func:`run_worker`; each round runs in a child process (``python -m ppal_backend.worker
PROJECT``), which ends in :func:`run_next_round`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from ppal_backend.engines.cpu import yield_while_waiting
from ppal_backend.engines.local import LocalEngine
from ppal_backend.errors import (
    LabelStudioAuthError,
    LabelStudioUnavailable,
    PPALError,
    RoundCancelled,
)
from ppal_backend.jobs.queue import JobQueue
from ppal_backend.jobs.supervisor import CRASH_LIMIT, RETRY_AFTER_CRASH_S, Supervisor
from ppal_backend.jobs.sync import Synchroniser, TaskUpdate
from ppal_backend.label_studio.publisher import LabelStudioPublisher
from ppal_backend.label_studio.source import LabelStudioSource, connect, image_cache
from ppal_backend.label_studio.webhook import check_webhook
from ppal_backend.logs import configure_logging
from ppal_backend.rounds.artifacts import RoundFolder, claim_project_folder
from ppal_backend.rounds.ports import Observer, Ports
from ppal_backend.service.auth import webhook_token
from ppal_backend.settings import Settings, load_settings
from ppal_backend.store import Lease, ModelVersion, ProjectRecord, RoundRecord, SeenAnnotation, Store, open_store
from ppal_backend.structures.progress import Progress
from ppal_backend.structures.round import ModelRef, RoundSpec

if TYPE_CHECKING:
    from ppal_backend.rounds.run import RoundResult

log = logging.getLogger(__name__)

TICK_S = 2.0
HEARTBEAT_S = 2.0
REPORT_EVERY_S = 1.0
LONGEST_RETRY_S = 600.0

PortsOf = Callable[[Settings, Store, ProjectRecord, RoundSpec, Observer], Ports]


def run_worker(settings: Settings, stop: threading.Event | None = None, parallel_rounds: int = 1) -> None:
    """Handle jobs until ``stop`` is set or a SIGTERM or SIGINT comes."""
    stop = stop or threading.Event()
    store = open_store(settings)
    supervisor = Supervisor(store)
    synchronise: Any = None

    def on_sync(project_id: int) -> None:
        synchronise(project_id)

    def on_round(project_id: int) -> None:
        supervisor.run(project_id)
        jobs.sync(project_id)

    jobs = JobQueue(settings.jobs_file, on_sync, on_round)
    synchronise = Synchroniser(store, settings, _read_updates(settings, store), jobs.run_round)
    consumers = jobs.consumers(parallel_rounds)
    for consumer in consumers:
        consumer.start()
    if threading.current_thread() is threading.main_thread():  # after start(), which sets handlers of its own
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: stop.set())
    log.info("worker started; state in %s", settings.model_dir.resolve())
    try:
        while not stop.wait(TICK_S):
            _tick(store, jobs, synchronise)
    finally:
        supervisor.stop()
        for consumer in consumers:
            consumer.stop(graceful=True)
        store.close()
        log.info("worker stopped")


def _tick(store: Store, jobs: JobQueue, synchronise: Synchroniser) -> None:
    """Find what no job announces: polls that are due, and rounds left behind by a process that died."""
    for project in store.projects.all():
        if synchronise.poll_is_due(project.id):
            jobs.sync(project.id)
    for project_id in store.rounds.claimable_projects():
        jobs.run_round(project_id)


def run_next_round(settings: Settings, project_id: int, ports_of: PortsOf | None = None) -> bool:
    """Claim and run the project's next round in this process; False when there was none to claim.

    Args:
        settings: the operator's settings.
        project_id: the project.
        ports_of: what the round is plugged into; Label Studio and the local engine by default.
    """
    ports_of = ports_of or label_studio_ports
    store = open_store(settings)
    lease = Lease.mine()
    record = store.rounds.claim(project_id, lease)
    if record is None:
        return False
    watch = Watch(store, record, lease)
    watch.start()
    try:
        project = store.projects.get(project_id)
        result = _run(settings, store, project, record, watch, ports_of)
        _record_version(settings, store, project_id, record.number, result)
        store.rounds.finish(record.id, {**result.metrics, "version": result.version, "seconds": result.seconds})
    except RoundCancelled as reason:
        if store.rounds.get(record.id).cancel_asked:
            store.rounds.cancel(record.id, str(reason))
        else:
            store.rounds.release(record.id)
    except (LabelStudioUnavailable, LabelStudioAuthError) as error:
        delay = min(LONGEST_RETRY_S, 5.0 * 2 ** min(record.attempts - 1, 10))
        log.warning("round %d of project %d waits %.0f s: %s", record.number, project_id, delay, error)
        store.rounds.release(record.id, retry_after_s=delay, error=str(error))
    except PPALError as error:
        log.error("round %d of project %d failed: %s", record.number, project_id, error)
        store.rounds.fail(record.id, str(error))
    except Exception as error:
        log.exception("round %d of project %d broke", record.number, project_id)
        told = f"unexpected {type(error).__name__} in step {watch.step!r}: {error}; the worker's log has the details"
        store.rounds.crashed(record.id, told, CRASH_LIMIT, RETRY_AFTER_CRASH_S)
    finally:
        watch.stop()
        store.close()
    return True


def _run(
    settings: Settings,
    store: Store,
    project: ProjectRecord,
    record: RoundRecord,
    watch: Watch,
    ports_of: PortsOf,
) -> RoundResult:
    from ppal_backend.rounds.run import run_round  # imports torch, which the worker itself never needs

    project_folder = settings.project_folder(project.id)
    claim_project_folder(project_folder, project.key)
    folder = RoundFolder(project_folder / "rounds" / str(record.number))
    spec = _spec(settings, store, project, record, folder)
    return run_round(spec, folder, ports_of(settings, store, project, spec, watch))


def _spec(
    settings: Settings, store: Store, project: ProjectRecord, record: RoundRecord, folder: RoundFolder
) -> RoundSpec:
    """What the round was to do when it first started, or what the options in force say now."""
    if (folder / "spec.json").is_file():
        return RoundSpec.from_dict(folder.read("spec.json"))
    options = settings.project_options(project.options)
    current = store.versions.active(project.id, with_model=True)
    model = None
    if record.kind == "rank" and current is not None:
        checkpoint = str(settings.model_dir.resolve() / current.checkpoint)
        model = ModelRef(current.detector, checkpoint, current.labels, current.difficulty)
    return RoundSpec(
        project_id=project.id,
        project_key=project.key,
        number=record.number,
        kind="train" if record.kind == "train" else "rank",
        device=settings.device,
        model=model,
        **options.model_dump(),
    )


def _record_version(settings: Settings, store: Store, project_id: int, number: int, result: RoundResult) -> None:
    model = result.model
    root = settings.model_dir.resolve()
    store.versions.activate(
        ModelVersion(
            project_id=project_id,
            version=result.version,
            round_number=number,
            detector=model.detector if model else "",
            checkpoint=os.path.relpath(model.checkpoint, root) if model else "",
            labels=model.labels if model else (),
            difficulty=model.difficulty if model else None,
            metrics=result.metrics,
        )
    )


class Watch:
    """Observes one round: reports to the store, keeps the lease alive, and says when to stop.

    The process ends at once when its parent is gone: the next worker takes the round over.
    """

    def __init__(self, store: Store, record: RoundRecord, lease: Lease) -> None:
        self._store, self._round, self._lease = store, record, lease
        self._stop, self._ended = threading.Event(), threading.Event()
        self._parent, self._reported, self.step = os.getppid(), 0.0, record.step

    def start(self) -> None:
        """Begin to keep the lease alive; SIGTERM asks the round to stop."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker decides
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def stop(self) -> None:
        """The round is over."""
        self._ended.set()

    def exported(self, annotation_ids: Sequence[int]) -> None:
        if self._round.kind == "rank":
            return  # nothing was learned from them: they still count towards the next training
        self._store.ledger.used_by(self._round.project_id, self._round.number, annotation_ids)

    def step_started(self, step: str) -> None:
        self.step = step
        self._store.rounds.report(self._round.id, step, {})
        log.info("round %d of project %d: %s", self._round.number, self._round.project_id, step)

    def progress(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._reported < REPORT_EVERY_S and progress.done < progress.total:
            return
        self._reported = now
        shown = {"done": progress.done, "total": progress.total, "detail": progress.detail}
        self._store.rounds.report(self._round.id, self.step, shown)

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stop.set()

    def _keep(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            if os.getppid() != self._parent:
                log.error("the worker is gone; this round process leaves, the round will be resumed")
                os._exit(1)
            if not self._store.rounds.renew(self._round.id, self._lease):
                self._stop.set()


def _read_updates(settings: Settings, store: Store) -> Callable[[int, str], list[TaskUpdate]]:
    clients: dict[str, Any] = {}

    def read(project_id: int, since: str) -> list[TaskUpdate]:
        url = store.projects.get(project_id).url
        client = clients.get(url) or clients.setdefault(url, connect(settings, url))
        return [
            TaskUpdate(
                stamp.id,
                stamp.updated_at,
                tuple(SeenAnnotation(a.id, stamp.id, not a.was_cancelled) for a in stamp.annotations),
            )
            for stamp in client.tasks_updated_since(project_id, since or None)
        ]

    return read


def label_studio_ports(
    settings: Settings, store: Store, project: ProjectRecord, spec: RoundSpec, observer: Observer
) -> Ports:
    """A round of people: tasks from and predictions to Label Studio, the detector in this process."""
    client = connect(settings, project.url)
    token = webhook_token(settings, project.id)
    store.projects.set_problem(project.id, "webhook", check_webhook(client, project.id, settings.public_url, token))
    return Ports(
        source=LabelStudioSource(client, image_cache(settings, client), spec.project_id, spec.from_name),
        engine=LocalEngine(settings.model_zoo, settings.threads),
        publisher=LabelStudioPublisher(client, settings.keep_versions),
        observer=observer,
    )


def main(arguments: Sequence[str]) -> int:
    """Entry of the round process: run the next round of the project named by its id."""
    settings = load_settings()
    configure_logging(settings.log_level)
    yield_while_waiting()
    os.nice(5)  # people's requests come before training
    run_next_round(settings, int(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
