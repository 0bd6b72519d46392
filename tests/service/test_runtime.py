"""Notices reach the queue soon, at least once after each event, and never hold a request up."""

import threading
import time

from ppal_backend.service.runtime import Notifier


class SlowJobs:
    """A queue on a slow disk: each job waits until ``gate`` is open."""

    def __init__(self):
        self.gate = threading.Event()
        self.seen = []

    def sync(self, project_id):
        assert self.gate.wait(5)
        self.seen.append(project_id)
        if project_id == 13:
            raise OSError("disk full")


def test_notify_does_not_wait_and_notices_that_wait_become_one():
    jobs = SlowJobs()
    notifier = Notifier(jobs)
    start = time.perf_counter()
    notifier.notify(1)
    while notifier._waiting:  # until the thread is busy with it
        time.sleep(0.001)
    for _ in range(100):
        notifier.notify(1)
        notifier.notify(2)
    assert time.perf_counter() - start < 0.5
    assert not notifier.flush(timeout_s=0.01)
    jobs.gate.set()
    assert notifier.flush()
    assert jobs.seen == [1, 1, 2]  # project 1 once more: its first job began before the later events


def test_many_notices_are_few_jobs_and_the_first_is_passed_on_at_once(monkeypatch):
    monkeypatch.setattr("ppal_backend.service.runtime.PAUSE_S", 30.0)
    jobs = SlowJobs()
    jobs.gate.set()
    notifier = Notifier(jobs)
    notifier.notify(1)
    assert notifier.flush(5.0) and jobs.seen == [1], "nobody waits for the first"
    for _ in range(100):
        notifier.notify(1)
        notifier.notify(2)
    assert not notifier.flush(timeout_s=0.05) and jobs.seen == [1], "the others wait for each other"
    notifier.close()
    assert jobs.seen == [1, 1, 2], "and are passed on before the end"


def test_a_failure_does_not_end_it(caplog):
    jobs = SlowJobs()
    jobs.gate.set()
    notifier = Notifier(jobs)
    for project_id in (13, 1):
        notifier.notify(project_id)
    assert notifier.flush()
    assert jobs.seen == [13, 1]
    assert "disk full" in caplog.text


def test_close_passes_on_what_waits_and_ends_the_thread():
    jobs = SlowJobs()
    notifier = Notifier(jobs)
    notifier.notify(1)
    jobs.gate.set()
    notifier.close()
    assert jobs.seen == [1]
    notifier._thread.join(1)
    assert not notifier._thread.is_alive()


def test_closing_one_that_was_never_used():
    Notifier(SlowJobs()).close()
