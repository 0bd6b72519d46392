"""Images like some that people point at: from a card, a box of it, or what was drawn round on the map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ppal_backend.errors import StateError
from ppal_backend.rounds.detections_store import read_boxes
from ppal_backend.rounds.similar import MOST_ASKED, Similar, most_similar, nearest_labelled, objects_of
from ppal_backend.service.dashboard.project import Project
from ppal_backend.service.dashboard.queue import (
    ALIKE,
    AS_GOOD_AS_THERE,
    Item,
    items_on,
    key_of,
    servable,
    steering_of,
    without,
)

FOUND = 24


def similar_page(project: Project, task_ids: Sequence[int], box: int | None) -> dict[str, Any]:
    """The images of the pool that are most like some of its tasks, or like one box of one.

    Args:
        project: the project.
        task_ids: the tasks; of more than can be asked for at once an even sample counts.
        box: row of the box among the boxes of the one task; None for the images as a whole.

    Raises:
        StateError: no queue is published, or there is nothing to look for.
    """
    version = project.active
    query = project.files(version.round_number).query() if version is not None else None
    if version is None or query is None:
        raise StateError(f"no queue of project {project.id} is published yet; similar images come with the first model")
    files = project.files(version.round_number)
    since = project.labelled_since(version.round_number)
    left = without(query, since)
    asked = list(dict.fromkeys(task_ids))
    chosen = asked if len(asked) <= MOST_ASKED else asked[:: -(-len(asked) // MOST_ASKED)]
    least = project.options.score_threshold
    detections = files.folder / "detections"
    looked_for = objects_of(detections, chosen, least, box)
    found = most_similar(detections, looked_for, least, FOUND, left.queue)
    labelled = nearest_labelled([(detections, since), (files.folder / "labelled_detections", None)], looked_for, least)
    shown = replace(left, queue=(*chosen, *(one.image_id for one in found)))
    boxes = read_boxes(detections, shown.queue)
    rows = {one.image_id: one for one in found}
    items = items_on(
        replace(query, queue=query.queue),
        1,
        version.labels,
        files.pool(),
        boxes,
        least,
        left=shown,
        page_size=len(shown.queue),
    )
    items = [servable(project, _marked(item, rows.get(item.task_id))) for item in items]
    return {
        "version": version, "asked": items[: len(chosen)], "left_out": len(asked) - len(chosen), "box": box,
        "items": [(item, rows[item.task_id].similarity / ALIKE) for item in items[len(chosen) :]],
        "labelled": [(one.image_id, one.similarity / ALIKE) for one in labelled],
        "is_new": not labelled or labelled[0].similarity / ALIKE < AS_GOOD_AS_THERE,
        "key": key_of(items), "threshold": least, **steering_of(project),
    }  # fmt: skip


def _marked(item: Item, found: Similar | None) -> Item:
    """The item with its most similar object drawn strong, instead of the boxes that count for its utility."""
    row = None if found is None else found.box_index
    return replace(item, boxes=[replace(b, counts=b.row == row, label_at=None) for b in item.boxes])
