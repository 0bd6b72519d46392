"""The job process: composes stores, Label Studio and rounds, and keeps the queue turning."""

from __future__ import annotations

import logging
import signal
import threading
import time

from ppal_backend.errors import ArtifactsUnavailable, QueueUnavailable, StoreUnavailable
from ppal_backend.rounds.folder import Rounds
from ppal_backend.settings import Settings
from ppal_backend.store import Heartbeat, Store, open_store
from ppal_backend.worker.queue import JobQueue, open_queue
from ppal_backend.worker.supervisor import ROUND_MODULE, Supervisor
from ppal_backend.worker.sync import LabelStudioProbe, RemoteProjects, Synchroniser

log = logging.getLogger(__name__)

TICK_S = 2.0
LATE_S = 5.0
FORGET_EVERY_S = 3600.0
FORGET_AT_ONCE = 10_000


def run_worker(
    settings: Settings,
    stop: threading.Event | None = None,
    parallel_rounds: int = 1,
    round_module: str = ROUND_MODULE,
) -> None:
    """Handle jobs until ``stop`` is set or a SIGTERM or SIGINT comes.

    Args:
        settings: the operator's settings.
        stop: ends the worker when set.
        parallel_rounds: projects that may run a round at the same time.
        round_module: the module whose process runs one round, with the project's id as its argument.
    """
    stop = stop or threading.Event()
    if settings.engine == "ray":
        from ppal_backend.engines.ray.cluster import need_ray

        need_ray()
    _check_bucket(settings)
    _ends_at(stop, signal.SIGTERM)  # while it starts, too: an exit within a library's clean-up is told as its error
    store = open_store(settings)
    heartbeat = Heartbeat(store.workers)
    supervisor = Supervisor(store, round_module)

    def on_round(_: int) -> None:
        """A job says that there is something to run; what waits longest is run, whichever project it is of."""
        project_id = supervisor.run_next()
        if project_id is not None:
            jobs.sync(project_id)

    jobs = open_queue(settings, lambda project_id: synchronise(project_id), on_round)
    synchronise = Synchroniser(store, settings, RemoteProjects(settings, store), jobs.run_round)
    label_studio = LabelStudioProbe(settings, store)
    consumers = jobs.consumers(parallel_rounds)
    for consumer in consumers:
        consumer.start()
    _ends_at(stop, signal.SIGTERM, signal.SIGINT)  # after start(), which sets handlers of its own
    log.info("worker started; state in %s", settings.model_dir.resolve())
    try:
        heartbeat.beat()
        forget_next = 0.0
        while not stop.wait(TICK_S):
            heartbeat.beat()
            _tick(store, jobs, synchronise)
            label_studio.probe_in_background()
            if time.monotonic() >= forget_next:
                forget_next = time.monotonic() + (0.0 if _forget_events(settings, store) else FORGET_EVERY_S)
    finally:
        supervisor.stop()
        for consumer in consumers:
            consumer.stop(graceful=True)
        heartbeat.end()
        store.close()
        log.info("worker stopped")


def _ends_at(stop: threading.Event, *signals: signal.Signals) -> None:
    """Set ``stop`` at these signals, where signals are heard: in the main thread."""
    if threading.current_thread() is threading.main_thread():
        for name in signals:
            signal.signal(name, lambda *_: stop.set())


def _check_bucket(settings: Settings) -> None:
    """Refuse to start with a bucket that no round could use. One that does not answer now may do so later."""
    bucket = Rounds(settings).bucket
    try:
        if bucket is not None:
            bucket.check()
    except ArtifactsUnavailable as error:
        log.warning("%s; rounds wait until it does", error)


def _forget_events(settings: Settings, store: Store) -> bool:
    """Delete handled events of long ago; whether there may be more of them."""
    try:
        return store.events.forget(settings.keep_events_days * 86_400, FORGET_AT_ONCE) == FORGET_AT_ONCE
    except StoreUnavailable as error:
        log.warning("old events stay for now: %s", error)
        return False


def _tick(store: Store, jobs: JobQueue, synchronise: Synchroniser) -> None:
    """Find what no job announces: polls that are due, events and rounds whose job was lost."""
    try:
        late = store.events.waiting(LATE_S)
        for project in store.projects.all():
            synchronise.poll_in_background(project.id, project.poll_asked)
            if project.id in late:
                jobs.sync(project.id)
        for project_id in store.rounds.claimable_projects():
            jobs.run_round(project_id)
    except (StoreUnavailable, QueueUnavailable) as error:
        log.warning("nothing is started for now: %s", error)
