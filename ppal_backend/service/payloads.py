"""Bodies of ``/setup`` and ``/predict``, read and checked where they enter."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge

from ppal_backend.service.events import clean_text, project_of
from ppal_backend.service.problems import RequestError

LONGEST_LABEL_CONFIG = 2 * 1024 * 1024
LONGEST_URL = 2048


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
