"""Processes that live and end together, also when their parent is killed."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import requests

from ppal_backend.launcher import Group
from tests.servers import free_port, wait_for

SLEEP = ["sleep", "1000"]
START = """
import sys, threading
from ppal_backend.launcher import Group
Group({"one": %r, "two": %r}).run(threading.Event())
""" % (SLEEP, SLEEP)  # noqa: UP031


def living(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_process_that_ends_by_itself_is_started_again_and_all_end_together():
    stop, group = threading.Event(), Group({"one": SLEEP, "two": SLEEP})
    thread = threading.Thread(target=group.run, args=(stop,))
    thread.start()
    wait_for(lambda: len(group.processes) == 2, "both run")
    first, other = group.processes["one"], group.processes["two"]
    first.kill()
    wait_for(lambda: group.processes["one"] is not first, "it is started again")
    assert other.poll() is None and group.processes["one"].poll() is None
    stop.set()
    thread.join(30)
    assert {p.returncode for p in group.processes.values()} == {-signal.SIGTERM}


def test_they_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", START])
    wait_for(lambda: len(psutil.Process(parent.pid).children()) == 2, "both run")
    children = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    wait_for(lambda: not living(children), "nothing is left", 10)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["serve", "worker", "up"])
def test_a_first_process_hears_sigterm_from_its_start_on(tmp_path, command):
    """As in a container without an init: the kernel drops a signal that a first process has no handler for."""
    environment = {**os.environ, "MODEL_DIR": str(tmp_path), "PPAL_HOST": "127.0.0.1", "PPAL_PORT": str(free_port())}
    for after_s in (0.3, 1.0, 2.0, 4.0, 8.0):
        inside = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-m", "ppal_backend", command]
        outer = subprocess.Popen(inside, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            time.sleep(after_s)
            (first,) = psutil.Process(outer.pid).children()
            first.send_signal(signal.SIGTERM)
            code = outer.wait(30)
        finally:
            outer.kill()
            said = outer.communicate()[0]
        assert code in (0, 143), f"{command} after {after_s} s: {code} {said[-2000:]}"
        assert "Traceback" not in said


@pytest.mark.slow
def test_nothing_is_left_of_ppal_up_that_is_killed(tmp_path, monkeypatch):
    port = free_port()
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    monkeypatch.setenv("PPAL_HOST", "127.0.0.1")
    monkeypatch.setenv("PPAL_PORT", str(port))
    with (tmp_path / "log").open("wb") as log:
        up = subprocess.Popen([sys.executable, "-m", "ppal_backend.cli", "up"], stdout=log, stderr=log)
    try:
        wait_for(lambda: requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok, "the service answers", 240)
        wait_for(lambda: "worker started" in (tmp_path / "log").read_text(), "the worker works", 240)
        family = psutil.Process(up.pid).children(recursive=True)
        assert len(family) >= 3, "gunicorn, its worker, and ours"
    finally:
        up.kill()
        up.wait()
    wait_for(lambda: not living(family), f"nothing is left of {family}", 60)
    assert "worker stopped" in (tmp_path / "log").read_text(), "it left in good order"
