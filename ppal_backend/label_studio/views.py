"""The Data Manager tab that shows what is to be labelled, in order.

Label Studio sorts a tab by a column. ``tasks:predictions_score`` is the mean score of the predictions of the project's
current model version, so a tab sorted by it follows every new queue by itself and is never written again.
"""

from __future__ import annotations

import logging
from typing import Any

from ppal_backend.errors import LabelStudioError
from ppal_backend.label_studio.client import LabelStudioClient

log = logging.getLogger(__name__)

TITLE = "PPAL queue"
FIRST_TITLE = "Default"
ROUTE = "/api/dm/views/"
_UNLABELLED = {"filter": "filter:tasks:total_annotations", "operator": "equal", "type": "Number", "value": 0}
QUEUE = {
    "title": TITLE,
    "ordering": ["tasks:predictions_score"],
    "filters": {"conjunction": "and", "items": [_UNLABELLED]},
}


def keep_queue_tab(client: LabelStudioClient, project_id: int) -> None:
    """Make the tab if the project has none of its title; a failure is logged, since the queue works without it.

    A tab that somebody deleted comes back with the next queue: its absence does not tell whether it was deleted or
    never made, and a note of that would outlive the wish. A tab of the title is left as it is, whatever its columns.
    A project without any tab gets the one first that Label Studio's own page would make, so that people still land
    on all tasks.

    Args:
        client: Label Studio.
        project_id: Project.
    """
    try:
        titles = _titles(client, project_id)
        if TITLE in titles:
            return
        if not titles:
            _make(client, project_id, {"title": FIRST_TITLE, "filters": {"conjunction": "and", "items": []}})
        _make(client, project_id, QUEUE)
    except LabelStudioError as error:
        log.warning("project %d: no tab %r in the Data Manager for now: %s", project_id, TITLE, error)


def _titles(client: LabelStudioClient, project_id: int) -> list[str]:
    views = client.transport.get(ROUTE, {"project": project_id})
    if not isinstance(views, list):
        raise LabelStudioError(f"expected the project's tabs as a list, got {type(views).__name__}")
    return [str((view.get("data") or {}).get("title", "")) for view in views]


def _make(client: LabelStudioClient, project_id: int, data: dict[str, Any]) -> None:
    client.transport.write("POST", ROUTE, json={"project": project_id, "data": data})
