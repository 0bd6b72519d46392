"""Errors of a request, and how every error becomes a JSON answer without a traceback or a secret."""

from __future__ import annotations

import logging
import uuid
from typing import Any

from flask import Flask, Response, jsonify
from werkzeug.exceptions import HTTPException

from ppal_backend.errors import (
    ArtifactsUnavailable,
    LabelStudioError,
    LabelStudioUnavailable,
    PPALError,
    QueueUnavailable,
    StateError,
    StoreUnavailable,
)

log = logging.getLogger(__name__)

LONGEST_REASON = 1000
"""Characters of a status line: the list of detectors alone has some hundreds."""


class RequestError(PPALError):
    """A request that cannot be served as sent; ``status`` is the HTTP status to answer with."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def install(app: Flask) -> None:
    """Make every error of ``app`` a JSON object ``{"error": text}``."""
    app.register_error_handler(PPALError, _expected)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _unexpected)


def answer(message: str, status: int) -> Response:
    """The JSON error ``message`` with ``status``.

    The message is the status line's reason too: of an answer to ``/setup``, Label Studio's connect dialog shows
    that and nothing else. It goes on with "for url: …" behind it, hence the full stop. The dialog takes the text for
    HTML, so angle brackets are left out: with them tags would be missing from it, or worse, work.
    """
    response = jsonify({"error": message})
    plain = message.translate({ord(bracket): None for bracket in "<>"})
    reason = " ".join(plain.encode("ascii", "replace").decode().split())[:LONGEST_REASON]
    response.status = f"{status} {reason}." if reason.isprintable() and reason else str(status)
    return response


def status_of(error: PPALError) -> int:
    """The HTTP status that tells a caller what kind of error it met."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, LabelStudioUnavailable | StoreUnavailable | QueueUnavailable | ArtifactsUnavailable):
        return 503
    if isinstance(error, LabelStudioError):
        return 424
    return 404 if isinstance(error, StateError) else 400


def _expected(error: PPALError) -> Response:
    log.info("refused: %r", str(error))
    return answer(str(error), status_of(error))


def _http(error: HTTPException) -> Any:
    known = error.get_response()  # keeps Allow, Retry-After and redirects
    if error.code is None or error.code < 400:
        return known
    response = answer(_text_of(error), error.code)
    for name in ("Allow", "Retry-After", "WWW-Authenticate"):
        if name in known.headers:
            response.headers[name] = known.headers[name]
    return response


def _text_of(error: HTTPException) -> str:
    if error.code == 413:
        return "the request is larger than this backend accepts; raise PPAL_MAX_REQUEST_MIB if it has to be"
    return str(error.description or error.name)


def _unexpected(error: Exception) -> Response:
    reference = uuid.uuid4().hex[:8]
    log.error("unexpected error, reference %s", reference, exc_info=error)
    return answer(f"internal error; see the backend's log, reference {reference}", 500)
