"""Jobs reach their handler, from another producer too, and quick work does not wait for a round."""

import threading
import time

import pytest

from ppal_backend.jobs.queue import JobQueue


def wait_for(condition, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def running(tmp_path):
    synced, rounds, hold = [], [], threading.Event()

    def on_round(project_id):
        hold.wait(10)
        rounds.append(project_id)

    queue = JobQueue(tmp_path / "jobs.db", synced.append, on_round)
    consumers = queue.consumers()
    for consumer in consumers:
        consumer.start()
    yield tmp_path, synced, rounds, hold
    hold.set()
    for consumer in consumers:
        consumer.stop(graceful=True)


def test_quick_jobs_overtake_a_long_round(running):
    folder, synced, rounds, hold = running
    producer = JobQueue(folder / "jobs.db")
    producer.run_round(7)
    for project_id in (1, 2, 3):
        producer.sync(project_id)
    wait_for(lambda: synced == [1, 2, 3])
    assert rounds == []
    hold.set()
    wait_for(lambda: rounds == [7])


def test_jobs_wait_on_disk_for_a_worker(tmp_path):
    JobQueue(tmp_path / "jobs.db").sync(5)
    got = []
    queue = JobQueue(tmp_path / "jobs.db", got.append, got.append)
    assert queue.pending() == 1
    consumer = queue.consumers()[0]
    consumer.start()
    try:
        wait_for(lambda: got == [5])
    finally:
        consumer.stop(graceful=True)
