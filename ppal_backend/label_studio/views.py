"""The Data Manager tab that shows what is to be labelled, in order.

Label Studio sorts a tab by a column. ``tasks:predictions_score`` is the mean score of the predictions of the project's
current model version, so a tab sorted by it follows every new queue by itself and is never written again.

A tab shows every column that it does not name as hidden, and Label Studio computes what it shows: about twenty columns,
the score and the image beyond the screen's edge. So a tab is made with what its page would hide.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ppal_backend.errors import LabelStudioError
from ppal_backend.label_studio.client import LabelStudioClient

log = logging.getLogger(__name__)

TITLE = "PPAL queue"
FIRST_TITLE = "Default"
ROUTE = "/api/dm/views/"
COLUMNS_ROUTE = "/api/dm/columns"
SHOWN = ("id", "predictions_score", "predictions_model_versions")
"""Columns of the queue's tab beside those of the tasks' own data."""
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
        columns = _columns(client, project_id)
        if not titles:
            first = {"title": FIRST_TITLE, "filters": {"conjunction": "and", "items": []}}
            _make(client, project_id, first | {"hiddenColumns": hidden_columns(columns)})
        _make(client, project_id, QUEUE | {"hiddenColumns": hidden_columns(columns, SHOWN)})
    except LabelStudioError as error:
        log.warning("project %d: no tab %r in the Data Manager for now: %s", project_id, TITLE, error)


def hidden_columns(columns: Iterable[Mapping[str, Any]], shown: Sequence[str] | None = None) -> dict[str, list[str]]:
    """What a tab hides in the list (``explore``) and beside an open task (``labeling``).

    Args:
        columns: All columns, as Label Studio describes them.
        shown: Columns to show in the list beside those of the tasks' data; None = those Label Studio shows by itself.
    """
    hidden: dict[str, list[str]] = {"explore": [], "labeling": []}
    for column in columns:
        own = column.get("parent") == "data"
        name = f"tasks:data.{column['id']}" if own else f"tasks:{column['id']}"
        by_default = column.get("visibility_defaults")
        if not isinstance(by_default, dict):  # a heading above other columns
            continue
        in_list = by_default.get("explore", True) if shown is None else own or column["id"] in shown
        if not in_list:
            hidden["explore"].append(name)
        if not by_default.get("labeling", True):
            hidden["labeling"].append(name)
    return hidden


def _columns(client: LabelStudioClient, project_id: int) -> list[dict[str, Any]]:
    answer = client.transport.get(COLUMNS_ROUTE, {"project": project_id})
    columns = answer.get("columns") if isinstance(answer, dict) else None
    if not isinstance(columns, list):
        raise LabelStudioError("expected the columns of the project's tabs, got something else")
    return columns


def _titles(client: LabelStudioClient, project_id: int) -> list[str]:
    views = client.transport.get(ROUTE, {"project": project_id})
    if not isinstance(views, list):
        raise LabelStudioError(f"expected the project's tabs as a list, got {type(views).__name__}")
    return [str((view.get("data") or {}).get("title", "")) for view in views]


def _make(client: LabelStudioClient, project_id: int, data: dict[str, Any]) -> None:
    client.transport.write("POST", ROUTE, json={"project": project_id, "data": data})
