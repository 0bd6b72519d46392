"""What operators watch, as Prometheus text; every app has a registry of its own.

Memory of the GPUs is read from the driver: the service itself never loads CUDA.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pynvml
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ppal_backend.errors import (
    LabelStudioAuthError,
    LabelStudioError,
    LabelStudioUnavailable,
    QueueUnavailable,
    StateError,
    StoreUnavailable,
)
from ppal_backend.service.payloads import ACTIONS
from ppal_backend.settings import Settings
from ppal_backend.store import ProjectRecord, Store, now
from ppal_backend.structures.quality import Quality

log = logging.getLogger(__name__)

CONTENT_TYPE = CONTENT_TYPE_LATEST
ROUND_STATES = ("pending", "running", "done", "failed", "cancelled")
EVENT_STATES = ("pending", "done", "parked")
SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)


class Queue(Protocol):
    """The job queue, as far as it is measured."""

    def pending(self) -> int:
        """Jobs that wait."""


class Metrics:
    """Counters of this process, and the state of database, queue and machine at the time of a scrape.

    Args:
        store: the state.
        settings: where its files lie; without them nothing is told of the disk.
        queue: the job queue; without it nothing is told of its length.
    """

    def __init__(self, store: Store, settings: Settings | None = None, queue: Queue | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_StateCollector(store, settings, queue))
        self._webhooks = Counter("ppal_webhooks", "Webhooks received, by action.", ["action"], registry=self._registry)
        self._predict = Histogram(
            "ppal_predict_seconds", "Time to answer /predict.", buckets=SECONDS, registry=self._registry
        )
        self._predictions = Counter(
            "ppal_predictions", "Live predictions, by outcome.", ["outcome"], registry=self._registry
        )
        self._errors = Counter(
            "ppal_label_studio_errors", "Failed calls to Label Studio.", ["kind"], registry=self._registry
        )

    def webhook(self, action: object) -> None:
        """A webhook came. Actions that Label Studio does not have are counted as one."""
        known = isinstance(action, str) and action in ACTIONS
        self._webhooks.labels(str(action) if known else "other").inc()

    @contextmanager
    def predicting(self) -> Iterator[None]:
        """Measures the block as one ``/predict``."""
        with self._predict.time():
            yield

    def predicted(self, outcome: str, count: int = 1) -> None:
        """``count`` tasks got an answer of the kind ``outcome``."""
        if count:
            self._predictions.labels(outcome).inc(count)

    def label_studio_failed(self, error: LabelStudioError) -> None:
        """A call to Label Studio failed."""
        kinds = ((LabelStudioUnavailable, "unavailable"), (LabelStudioAuthError, "auth"))
        self._errors.labels(next((k for cls, k in kinds if isinstance(error, cls)), "refused")).inc()

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)


class _StateCollector(Collector):
    def __init__(self, store: Store, settings: Settings | None, queue: Queue | None) -> None:
        self._store, self._settings, self._queue = store, settings, queue

    def describe(self) -> list[GaugeMetricFamily]:
        """Names without a database access, so that registering costs none."""
        return [_gauge("ppal_rounds", "Rounds, by state.", {}), _gauge("ppal_events", "Events, by state.", {})]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        try:
            of_store = list(self._of_store())
        except (StateError, StoreUnavailable) as error:  # what it would have told is missing then, the rest is not
            log.warning("%s", error)
            of_store = []
        yield GaugeMetricFamily("ppal_database_up", "1 when the state database answers.", value=int(bool(of_store)))
        yield from of_store
        yield from self._of_machine()

    def _of_store(self) -> Iterator[GaugeMetricFamily]:
        rounds = {state: 0 for state in ROUND_STATES} | self._store.rounds.counts()
        yield _gauge("ppal_rounds", "Rounds, by state.", rounds)
        events = {state: 0 for state in EVENT_STATES} | self._store.events.counts()
        yield _gauge("ppal_events", "Events, by state.", events)
        projects = self._store.projects.all()
        yield GaugeMetricFamily("ppal_projects", "Connected projects.", value=len(projects))
        yield from self._of_projects(projects)
        age_s = self._store.workers.age_s()
        if age_s is not None:
            text = "Since any worker's last sign of life."
            yield GaugeMetricFamily("ppal_worker_heartbeat_age_seconds", text, value=age_s)

    def _of_projects(self, projects: Sequence[ProjectRecord]) -> Iterator[GaugeMetricFamily]:
        new = _labelled("ppal_new_annotations", "Annotations that no training has used yet.", "project")
        quality = _labelled(
            "ppal_map",
            "mAP of the version in force on 10 or more random images of the project.",
            "project",
        )
        steps = _labelled("ppal_round_step_seconds", "Steps of the last complete round.", "project", "step")
        running = _labelled("ppal_round_running_seconds", "Age of the running round.", "project", "step")
        problems = _labelled("ppal_problems", "What hinders a project now: 1 for each topic.", "project", "topic")
        for project in projects:
            name = str(project.id)
            new.add_metric([name], self._store.ledger.new_count(project.id))
            version = self._store.versions.active(project.id)
            measured = Quality.of(version.metrics).measured if version is not None else None
            if measured is not None and measured.map is not None and measured.is_reportable:
                quality.add_metric([name], measured.map)
            for step, seconds in self._last_steps(project.id).items():
                steps.add_metric([name, step], seconds)
            record = self._store.rounds.running(project.id)
            if record is not None and record.started_at is not None:
                age = now() - record.started_at
                running.add_metric([name, record.step], age.total_seconds())
            for topic in project.problems:
                problems.add_metric([name, topic], 1)
        yield from (new, quality, steps, running, problems)

    def _last_steps(self, project_id: int) -> dict[str, float]:
        done = [r for r in self._store.rounds.of_project(project_id) if r.state == "done"]
        return dict(done[-1].metrics.get("seconds") or {}) if done else {}

    def _of_queue(self) -> Iterator[GaugeMetricFamily]:
        if self._queue is None:
            return
        pending = None
        try:
            pending = self._queue.pending()
        except QueueUnavailable as error:  # its length is missing then, the other metrics are not
            log.warning("%s", error)
        yield GaugeMetricFamily("ppal_queue_up", "1 when the job queue answers.", value=int(pending is not None))
        if pending is not None:
            yield GaugeMetricFamily("ppal_jobs_pending", "Jobs that wait in the queue.", value=pending)

    def _of_machine(self) -> Iterator[GaugeMetricFamily]:
        yield from self._of_queue()
        if self._settings is not None:
            free = shutil.disk_usage(self._settings.model_dir).free
            yield GaugeMetricFamily("ppal_disk_free_bytes", "Free space for MODEL_DIR.", value=free)
        used = _labelled("ppal_gpu_memory_used_bytes", "GPU memory in use by all processes.", "gpu")
        total = _labelled("ppal_gpu_memory_total_bytes", "GPU memory there is.", "gpu")
        for gpu in gpu_memory():
            used.add_metric([str(gpu.index)], gpu.used)
            total.add_metric([str(gpu.index)], gpu.total)
        yield from (used, total)


def _gauge(name: str, text: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = _labelled(name, text, "state")
    for state, count in values.items():
        family.add_metric([state], count)
    return family


def _labelled(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=list(labels))


@dataclass(frozen=True)
class GpuMemory:
    """One GPU of this machine, in bytes; whichever process uses it."""

    index: int
    used: int
    total: int


def gpu_memory(nvml: Any = pynvml) -> list[GpuMemory]:
    """Every GPU of this machine; none when there is no driver."""
    try:
        nvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        infos = [
            nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())
        ]
        return [GpuMemory(index, int(info.used), int(info.total)) for index, info in enumerate(infos)]
    except pynvml.NVMLError:  # a GPU that hangs must not take the other metrics along
        return []
    finally:
        nvml.nvmlShutdown()
