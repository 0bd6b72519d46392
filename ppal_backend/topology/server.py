"""A server of the system's packages as a child process: started, waited for, stopped, and gone with its parent."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ppal_backend.errors import StateError
from ppal_backend.launcher import dies_with_parent

START_S = 60.0
STOP_S = 30.0


class Server:
    """A server process. ``start`` after ``stop`` or ``kill`` brings it back on the same port and data.

    Args:
        name: for messages.
        command: its command line.
        log: file for what it prints, appended to.
        ready: whether it answers.
        user: runs as this user and group; as ours without.
        stop_with: the signal that ends it in good order.
        config: what it reads from standard input.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        ready: Callable[[], bool],
        *,
        user: str | None = None,
        stop_with: signal.Signals = signal.SIGTERM,
        config: str = "",
    ) -> None:
        self._name, self._command, self._log, self._ready = name, list(command), log, ready
        self._user, self._stop_with, self._config = user, stop_with, config
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            StateError: it ended or did not answer in time; the text ends with its log.
        """
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd="/", user=self._user,
                group=self._user, extra_groups=[] if self._user else None, start_new_session=True,
                preexec_fn=dies_with_parent(self._stop_with),
            )  # fmt: skip
        assert self.process.stdin is not None
        with self.process.stdin as stdin:
            stdin.write(self._config.encode())
        end = time.monotonic() + START_S
        while not self._ready():
            if self.process.poll() is not None:
                raise StateError(f"expected {self._name} to run, got an end of it\n{self._tail()}")
            if time.monotonic() > end:
                raise StateError(f"expected {self._name} within {START_S:.0f} s, got no answer\n{self._tail()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """End it in good order; does nothing when it is not running."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(self._stop_with)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _tail(self, lines: int = 10) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])
