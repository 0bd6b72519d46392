"""What operators watch, as Prometheus text; every app has a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ppal_backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioUnavailable
from ppal_backend.service.events import ACTIONS
from ppal_backend.store import Store

CONTENT_TYPE = CONTENT_TYPE_LATEST
ROUND_STATES = ("pending", "running", "done", "failed", "cancelled")
EVENT_STATES = ("pending", "done", "parked")
SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)


class Metrics:
    """Counters of this process, and the state database's counts at the time of a scrape."""

    def __init__(self, store: Store) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_StateCollector(store))
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
    def __init__(self, store: Store) -> None:
        self._store = store

    def describe(self) -> list[GaugeMetricFamily]:
        """Names without a database access, so that registering costs none."""
        return [_gauge("ppal_rounds", "Rounds, by state.", {}), _gauge("ppal_events", "Events, by state.", {})]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        rounds = {state: 0 for state in ROUND_STATES} | self._store.rounds.counts()
        yield _gauge("ppal_rounds", "Rounds, by state.", rounds)
        events = {state: 0 for state in EVENT_STATES} | self._store.events.counts()
        yield _gauge("ppal_events", "Events, by state.", events)
        projects = GaugeMetricFamily("ppal_projects", "Connected projects.", value=len(self._store.projects.all()))
        yield projects


def _gauge(name: str, text: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["state"])
    for state, count in values.items():
        family.add_metric([state], count)
    return family
