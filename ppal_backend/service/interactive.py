"""A rough box or a click to the detector's box of that place, while somebody draws with Label Studio's smart tools.

What the round detected on the image lies on disk, so no detector runs here. All places are in percent of the image, as
Label Studio writes them: the overlap of boxes is the same in percent as in pixels.

*Which box.* A rough box becomes a detection whose overlap with it (intersection over union) is at least
:data:`LEAST_OVERLAP`; without one it comes back as it was drawn. A click becomes a detection that it lies in; without
one nothing comes back. Detections of the label that the person chose go first, then those of the highest confidence
(times the overlap, for a rough box). The box gets the label that the person chose, else the detection's.

*Once more.* Drawing or clicking at the same place again, with the same label, gives the next such detection, after
the last one the box as drawn, and then the first again. The answer carries the region id of the answer before, so that
Label Studio's editor puts it in that one's place.

An editor that does not accept suggestions at once sends every rough box that waits, and shows what the last answer
holds: the answer covers them all. One that does sends the regions that it accepted along with the new one: these bear
:data:`ANSWERED` in their ids and are not answered again, which would double them.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from ppal_backend.datasets.label_studio_json import region_to_box
from ppal_backend.errors import PPALError
from ppal_backend.label_studio.predictions import detections_to_result
from ppal_backend.label_studio.schema import CONTROL_TYPE, LabelSchema, parse_label_config
from ppal_backend.rounds.detections_store import DAMAGE, StoredDetections
from ppal_backend.rounds.folder import Rounds
from ppal_backend.service.http_errors import RequestError
from ppal_backend.service.payloads import is_id
from ppal_backend.service.runtime import Runtime
from ppal_backend.store import ModelVersion, ProjectRecord
from ppal_backend.structures.detections import pairwise_iou

log = logging.getLogger(__name__)

LEAST_OVERLAP = 0.4
"""Two equal boxes that overlap this much have each other's centre inside: it is one place, not a neighbour's."""
LEAST_SCORE = 0.05
ANSWERED = "ppal-"
SAME_BOX = 0.9  # overlap from which two detections are one box to a person who gives the label himself
SAME_PLACE = 0.7  # overlap of two rough boxes
SAME_CLICK_PCT = 1.5
AGAIN_S = 120.0
MOST_MARKS = 200
MOST_TASKS = 512
FOLDERS = ("detections", "labelled_detections")
PLUGINS = "ppal_backend.interactive"
CLICKS, BOXES = ("keypointlabels", "keypoint"), (CONTROL_TYPE, "rectangle")
_LABELS: Mapping[str, str] = MappingProxyType({CONTROL_TYPE: CONTROL_TYPE, "keypointlabels": "keypointlabels"})


class BoxFinder(Protocol):
    """A plug-in that is asked where nothing was detected (entry point group ``ppal_backend.interactive``)."""

    def __call__(
        self, image: Path, box_xyxy: tuple[float, float, float, float] | None, point: tuple[float, float] | None
    ) -> tuple[float, float, float, float] | None:
        """Corners in pixels of the object that a rough box or a click (the other one is None) means, None if unsure."""


@dataclass(frozen=True)
class Mark:
    """What somebody drew: ``box_pct`` are corners in percent, both the same point for a click; ``label`` of the
    project, None where none was chosen."""

    id: str
    region: Mapping[str, Any]
    box_pct: tuple[float, float, float, float]
    label: str | None
    is_click: bool
    width: int
    height: int

    def is_at(self, other: Mark) -> bool:
        """Whether two marks ask for the same object: one kind, one label, one place."""
        if (self.is_click, self.label) != (other.is_click, other.label):
            return False
        if self.is_click:
            return max(abs(a - b) for a, b in zip(self.box_pct, other.box_pct, strict=True)) <= SAME_CLICK_PCT
        return float(pairwise_iou(np.array([self.box_pct]), np.array([other.box_pct]))[0, 0]) >= SAME_PLACE


@dataclass
class _Place:
    """One place of a task: the last mark there, which turn every mark had, and the id of the answer."""

    mark: Mark
    answer_id: str
    at: float
    turns: dict[str, int] = field(default_factory=dict)


class Places:
    """Where people asked lately, so that a second mark at a place gets the next detection. Bounded, for threads.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._tasks: OrderedDict[tuple[int, int], list[_Place]] = OrderedDict()

    def turns(self, project_id: int, task_id: int, marks: Sequence[Mark]) -> list[tuple[Mark, int, str]]:
        """Of all marks that are on the screen the last one at every place, its turn from 0 on, and its answer's id."""
        now = self._clock()
        with self._lock:
            known = self._tasks.pop((project_id, task_id), [])
            waiting = {mark.id for mark in marks}
            known = [place for place in known if now - place.at <= AGAIN_S or waiting & place.turns.keys()]
            asked: dict[str, tuple[Mark, int, str]] = {}
            for mark in marks:
                place = self._place(known, mark, now, task_id)
                asked.pop(place.answer_id, None)
                asked[place.answer_id] = mark, place.turns[mark.id], place.answer_id
            self._tasks[project_id, task_id] = known[-MOST_MARKS:]
            while len(self._tasks) > MOST_TASKS:
                self._tasks.popitem(last=False)
        return list(asked.values())

    @staticmethod
    def _place(known: list[_Place], mark: Mark, now: float, task_id: int) -> _Place:
        for place in reversed(known):
            if place.mark.is_at(mark):
                turn = place.turns.get(mark.id)
                place.turns[mark.id] = max(place.turns.values()) + 1 if turn is None else turn
                place.mark, place.at = mark, now
                return place
        text = f"{task_id}|{mark.id}|{mark.box_pct}|{mark.label}"
        answer_id = ANSWERED + hashlib.blake2s(text.encode(), digest_size=5).hexdigest()
        known.append(_Place(mark, answer_id, now, {mark.id: 0}))
        return known[-1]


_places = Places()


def answer(
    runtime: Runtime,
    project: ProjectRecord | None,
    tasks: Sequence[Any],
    context: Mapping[str, Any],
    places: Places | None = None,
) -> list[dict[str, Any]]:
    """The regions to suggest for what is drawn on one task.

    Args:
        runtime: what the service works with.
        project: the task's project; None when it is not connected.
        tasks: as Label Studio sends them, exactly one.
        context: its ``result`` holds the drawn regions, the last one drawn at the end.
        places: what was asked before; this process's by default.

    Raises:
        RequestError: the context is none of a rectangle or a click on the project's image. Label Studio then leaves
            what was drawn as it is.
    """
    if project is None:
        raise RequestError("expected a connected project; add this backend under Settings > Model of the project")
    options = runtime.settings.project_options(project.options)
    schema = parse_label_config(project.label_config, options.from_name)
    task = tasks[0] if len(tasks) == 1 else None
    if not isinstance(task, dict) or not is_id(task.get("id")):
        raise RequestError("expected one task with a positive integer 'id' beside a context")
    marks = read_marks(context, schema)
    marks = [mark for mark in marks[:-1] if not mark.id.startswith(ANSWERED)] + marks[-1:]
    turns = (places or _places).turns(project.id, task["id"], marks)
    if not turns:
        return []
    version = runtime.store.versions.active(project.id)
    known = _known_boxes(runtime, project, schema, version, task, turns[0][0])
    found = []
    for mark, turn, answer_id in turns:
        choices = candidates(mark, known) or _asked_plugin(runtime, project, schema, task, mark)
        if not mark.is_click:
            choices = [*choices, _as_drawn(mark)]
        if choices:
            found.append({**choices[turn % len(choices)], "id": answer_id})
    runtime.metrics.predicted("interactive")
    return found


def candidates(mark: Mark, known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The detections that a mark can mean, the likeliest first, with the mark's label where it has one.

    Args:
        mark: What was drawn.
        known: The detections of the image as regions of a prediction.
    """
    if not known:
        return []
    boxes = np.array([_corners(region["value"]) for region in known])
    drawn = np.array(mark.box_pct)
    scores = np.array([float(region.get("score") or 0.0) for region in known])
    if mark.is_click:
        fits = ((boxes[:, :2] <= drawn[:2]) & (drawn[2:] <= boxes[:, 2:])).all(1)
        worth = scores
    else:
        overlap = pairwise_iou(boxes, drawn[None])[:, 0]
        fits, worth = overlap >= LEAST_OVERLAP, overlap * scores
    labels = [region["value"][CONTROL_TYPE][0] for region in known]
    order = sorted(np.flatnonzero(fits).tolist(), key=lambda i: (mark.label not in (None, labels[i]), -worth[i]))
    taken: list[int] = []
    for i in order:
        same = [j for j in taken if mark.label is not None or labels[i] == labels[j]]
        if not same or float(pairwise_iou(boxes[i : i + 1], boxes[same]).max()) < SAME_BOX:
            taken.append(i)
    return [_labelled(known[i], mark.label or labels[i]) for i in taken]


def read_marks(context: Mapping[str, Any], schema: LabelSchema) -> list[Mark]:
    """What a context says was drawn, the last one at the end; none for an empty ``result``.

    Raises:
        RequestError: there is no ``result``, or a region is no rectangle or click inside the project's image.
    """
    result = context.get("result")
    if not isinstance(result, list) or len(result) > MOST_MARKS:
        got = f"{len(result)} of them" if isinstance(result, list) else type(result).__name__
        raise RequestError(f"expected 'result' of the context to list up to {MOST_MARKS} drawn regions, got {got}")
    return [_mark(region, schema) for region in result]


def _mark(region: Any, schema: LabelSchema) -> Mark:
    kind = region.get("type") if isinstance(region, dict) else None
    value = region.get("value") if isinstance(region, dict) else None
    if kind not in (*CLICKS, *BOXES) or not isinstance(value, dict):
        shown = str(kind)[:40] if kind is not None else type(region).__name__
        raise RequestError(f"expected a drawn rectangle or key point, got {shown}; draw with one of their smart tools")
    control, target = (str(region.get(name))[:40] for name in ("from_name", "to_name"))
    if target != schema.to_name or (kind == CONTROL_TYPE and control != schema.from_name):
        raise RequestError(
            f"expected a region of {schema.from_name!r} on {schema.to_name!r}, got one of {control!r} on {target!r}; "
            "draw with that control, or name the other one in from_name"
        )
    width, height = region.get("original_width"), region.get("original_height")
    if not is_id(width) or not is_id(height):
        raise RequestError("expected original_width and original_height of the drawn region in pixels")
    is_click = kind in CLICKS
    hull = region_to_box({**value, "width": 0, "height": 0} if is_click else value, width, height)
    if hull is None or not all(math.isfinite(n) for n in hull):
        raise RequestError("expected numbers for the place of the drawn region")
    scale = (100 / width, 100 / height) * 2
    box = tuple(min(max(n * s, 0.0), 100.0) for n, s in zip(hull, scale, strict=True))
    gone = max(abs(a - b * s) for a, b, s in zip(box, hull, scale, strict=True)) > 0.01 if is_click else False
    if gone or (not is_click and (box[2] <= box[0] or box[3] <= box[1])):
        raise RequestError("expected a region inside the image, got one outside of it or without an area")
    names = value.get(_LABELS.get(kind, ""))
    label = schema.label(str(names[0])) if isinstance(names, list) and names else None
    return Mark(str(region.get("id"))[:80], region, box, label, is_click, width, height)


def _known_boxes(
    runtime: Runtime,
    project: ProjectRecord,
    schema: LabelSchema,
    version: ModelVersion | None,
    task: Mapping[str, Any],
    mark: Mark,
) -> list[dict[str, Any]]:
    """What the round in force detected on the task's image; else the boxes that it was published with."""
    if version is None:
        log.info("project %d: nothing to suggest on task %d: no round is done yet", project.id, task["id"])
        return []
    every = replace(schema, score_threshold=None, label_thresholds={})
    folder = Rounds(runtime.settings).path(project.id, version.round_number)
    for name in FOLDERS:
        try:
            stored = _opened(folder / name, _changed_ns(folder / name)).boxes_of(task["id"])
        except DAMAGE as error:
            log.warning("%s cannot be read (%s); its boxes are not suggested", folder / name, error)
            continue
        if stored is not None:
            width, height = stored.image_size or (mark.width, mark.height)
            return detections_to_result(every, version.labels, stored, width, height, LEAST_SCORE)
    return [
        region
        for prediction in _list(task.get("predictions"))
        if isinstance(prediction, dict) and prediction.get("model_version") == version.version
        for region in _list(prediction.get("result"))
        if _is_usable(region, schema)
    ]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


@lru_cache(maxsize=8)
def _opened(folder: Path, _changed: int) -> StoredDetections:
    return StoredDetections(folder, embeddings=False)


def _changed_ns(folder: Path) -> int:
    """Changes when a shard appears or goes: shards are never written to again."""
    return folder.stat().st_mtime_ns if folder.is_dir() else 0


def _is_usable(region: Any, schema: LabelSchema) -> bool:
    if not isinstance(region, dict) or region.get("type") != CONTROL_TYPE or not isinstance(region.get("value"), dict):
        return False
    value = region["value"]
    numbers = [*(value.get(name) for name in ("x", "y", "width", "height")), region.get("score") or 0.0]
    good = all(isinstance(n, int | float) and math.isfinite(n) for n in numbers) and not value.get("rotation")
    names = value.get(CONTROL_TYPE)
    return good and isinstance(names, list) and bool(names) and names[0] in schema.labels


def _corners(value: Mapping[str, Any]) -> tuple[float, float, float, float]:
    x, y, width, height = (float(value[name]) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def _labelled(region: Mapping[str, Any], label: str) -> dict[str, Any]:
    return {**region, "value": {**region["value"], CONTROL_TYPE: [label]}}


def _as_drawn(mark: Mark) -> dict[str, Any]:
    kept = ("from_name", "to_name", "type", "original_width", "original_height", "image_rotation", "value")
    return {name: mark.region[name] for name in kept if name in mark.region}


def _asked_plugin(
    runtime: Runtime, project: ProjectRecord, schema: LabelSchema, task: Mapping[str, Any], mark: Mark
) -> list[dict[str, Any]]:
    """What a plug-in makes of a mark where nothing was detected; held to the same rule as a detection."""
    finder = _plugin()
    data = task.get("data")
    url = schema.image.url(data) if isinstance(data, dict) else None
    if finder is None or url is None or mark.label is None:
        return []
    scale = np.array([mark.width, mark.height] * 2) / 100
    box = tuple((np.array(mark.box_pct) * scale).tolist())
    try:
        image = runtime.images(project).get(task["id"], url)
        corners = finder(image.path, None if mark.is_click else box, box[:2] if mark.is_click else None)
        if corners is None:
            return []
        x1, y1, x2, y2 = (min(max(float(n), 0.0), 100.0) for n in np.asarray(corners, float) / scale)
    except PPALError as error:
        log.warning("project %d: no image of task %d for a plug-in: %s", project.id, task["id"], error)
        return []
    except Exception:  # a plug-in is others' code
        log.exception("the plug-in %s failed; what was drawn stays as it is", PLUGINS)
        return []
    region = {
        **_as_drawn(mark),
        "from_name": schema.from_name,
        "type": CONTROL_TYPE,
        "value": {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "rotation": 0, CONTROL_TYPE: [mark.label]},
        "score": 1.0,
    }
    return candidates(mark, [region]) if x2 > x1 and y2 > y1 else []


@lru_cache(maxsize=1)
def _plugin() -> BoxFinder | None:
    """The first plug-in that is installed and can be loaded."""
    for point in entry_points(group=PLUGINS):
        try:
            found: BoxFinder = point.load()
        except Exception:  # a plug-in is others' code
            log.exception("the plug-in %s of %s could not be loaded", point.name, PLUGINS)
        else:
            log.info("boxes that nobody detected are asked of the plug-in %s", point.name)
            return found
    return None
