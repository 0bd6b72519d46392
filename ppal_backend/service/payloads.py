"""What Label Studio sends to ``/setup``, ``/predict`` and ``/webhook``, read and checked where it enters.

Pure: no clock, no state, no I/O. Of an event only what is used is kept.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge

from ppal_backend.service.http_errors import RequestError

LONGEST_LABEL_CONFIG = 2 * 1024 * 1024
LONGEST_URL = 2048
LARGEST_PROJECT_ID = 2**31 - 1
LARGEST_ID = 2**63 - 1
_TIME = re.compile(r"[0-9T:.Z+-]{1,40}")
_PROJECT = re.compile(r"([0-9]{1,10})(?:\.[0-9]{1,20})?")


@dataclass(frozen=True)
class SetupBody:
    """``project_id`` and the ``key`` that tells it from a later project with the same id; the labeling
    config; Label Studio's address as it believes it to be ("" = not told); the extra parameters."""

    project_id: int
    key: str
    label_config: str
    hostname: str
    extra_params: dict[str, Any]


@dataclass(frozen=True)
class PredictBody:
    """The tasks to predict, as sent: each is checked on its own, so that one bad task spoils no other."""

    project_id: int
    tasks: list[Any]
    context: dict[str, Any] | None


def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in a request.

    Raises:
        RequestError: another content type, broken JSON, or not an object.
        RequestEntityTooLarge: more bytes than are accepted.
    """
    if not request.is_json:
        raise RequestError("expected the content type application/json", status=415)
    body = request.get_data(cache=False)
    if request.content_length is None and len(body) == request.max_content_length:
        raise RequestEntityTooLarge  # sent in chunks, and cut off where it got too long
    value = loads(body, "the request body")
    if not isinstance(value, dict):
        raise RequestError(f"expected the request body to be a JSON object, got {type(value).__name__}")
    return value


def loads(text: str | bytes, name: str) -> Any:
    """Strict JSON: no NaN or Infinity, nothing nested beyond reason.

    Raises:
        RequestError: ``text`` is not such JSON.
    """
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise RequestError(f"expected {name} to be JSON; it is nested too deep") from None
    except ValueError as error:
        position = f" (line {error.lineno} column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(f"expected {name} to be valid JSON{position}") from None


def setup_body(fields: dict[str, Any]) -> SetupBody:
    """Read what Label Studio sends to ``/setup``.

    Raises:
        RequestError: a field is missing or of the wrong kind.
    """
    project_id = project_of(fields)
    key = fields["project"] if isinstance(fields["project"], str) else str(project_id)
    label_config = clean_text(fields.get("schema"), "schema")
    if not label_config.strip() or len(label_config) > LONGEST_LABEL_CONFIG:
        raise RequestError(f"expected 'schema' to hold a labeling config of 1 to {LONGEST_LABEL_CONFIG} characters")
    hostname = clean_text(fields.get("hostname") or "", "hostname").strip().rstrip("/")
    return SetupBody(project_id, key, label_config, _checked_url(hostname), extra_params(fields.get("extra_params")))


def predict_body(fields: dict[str, Any]) -> PredictBody:
    """Read what Label Studio sends to ``/predict``.

    Raises:
        RequestError: a field is missing or of the wrong kind.
    """
    tasks = fields.get("tasks")
    if not isinstance(tasks, list):
        raise RequestError(f"expected 'tasks' to be a list of tasks, got {type(tasks).__name__}")
    params = fields.get("params")
    context = params.get("context") if isinstance(params, dict) else None
    return PredictBody(project_of(fields), tasks, context if isinstance(context, dict) else None)


def extra_params(value: object) -> dict[str, Any]:
    """The extra parameters of a model connection: null, "", JSON text or an object.

    Raises:
        RequestError: anything else.
    """
    if isinstance(value, str):
        value = loads(value, 'the extra parameters, such as {"budget": 50},') if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(
            f'expected the extra parameters to be a JSON object such as {{"budget": 50}}, got {type(value).__name__}'
        )
    return value


def is_loopback(url: str) -> bool:
    """Whether ``url`` points at the machine that this process runs on."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _checked_url(url: str) -> str:
    if not url:
        return ""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or len(url) > LONGEST_URL or parts.username or parts.password:
        raise RequestError("expected 'hostname' to be the URL of Label Studio, such as http://localhost:8080")
    return url


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True)
class Event:
    """One webhook delivery.

    ``body`` is ``{"annotations": [{"id", "task_id", "usable", "changed_at"}], "label_config": str | None, "tasks": n,
    "deleted_tasks": [id]}``: the annotations it tells of (``usable`` is false for skipped and deleted ones,
    ``changed_at`` is Label Studio's own text, left out where it tells none), the project's labeling config if the event
    is about the project itself, how many tasks came, and which ones went.
    """

    project_id: int
    action: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Ignored:
    """A delivery that asks for nothing; ``reason`` says why."""

    reason: str


def parse_event(payload: object) -> Event | Ignored:
    """Read a webhook payload.

    Returns:
        The event, or :class:`Ignored` for an action that this backend has no use for.

    Raises:
        RequestError: ``payload`` is not an object, or misses what its action always carries.
    """
    fields = _object(payload, "the payload")
    action = fields.get("action")
    if not isinstance(action, str):
        raise RequestError("expected the field 'action' with the name of a webhook event; send Label Studio's payload")
    read = _READERS.get(action)
    if read is None:
        return Ignored(f"action {action[:64]!r} is not used by this backend")
    project_id = project_of(fields)
    body = {"annotations": [], "label_config": None, "tasks": 0, "deleted_tasks": [], **read(fields)}
    return Event(project_id, action, body)


def project_of(fields: dict[str, Any]) -> int:
    """The id of the project that a payload is about.

    Raises:
        RequestError: it names none.
    """
    project = fields.get("project")
    if isinstance(project, dict):
        project = project.get("id")
    if isinstance(project, str):
        match = _PROJECT.fullmatch(project)
        project = int(match.group(1)) if match else None
    if not is_id(project, LARGEST_PROJECT_ID):
        raise RequestError(
            "expected 'project' with the id of a project; keep 'Send payload' switched on in the webhook's settings"
        )
    return int(project)  # type: ignore[arg-type]


def is_id(value: object, largest: int = LARGEST_ID) -> bool:
    """Whether ``value`` can be an id: a whole number from 1 to ``largest``."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"expected {name} to be a JSON object, got {type(value).__name__}")
    return value


def _objects(fields: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    """The objects under the first of ``names`` that is there; one object counts as a list of one."""
    for name in names:
        value = fields.get(name)
        if value is not None:
            items = value if isinstance(value, list) else [value]
            return [_object(item, f"every item of {name!r}") for item in items]
    raise RequestError(f"expected the field {names[0]!r}; send Label Studio's payload unchanged")


def _id(item: dict[str, Any], name: str) -> int:
    value = item.get("id")
    if not is_id(value):
        raise RequestError(f"expected every item of {name!r} to carry a positive integer 'id'")
    return int(value)  # type: ignore[arg-type]


def _written(fields: dict[str, Any]) -> dict[str, Any]:
    items = _objects(fields, "annotation", "annotations")
    outer = fields.get("task")
    only_task = outer.get("id") if isinstance(outer, dict) and len(items) == 1 else None
    return {"annotations": list(_annotations(items, only_task))}


def _annotations(items: Iterable[dict[str, Any]], only_task: object) -> Iterable[dict[str, Any]]:
    for item in items:
        task = item.get("task")
        if isinstance(task, dict):
            task = task.get("id")
        task = task if is_id(task) else only_task
        changed_at = item.get("updated_at")
        yield {
            "id": _id(item, "annotation"),
            "task_id": task if is_id(task) else None,
            "usable": not item.get("was_cancelled"),
            **({"changed_at": changed_at} if isinstance(changed_at, str) and _TIME.fullmatch(changed_at) else {}),
        }


def _deleted(fields: dict[str, Any]) -> dict[str, Any]:
    items = _objects(fields, "annotations", "annotation")
    return {"annotations": [{"id": _id(i, "annotations"), "task_id": None, "usable": False} for i in items]}


def _tasks(fields: dict[str, Any]) -> dict[str, Any]:
    return {"tasks": len(_objects(fields, "tasks", "task"))}


def _tasks_deleted(fields: dict[str, Any]) -> dict[str, Any]:
    return {"deleted_tasks": [_id(item, "tasks") for item in _objects(fields, "tasks", "task")]}


def _project(fields: dict[str, Any]) -> dict[str, Any]:
    config = _object(fields["project"], "'project'").get("label_config")
    return {"label_config": clean_text(config, "label_config") if config is not None else None}


def clean_text(value: object, name: str) -> str:
    """``value`` as text that every database can hold.

    Raises:
        RequestError: it is no text, or holds NUL or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise RequestError(f"expected {name!r} to be text, got {type(value).__name__}")
    if "\x00" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise RequestError(f"expected {name!r} to be valid Unicode text; it holds NUL or half a surrogate pair")
    return value


_READERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ANNOTATION_CREATED": _written,
    "ANNOTATION_UPDATED": _written,
    "ANNOTATIONS_CREATED": _written,
    "ANNOTATION_DELETED": _deleted,
    "ANNOTATIONS_DELETED": _deleted,
    "TASKS_CREATED": _tasks,
    "TASKS_DELETED": _tasks_deleted,
    "PROJECT_UPDATED": _project,
    "START_TRAINING": lambda fields: {},
}
ACTIONS = frozenset(_READERS)
