"""A rig of real processes: workers and rounds with a fake detector, state and queue as they are in production."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ppal_backend.settings import load_settings
from ppal_backend.store import open_store
from tests.faults.http_label_studio import HttpLabelStudio
from tests.label_studio.fake import LEGACY
from tests.place import CONFIG
from tests.servers import wait_for

ROOT = Path(__file__).parent.parent.parent
POOL = range(1000, 1030)
WAIT_S = 300
"""No test claims it: on a busy machine a process takes minutes to import torch."""


class Rig:
    """Projects on a Label Studio, a data folder, and workers to start and to kill."""

    def __init__(self, folder, environment=None):
        self.folder, self.data = folder, folder / "data"
        folder.mkdir(exist_ok=True)
        self.label_studio = HttpLabelStudio()
        self.variables = {
            "MODEL_DIR": str(self.data),
            "LABEL_STUDIO_API_KEY": LEGACY,
            "LABEL_STUDIO_URL": "",
            "PPAL_POLL_INTERVAL_S": "1",
            "PPAL_MIN_FREE_GIB": "0",
            "START_TRAINING_EACH_N_UPDATES": "5",
            **(environment or {}),
        }
        self.environment = {**os.environ, **self.variables, "PPAL_RIG": str(folder), "PYTHONPATH": str(ROOT)}
        self.settings = self._settings()
        self.store = open_store(self.settings)
        self.workers = []

    def _settings(self):
        saved = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)
        try:
            return load_settings()
        finally:
            for name, value in saved.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def project(self, project_id):
        fake = self.label_studio.add(project_id, CONFIG, POOL)
        self.store.projects.connect(project_id, f"{project_id}.1", CONFIG, self.label_studio.url(project_id), {})
        return fake

    def ask(self, project_id, kind="train"):
        return self.store.rounds.request(project_id, kind, "asked for by a test").id

    def start_worker(self, parallel=1):
        with (self.folder / "worker.log").open("ab") as log:
            command = [sys.executable, "-m", "tests.faults.worker_process", str(parallel)]
            worker = subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=log, stderr=log)
        self.workers.append(worker)
        return worker

    def hold(self, project_id, place):
        (self.folder / f"hold-{project_id}-{place}").touch()

    def let_go(self, project_id, place):
        (self.folder / f"hold-{project_id}-{place}").unlink()
        (self.folder / f"at-{project_id}-{place}").unlink(missing_ok=True)

    def wait_at(self, project_id, place):
        """The process id of the round that has come to a place where it is held."""
        note = self.folder / f"at-{project_id}-{place}"
        self.wait(note.exists, f"round of project {project_id} comes to {place}")
        return int(note.read_text())

    def wait_done(self, round_id, state="done", timeout_s=WAIT_S):
        """Wait for the end of a round; its record."""
        self.wait(lambda: self.store.rounds.get(round_id).finished_at is not None, "the round ends", timeout_s)
        record = self.store.rounds.get(round_id)
        assert record.state == state, f"{record.state}: {record.error}\n{self.log()}"
        return record

    def wait(self, condition, what, timeout_s=WAIT_S):
        try:
            wait_for(condition, what, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def calls(self, project_id):
        log = self.folder / "calls.log"
        rows = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return [row[1] for row in rows if row[0] == str(project_id)]

    def log(self):
        log = self.folder / "worker.log"
        return "\n".join(log.read_text().splitlines()[-40:]) if log.exists() else ""

    def stop(self):
        for worker in self.workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in self.workers:
            try:
                worker.wait(30)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self.label_studio.stop()
        self.store.close()


def kill(pid):
    """kill -9, and wait until it is gone; the seconds on the clock at that moment."""
    process = psutil.Process(pid)
    process.send_signal(signal.SIGKILL)
    moment = time.monotonic()
    psutil.wait_procs([process], timeout=10)
    return moment


@pytest.fixture
def recovered(record_property):
    """``recovered(seconds)``: keep the time a recovery took in the test report, and show it with ``-s``."""

    def keep(seconds):
        record_property("seconds_to_recover", round(seconds, 1))
        sys.stderr.write(f"\nrecovered in {seconds:.1f} s\n")

    return keep


@pytest.fixture
def make_rig(tmp_path):
    rigs = []

    def make(**environment):
        rigs.append(Rig(tmp_path / f"rig{len(rigs)}", environment))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.stop()


@pytest.fixture
def rig(make_rig):
    return make_rig()
