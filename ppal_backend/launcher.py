"""``ppal up``: the service and the worker as processes that are restarted when one dies, and end with it."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

RESTART_AFTER_S = 1.0
STOP_WAIT_S = 90.0
GUNICORN = [
    sys.executable,
    "-m",
    "gunicorn",
    "-c",
    str(Path(__file__).parent / "service" / "gunicorn_conf.py"),
    "ppal_backend.service.app:create_app()",
]
WORKER = [sys.executable, "-m", "ppal_backend.cli", "worker"]
_PR_SET_PDEATHSIG = 1


def serve() -> None:
    """Become the HTTP service (gunicorn); does not return.

    SIGTERM waits meanwhile: gunicorn's configuration lets it through when there is somebody to hear it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.execv(GUNICORN[0], GUNICORN)


def dies_with_parent(number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    """A ``preexec_fn`` for ``subprocess.Popen``: the process is sent a signal when its parent ends, even by kill -9.

    On other systems than Linux a process outlives a killed parent, as is usual there. Linux takes the thread that
    starts the process for its parent, so start it in one that stays.

    Args:
        number: the signal.
    """
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def bind() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
            if os.getppid() != parent:  # it ended in between
                os._exit(1)

    return bind


class Group:
    """Processes that live and end together. One that dies by itself is started again.

    Args:
        commands: name to command line.
        environment: variables to add.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]], environment: Mapping[str, str] | None = None) -> None:
        self._commands = dict(commands)
        self._environment = {**os.environ, **(environment or {})}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, stop: threading.Event) -> None:
        """Keep every process alive until ``stop`` is set, then end them all."""
        try:
            for name in self._commands:
                self._start(name)
            while not stop.wait(0.2):
                for name, process in self.processes.items():
                    if process.poll() is not None:
                        log.error("%s ended with code %s; started again", name, process.returncode)
                        time.sleep(RESTART_AFTER_S)
                        self._start(name)
        finally:
            self._end()

    def _start(self, name: str) -> None:
        self.processes[name] = subprocess.Popen(
            list(self._commands[name]), env=self._environment, preexec_fn=dies_with_parent()
        )

    def _end(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for name, process in self.processes.items():
            try:
                process.wait(STOP_WAIT_S)
            except subprocess.TimeoutExpired:
                log.warning("%s did not stop within %.0f s; killed", name, STOP_WAIT_S)
                process.kill()
                process.wait()


def up(environment: Mapping[str, str] | None = None, workers: int = 1) -> None:
    """Run the service and workers until SIGTERM or Ctrl-C.

    Args:
        environment: variables to add.
        workers: how many.
    """
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    names = ["worker"] if workers == 1 else [f"worker {i + 1}" for i in range(workers)]
    Group({"service": GUNICORN, **dict.fromkeys(names, WORKER)}, environment).run(stop)
