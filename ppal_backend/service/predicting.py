"""Tasks to pre-annotations while somebody waits: one entry per task, in order, within a deadline.

A live prediction gets the score ``END_OF_QUEUE``. Label Studio serves the task with the lowest score first and
published places lie below it, so a task that was imported after the last round comes after all ranked ones, and a live
answer for a ranked task never moves it: among predictions of one version the lowest score counts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ppal_backend.engines.live import LiveModel, PredictionTimeout
from ppal_backend.errors import ImageError, LabelStudioError, PPALError
from ppal_backend.label_studio.predictions import detections_to_result
from ppal_backend.label_studio.publish import END_OF_QUEUE
from ppal_backend.label_studio.schema import LabelSchema, parse_label_config
from ppal_backend.service.payloads import is_id
from ppal_backend.service.runtime import Runtime, TaskImages
from ppal_backend.store import ProjectRecord
from ppal_backend.structures.detections import Detections

if TYPE_CHECKING:
    from ppal_backend.datasets.images import ImageInfo

log = logging.getLogger(__name__)

UNTRAINED = "ppal-untrained"
CHUNK = 8
REASONS_LOGGED = 5


@dataclass(frozen=True)
class _Item:
    """One task of a batch: its place, what to do, and what came of it. ``problem`` empty = no problem."""

    place: int
    task_id: int = 0
    url: str = ""
    problem: str = ""
    outcome: str = "predicted"
    image: ImageInfo | None = None
    result: tuple[dict[str, Any], ...] = ()

    def failed(self, outcome: str, problem: str) -> _Item:
        return replace(self, outcome=outcome, problem=problem)


def version_of(runtime: Runtime, project_id: int) -> str:
    """The version that the project's queue and predictions carry now."""
    active = runtime.store.versions.active(project_id)
    return active.version if active is not None else UNTRAINED


def predict(runtime: Runtime, project: ProjectRecord | None, tasks: Sequence[Any]) -> list[dict[str, Any]]:
    """Pre-annotations for tasks.

    Returns:
        Exactly one ``{"result", "score", "model_version"}`` per task, in order; the result is empty where
        there is no model, no readable image or no time, and the log says why.
    """
    if project is None:
        log.warning("%d tasks not predicted: their project is not connected to this backend", len(tasks))
        return empty(len(tasks), UNTRAINED)
    version = version_of(runtime, project.id)
    model = runtime.store.versions.active(project.id, with_model=True)
    if model is None:
        log.info("project %d: %d tasks not predicted: no model is trained yet", project.id, len(tasks))
        runtime.metrics.predicted("no_model", len(tasks))
        return empty(len(tasks), version)
    with runtime.fetched.reading(project, model.checkpoint) as checkpoint:
        items = _Batch(runtime, project, LiveModel(model.detector, str(checkpoint), model.labels)).run(tasks)
    runtime.fetched.prune(project.id, version)
    _count_outcomes(runtime, project.id, items)
    return [_entry(list(item.result), version) for item in items]


def empty(count: int, version: str) -> list[dict[str, Any]]:
    """``count`` predictions without boxes."""
    return [_entry([], version) for _ in range(count)]


def _entry(result: list[dict[str, Any]], version: str) -> dict[str, Any]:
    return {"result": result, "score": END_OF_QUEUE, "model_version": version}


def _count_outcomes(runtime: Runtime, project_id: int, items: Sequence[_Item]) -> None:
    for item in items:
        runtime.metrics.predicted(item.outcome)
    failed = [item for item in items if item.problem]
    for item in failed[:REASONS_LOGGED]:
        log.warning("project %d: task %d not predicted: %s", project_id, item.task_id, item.problem)
    if len(failed) > REASONS_LOGGED:
        log.warning("project %d: %d more tasks not predicted", project_id, len(failed) - REASONS_LOGGED)


class _Batch:
    """One ``/predict`` at work: chunk by chunk, so that what fits into the deadline is answered."""

    def __init__(self, runtime: Runtime, project: ProjectRecord, model: LiveModel) -> None:
        self._runtime, self._project, self._model = runtime, project, model
        self._deadline = time.monotonic() + runtime.predict_deadline_s
        self._options = runtime.settings.project_options(project.options)
        self._schema: LabelSchema = parse_label_config(project.label_config, self._options.from_name)
        self._stopped = ""  # why no further chunk is tried

    def run(self, tasks: Sequence[Any]) -> list[_Item]:
        """Every task of the batch, in order."""
        items = [self._read(place, task) for place, task in enumerate(tasks)]
        todo = [item for item in items if not item.problem]
        images = self._runtime.images(self._project) if todo else None
        for chunk in _chunks(todo):
            for item in self._chunk(images, chunk):
                items[item.place] = item
        return items

    def _read(self, place: int, task: Any) -> _Item:
        task_id = task.get("id") if isinstance(task, dict) else None
        if not isinstance(task_id, int) or not is_id(task_id):
            return _Item(place).failed("bad_task", "it is not an object with a positive integer 'id'")
        data = task.get("data")
        url = self._schema.image.url(data) if isinstance(data, dict) else None
        if url is None:
            problem = f"its data has no image under {self._schema.image.keys}"
            return _Item(place, task_id).failed("bad_task", problem)
        return _Item(place, task_id, url)

    def _chunk(self, images: TaskImages | None, chunk: Sequence[_Item]) -> Iterator[_Item]:
        if not self._stopped and self._remaining_s() <= 0:
            self._stopped = f"the {self._runtime.predict_deadline_s:.0f} s for a batch were over"
        if self._stopped or images is None:
            yield from (item.failed("no_time", self._stopped) for item in chunk)
            return
        fetched = self._fetched(images, chunk)
        yield from (item for item in fetched if item.problem)
        yield from self._detect([item for item in fetched if not item.problem])

    def _fetched(self, images: TaskImages, chunk: Sequence[_Item]) -> list[_Item]:
        """The chunk with its images; a fetch that outlasts the deadline goes on for the next caller's sake."""
        jobs = [(item, self._runtime.fetchers.submit(self._fetch, images, item)) for item in chunk]
        fetched = []
        for item, job in jobs:
            try:
                fetched.append(job.result(timeout=max(0.0, self._remaining_s())))
            except TimeoutError:
                job.cancel()
                fetched.append(item.failed("no_time", "its image did not come in time"))
        return fetched

    def _fetch(self, images: TaskImages, item: _Item) -> _Item:
        try:
            return replace(item, image=images.get(item.task_id, item.url))
        except ImageError as error:
            return item.failed("unreadable", str(error))
        except LabelStudioError as error:
            self._runtime.metrics.label_studio_failed(error)
            return item.failed("not_fetched", str(error))

    def _detect(self, items: Sequence[_Item]) -> Iterator[_Item]:
        if not items:
            return
        try:
            found = self._boxes(items)
        except PredictionTimeout as error:
            self._stopped = str(error)
            yield from (item.failed("no_time", str(error)) for item in items)
        except PPALError as error:
            self._stopped = str(error)
            yield from (item.failed("detector_error", str(error)) for item in items)
        else:
            yield from (self._with_boxes(item, found.get(item.task_id)) for item in items)

    def _boxes(self, items: Sequence[_Item]) -> dict[int, Detections]:
        images = [(item.task_id, str(item.image.path)) for item in items if item.image is not None]
        detections = self._runtime.predictor.predict(self._model, images, timeout_s=self._remaining_s())
        return {d.image_id: d for d in detections}

    def _with_boxes(self, item: _Item, detections: Detections | None) -> _Item:
        if detections is None or item.image is None:
            return item.failed("unreadable", "the detector could not read its image")
        result = detections_to_result(
            self._schema,
            self._model.labels,
            detections,
            item.image.width,
            item.image.height,
            self._options.score_threshold,
        )
        return replace(item, result=tuple(result))

    def _remaining_s(self) -> float:
        return self._deadline - time.monotonic()


def _chunks(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    return (items[i : i + CHUNK] for i in range(0, len(items), CHUNK))
