"""What the service is plugged into, made once per process. Detectors and Label Studio are reached lazily."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from ppal_backend.engines.live import LiveModel, LiveOptions, LivePredictor
from ppal_backend.operations.pruning import FetchedFiles
from ppal_backend.service.metrics import Metrics
from ppal_backend.settings import Settings, load_settings
from ppal_backend.store import ProjectRecord, Store, open_store
from ppal_backend.structures.detections import Detections
from ppal_backend.worker.queue import JobQueue, open_queue

if TYPE_CHECKING:
    from ppal_backend.datasets.images import ImageInfo

log = logging.getLogger(__name__)

EXTENSION = "ppal"  # under which an app of ours holds its runtime
PREDICT_DEADLINE_S = 80.0  # Label Studio hangs up after 100
FETCHERS = 8
CLOSE_WAIT_S = 5.0
PAUSE_S = 0.25  # between notices: hundreds of webhooks a second are a few jobs, and each of those handles them all
MOST_PREDICTING = 16  # below gunicorn's threads, so that webhooks always find one


class Predictor(Protocol):
    """Where live predictions come from."""

    def predict(self, model: LiveModel, images: Sequence[tuple[int, str]], timeout_s: float) -> list[Detections]:
        """Boxes by image; unreadable images are missing."""

    def close(self) -> None:
        """Give its resources back."""


class TaskImages(Protocol):
    """The verified images of one project."""

    def get(self, task_id: int, url: str) -> ImageInfo:
        """The local copy of a task's image, fetched when it is not there.

        Raises:
            ImageError: it cannot be used.
            LabelStudioError: Label Studio does not give it.
        """


ImagesOf = Callable[[ProjectRecord], TaskImages]


class Jobs(Protocol):
    """The job queue, as far as the service uses it."""

    def sync(self, project_id: int, /) -> object:
        """Enqueue: handle the project's pending events, poll it, start a round if one is due."""


class Notifier:
    """Tells the job queue which projects need looking after, off the path of the request.

    Putting a job into the queue waits for the disk; while a round writes checkpoints that can take longer than an
    annotator should wait for a submit. A thread passes the notices on, the first at once; notices of one project that
    wait are one notice. The event itself is stored before anybody is told, so a notice that is lost with the process
    costs at most one poll interval.

    Args:
        jobs: where they go. A failure, of whatever kind, is logged and forgotten.
    """

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._waiting: dict[int, None] = {}
        self._busy = self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def notify(self, project_id: int) -> None:
        """Have a job enqueued for a project; returns at once."""
        with self._changed:
            is_known = project_id in self._waiting
            self._waiting[project_id] = None
            if self._thread is None or not self._thread.is_alive():  # none yet, or lost in a fork
                self._thread = threading.Thread(target=self._run, name="ppal-notifier", daemon=True)
                self._thread.start()
            if not is_known:
                self._changed.notify_all()

    def flush(self, timeout_s: float = CLOSE_WAIT_S) -> bool:
        """Wait until every notice is passed on; False when that takes too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)

    def close(self) -> None:
        """Pass on what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.flush()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                projects, self._waiting = list(self._waiting), {}
                self._busy = True
            for project_id in projects:
                self._pass_on(project_id)
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed, PAUSE_S)

    def _pass_on(self, project_id: int) -> None:
        try:
            self._jobs.sync(project_id)
        except Exception:
            log.exception("the job queue took no job for project %d; the next poll will handle it", project_id)


@dataclass(frozen=True)
class Runtime:
    """Everything a request may need."""

    settings: Settings
    store: Store
    notifier: Notifier
    predictor: Predictor
    images: ImagesOf
    metrics: Metrics
    fetched: FetchedFiles
    fetchers: ThreadPoolExecutor
    predict_slots: threading.BoundedSemaphore
    predict_deadline_s: float = PREDICT_DEADLINE_S

    def close(self) -> None:
        """Pass on what waits, end the prediction process and give the database connections back."""
        self.notifier.close()
        self.fetchers.shutdown(wait=False, cancel_futures=True)
        self.predictor.close()
        self.store.close()


def build_runtime(
    settings: Settings,
    store: Store | None = None,
    jobs: Jobs | None = None,
    predictor: Predictor | None = None,
    images: ImagesOf | None = None,
) -> Runtime:
    """The runtime that the settings describe, with the given parts in place of its own.

    Args:
        settings: the operator's settings.
        store: the state; opened by the settings when None.
        jobs: the job queue.
        predictor: the live predictor.
        images: where a project's images come from; its own Label Studio when None.
    """
    store = store or open_store(settings)
    options = LiveOptions(settings.device, settings.model_zoo, settings.threads)
    jobs = jobs or open_queue(settings)
    return Runtime(
        settings=settings,
        store=store,
        notifier=Notifier(jobs),
        predictor=predictor or LivePredictor(options),
        images=images or Images(settings),
        metrics=Metrics(store, settings, jobs if isinstance(jobs, JobQueue) else None),
        fetched=FetchedFiles(settings, store),
        fetchers=ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch"),
        predict_slots=threading.BoundedSemaphore(MOST_PREDICTING),
    )


@lru_cache(maxsize=1)
def default_runtime() -> Runtime:
    """The runtime of a process in which label-studio-ml's own server builds ``PPALBackend``."""
    return build_runtime(load_settings())


class Images:
    """The image cache of each project's Label Studio; the worker uses the same folder."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._caches: dict[tuple[str, str], TaskImages] = {}
        self._lock = threading.Lock()

    def __call__(self, project: ProjectRecord) -> TaskImages:
        from ppal_backend.label_studio.source import image_cache, open_client

        with self._lock:
            place = project.url, project.hostname
            if place not in self._caches:
                self._caches[place] = image_cache(self._settings, open_client(self._settings, *place))
            return self._caches[place]
