"""Logging for the processes we start: one record after the other on stderr, as text or as JSON, without secrets.

What a record is about (project, round) is bound with :func:`log_context` and becomes fields of the JSON.
Known secrets, tokens and credentials are blanked in the finished text, tracebacks included.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter

_NOISY = ("aiobotocore", "alembic", "botocore", "fsspec", "httpcore", "httpx", "huey", "label_studio_sdk", "matplotlib",
          "PIL", "s3fs", "urllib3", "werkzeug")  # fmt: skip
_SHORTEST_SECRET = 4  # a shorter one would blank half of the log
_PATTERNS = (
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]+"), "[token]"),
    (re.compile(r"\b(Bearer|Basic|Token)\s+[\w.~+/=-]{8,}", re.IGNORECASE), r"\1 [token]"),
    (re.compile(r"(://[^\s/:@'\"]*):[^\s/@'\"]+@"), r"\1:[password]@"),
)
_context: ContextVar[dict[str, int | str]] = ContextVar("log_context", default={})  # noqa: B039 (never changed)


def configure_logging(level: str, log_format: str = "text", secrets: Collection[str] = ()) -> None:
    """Set up the root logger; call once, at the start of a process.

    Args:
        level: the least level shown.
        log_format: ``text`` or ``json`` (one object a line).
        secrets: texts that are blanked wherever they turn up.
    """
    handler = logging.StreamHandler()
    handler.addFilter(_add_context)
    handler.setFormatter(Redacting(_json_formatter() if log_format == "json" else _TextFormatter(), secrets))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


@contextmanager
def log_context(**fields: int | str) -> Iterator[None]:
    """Everything this thread logs within is about ``fields``, such as ``project=7, round=3``."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


class Redacting(logging.Formatter):
    """Another formatter's text without secrets."""

    def __init__(self, inner: logging.Formatter, secrets: Collection[str]) -> None:
        super().__init__()
        self._inner = inner
        forms = {form for secret in secrets if len(secret) >= _SHORTEST_SECRET for form in _forms(secret)}
        self._secrets = sorted(forms, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        text = self._inner.format(record)
        for secret in self._secrets:
            text = text.replace(secret, "[secret]")
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
        return text


class _TextFormatter(logging.Formatter):
    """Continuation lines are indented, so that no message can pass itself off as another record."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        shown = record.message.replace("\r", "\\r").replace("\x1b", "\\x1b").replace("\n", "\n    ")
        record.message = shown
        return super().formatMessage(record)


def _json_formatter() -> logging.Formatter:
    names = {"levelname": "level", "name": "logger", "exc_info": "traceback"}
    return JsonFormatter(["levelname", "name", "message"], rename_fields=names, timestamp=True, json_ensure_ascii=False)


def _add_context(record: logging.LogRecord) -> bool:
    for name, value in _context.get().items():
        setattr(record, name, value)
    return True


def _forms(secret: str) -> tuple[str, str, str]:
    """A secret as it is, as JSON writes it, and as Python's repr does."""
    return secret, json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]
