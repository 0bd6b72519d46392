"""Logging for the processes we start: one line a record on stderr, other libraries' chatter kept down."""

from __future__ import annotations

import logging

_NOISY = ("httpx", "httpcore", "huey", "urllib3", "PIL", "matplotlib", "label_studio_sdk", "werkzeug")


def configure_logging(level: str) -> None:
    """Set up the root logger; call once, at the start of a process."""
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%H:%M:%S", force=True
    )
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
