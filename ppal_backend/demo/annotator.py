"""A scripted annotator: works through Label Studio's own queue and corrects what it is shown by the ground truth."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from ppal_backend.datasets.ground_truth import ImageTruth
from ppal_backend.errors import DatasetError, LabelConfigError
from ppal_backend.rig.session import LabelStudioSession, NotFoundError

logger = logging.getLogger(__name__)

OnTask = Callable[[int, int], None]
"""Called with the task id and the number of tasks done so far."""
_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")


@dataclass(frozen=True)
class ServedTask:
    """A task as Label Studio served it.

    Attributes:
        task_id: Its id.
        queue: Name of the queue Label Studio took it from.
        data: Its data (image address and so on).
        predictions: The pre-annotations that came with it.
    """

    task_id: int
    queue: str
    data: Mapping[str, Any]
    predictions: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class _Control:
    from_name: str
    to_name: str
    data_key: str


class ScriptedAnnotator:
    """Labels tasks in the order that Label Studio serves them, as a person does with "Label All Tasks".

    Args:
        base_url: Address of Label Studio.
        token: Personal access token or legacy token.
        project_id: The project.
        truth: What to answer, by task id or by image file name (an upload's random prefix is ignored).
        timeout_s: Limit for every request.
    """

    def __init__(
        self,
        base_url: str,
        token: str,
        project_id: int,
        truth: Mapping[int, ImageTruth] | Mapping[str, ImageTruth],
        *,
        timeout_s: float = 120.0,
    ) -> None:
        self._session = LabelStudioSession(base_url, token, timeout_s)
        self._project_id = project_id
        self._truth: dict[int | str, ImageTruth] = {key: value for key, value in truth.items()}
        self._control: _Control | None = None
        self._view: int | None = None
        self.served: list[ServedTask] = []

    def next_task(self) -> ServedTask | None:
        """Ask for the next task the way the labeling screen does; None when the queue is empty.

        Label Studio locks the task for this person: asking again without submitting gives the same task.
        """
        query = {"id": "next_task", "project": self._project_id, "tabID": self._tab()}
        try:
            task = self._session.post("/api/dm/actions", params=query, json={"project": str(self._project_id)})
        except NotFoundError as error:
            if "no tasks" in str(error):
                return None
            raise
        predictions = tuple(task.get("predictions") or ())
        return ServedTask(int(task["id"]), str(task.get("queue", "")), task["data"], predictions)

    def submit(self, task: ServedTask) -> int:
        """Submit the true boxes of a task (an empty result when it shows nothing) and return the annotation's id.

        Pre-annotations that came with the task are corrected rather than drawn anew, as a person would in the editor.

        Raises:
            DatasetError: The ground truth does not know this task.
        """
        control = self._labels_control()
        truth = self._truth_of(task, control)
        body: dict[str, Any] = {"result": [_region(control, truth, box) for box in truth.boxes]}
        if task.predictions:
            shown = task.predictions[0]
            body = {"result": corrected(body["result"], shown["result"]), "parent_prediction": shown["id"]}
        answer = self._session.post(f"/api/tasks/{task.task_id}/annotations/", json=body)
        return int(answer["id"])

    def label_next(self) -> int | None:
        """Label one task; its id, or None when the queue is empty."""
        task = self.next_task()
        if task is None:
            return None
        self.submit(task)
        self.served.append(task)
        return task.task_id

    def label(self, count: int, on_done: OnTask | None = None) -> list[int]:
        """Label up to ``count`` tasks; the ids in the order they were served."""
        done: list[int] = []
        while len(done) < count:
            task_id = self.label_next()
            if task_id is None:
                logger.info("the queue of project %s is empty after %s tasks", self._project_id, len(done))
                break
            done.append(task_id)
            if on_done is not None:
                on_done(task_id, len(done))
        return done

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _tab(self) -> int:
        """The project's first Data Manager tab; made as the labeling screen makes it when there is none."""
        if self._view is None:
            views = self._session.get("/api/dm/views", params={"project": self._project_id})
            if not views:
                data = {"title": "Default", "filters": {"conjunction": "and", "items": []}, "ordering": []}
                views = [self._session.post("/api/dm/views/", json={"project": self._project_id, "data": data})]
            self._view = int(views[0]["id"])
        return self._view

    def _labels_control(self) -> _Control:
        if self._control is None:
            project = self._session.get(f"/api/projects/{self._project_id}/")
            self._control = _rectangle_control(project["parsed_label_config"])
        return self._control

    def _truth_of(self, task: ServedTask, control: _Control) -> ImageTruth:
        if task.task_id in self._truth:
            return self._truth[task.task_id]
        name = PurePosixPath(unquote(urlsplit(str(task.data.get(control.data_key, ""))).path)).name
        for key in (name, _UPLOAD_PREFIX.sub("", name)):
            if key in self._truth:
                return self._truth[key]
        raise DatasetError(
            f"expected the ground truth of task {task.task_id} ({name}), got none; give it by task id or file name"
        )


def _rectangle_control(parsed: Mapping[str, Any]) -> _Control:
    for name, control in parsed.items():
        inputs = control.get("inputs") or [{}]
        if control.get("type") == "RectangleLabels" and inputs[0].get("type") == "Image":
            return _Control(name, control["to_name"][0], inputs[0]["value"])
    raise LabelConfigError("expected RectangleLabels on an Image in the labeling config, got none; add them")


def _region(control: _Control, truth: ImageTruth, box: tuple[str, float, float, float, float]) -> dict[str, Any]:
    """One rectangle in Label Studio's form: percent of the image."""
    label, x, y, width, height = box
    return {
        "id": uuid.uuid4().hex[:10],
        "from_name": control.from_name,
        "to_name": control.to_name,
        "type": "rectanglelabels",
        "origin": "manual",
        "original_width": truth.width,
        "original_height": truth.height,
        "image_rotation": 0,
        "value": {
            "x": 100.0 * x / truth.width,
            "y": 100.0 * y / truth.height,
            "width": 100.0 * width / truth.width,
            "height": 100.0 * height / truth.height,
            "rotation": 0,
            "rectanglelabels": [label],
        },
    }


Region = dict[str, Any]

TYPE = "rectanglelabels"
GOOD_IOU = 0.85
SAME_OBJECT_IOU = 0.5


def corrected(truth: Sequence[Region], shown: Sequence[Mapping[str, Any]]) -> list[Region]:
    """Turn the regions of a prediction into those that a person submits, as Label Studio's editor writes them.

    A shown box belongs to the true one that it overlaps most, by at least ``SAME_OBJECT_IOU``; pairs are made from the
    largest overlap down. With the right label and an overlap of ``GOOD_IOU`` it stays as it is (origin
    ``prediction``), else it takes the true box's place and label and keeps its id (``prediction-changed``). Shown
    boxes without a true one are removed, true boxes without a shown one are drawn (``manual``).

    Args:
        truth: Rectangles as they should be, one control, values in percent of the image.
        shown: Regions of the prediction; those of other kinds or controls are left out.

    Returns:
        The result to submit, corrected regions first, in their order.
    """
    controls = {region["from_name"] for region in truth}
    known = [r for r in shown if r.get("type") == TYPE and (not controls or r.get("from_name") in controls)]
    pairs = sorted(
        ((overlap(t["value"], s["value"]), i, j) for i, s in enumerate(known) for j, t in enumerate(truth)),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    of_shown: dict[int, tuple[int, float]] = {}
    taken: set[int] = set()
    for iou, i, j in pairs:
        if iou >= SAME_OBJECT_IOU and i not in of_shown and j not in taken:
            of_shown[i] = (j, iou)
            taken.add(j)
    result = [_answer(known[i], truth[j], iou) for i, (j, iou) in sorted(of_shown.items())]
    return result + [region for j, region in enumerate(truth) if j not in taken]


def overlap(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Intersection over union in [0, 1] of two upright boxes given by x, y, width and height."""
    width = min(a["x"] + a["width"], b["x"] + b["width"]) - max(a["x"], b["x"])
    height = min(a["y"] + a["height"], b["y"] + b["height"]) - max(a["y"], b["y"])
    shared = max(0.0, width) * max(0.0, height)
    union = a["width"] * a["height"] + b["width"] * b["height"] - shared
    return shared / union if union > 0 else 0.0


def _answer(shown: Mapping[str, Any], true: Region, iou: float) -> Region:
    if iou >= GOOD_IOU and shown["value"][TYPE] == true["value"][TYPE]:
        return {**shown, "origin": "prediction"}
    return {**shown, "origin": "prediction-changed", "value": true["value"]}
