"""Signs of life of the workers: one file each, in the folder that they share with the service."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path

log = logging.getLogger(__name__)

FOLDER = "workers"
ALIVE_WITHIN_S = 30.0


class Heartbeat:
    """One worker's file; how long ago it was touched says whether the worker lives.

    Args:
        model_dir: the folder that service and workers share.
    """

    def __init__(self, model_dir: Path) -> None:
        self._path = model_dir.resolve() / FOLDER / f"{socket.gethostname()}-{os.getpid()}"

    def beat(self) -> None:
        """Still here. A disk that takes no file is logged, the worker goes on."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
        except OSError as error:
            log.warning("the worker's sign of life could not be written: %s", error)

    def end(self) -> None:
        """Leaving."""
        self._path.unlink(missing_ok=True)


def heartbeat_age_s(model_dir: Path) -> float | None:
    """Seconds since any worker's last sign of life; None when there is none.

    A time in the future, after a clock was set back, counts as that far off: a living worker mends it in seconds.
    """
    folder = model_dir.resolve() / FOLDER
    ages = []
    for path in folder.glob("*") if folder.is_dir() else ():
        try:
            ages.append(abs(time.time() - path.stat().st_mtime))
        except FileNotFoundError:  # that worker has just left
            continue
    return min(ages, default=None)
