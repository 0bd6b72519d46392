"""The backend as its own processes, for the demo and the end-to-end tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import requests

from ppal_backend.errors import LabelStudioError, StateError
from ppal_backend.launcher import dies_with_parent
from ppal_backend.rig.label_studio_server import free_port
from ppal_backend.settings import load_settings
from ppal_backend.store import RoundRecord, Store, open_store

START_TIMEOUT_S = 120.0


class Backend:
    """``ppal up`` on a free port; use it as a context manager.

    Args:
        model_dir: where it keeps its state.
        label_studio_url: Label Studio's address.
        token: a token for it.
        environment: more settings, by the names of the environment variables.
    """

    def __init__(
        self, model_dir: Path, label_studio_url: str, token: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.model_dir = model_dir.absolute()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = self.model_dir / "backend.log"
        self._environment = {
            **os.environ,
            "MODEL_DIR": str(self.model_dir),
            "PPAL_HOST": "127.0.0.1",
            "PPAL_PORT": str(self.port),
            "LABEL_STUDIO_URL": label_studio_url,
            "LABEL_STUDIO_API_KEY": token,
            **(environment or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """Its state, for reading."""
        if self._store is None:
            self._store = open_store(load_settings(MODEL_DIR=self.model_dir))
        return self._store

    def __enter__(self) -> Backend:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            StateError: it ended or did not answer; the text ends with its log.
        """
        self.model_dir.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ppal_backend.cli", "up"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=dies_with_parent(),
            )
        self.wait_until(self._answers, START_TIMEOUT_S, "the backend to answer")

    def stop(self) -> None:
        """End it and everything it started."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGTERM) if self._process.poll() is None else None
            self._process.wait()
            self._process = None
        if self._store is not None:
            self._store.close()
            self._store = None

    def find(self, *words: str) -> list[psutil.Process]:
        """Its processes whose command line holds all of ``words``."""
        assert self._process is not None
        children = psutil.Process(self._process.pid).children(recursive=True)
        return [p for p in children if all(word in " ".join(_command(p)) for word in words)]

    def connect(self, label_studio_session: object, project_id: int, extra_params: str = "") -> int:
        """Connect the project to this backend by the request that Label Studio's own dialog sends; the backend's id.

        Raises:
            LabelStudioError: Label Studio or the backend refused; the text says why.
        """
        body = {"project": project_id, "url": self.url, "title": "PPAL", "extra_params": extra_params}
        answer = label_studio_session.post("/api/ml", json=body)  # type: ignore[attr-defined]
        if answer.get("state") not in ("CO", None) and answer.get("error_message"):
            raise LabelStudioError(f"the backend was not connected: {answer['error_message']}")
        return int(answer["id"])

    def wait_for_round(
        self, project_id: int, number: int, timeout_s: float, on_poll: Callable[[RoundRecord], None] | None = None
    ) -> RoundRecord:
        """Wait until a round is done.

        Raises:
            StateError: it failed or took too long.
        """

        def done() -> bool:
            record = self._round(project_id, number)
            if record is None:
                return False
            if on_poll is not None:
                on_poll(record)
            if record.state in ("failed", "cancelled"):
                raise StateError(f"round {number} {record.state}: {record.error}\n{self.log_tail()}")
            return record.state == "done"

        self.wait_until(done, timeout_s, f"round {number} of project {project_id}")
        record = self._round(project_id, number)
        assert record is not None
        return record

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Poll ``condition`` until it holds.

        Raises:
            StateError: the time is over, or the backend ended.
        """
        end = time.monotonic() + timeout_s
        while not condition():
            if self._process is None or self._process.poll() is not None:
                raise StateError(f"the backend ended while waiting for {what}\n{self.log_tail()}")
            if time.monotonic() > end:
                raise StateError(f"waited {timeout_s:.0f} s for {what}\n{self.log_tail()}")
            time.sleep(0.2)

    def log_tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-30:])

    def _round(self, project_id: int, number: int) -> RoundRecord | None:
        return next((r for r in self.store.rounds.of_project(project_id) if r.number == number), None)

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
