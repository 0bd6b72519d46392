"""Two workers look after one project at the same moment: every event takes effect once, every decision is made once."""

import threading

import pytest

from ppal_backend.settings import Settings
from ppal_backend.store import Database, Lease, SeenAnnotation, Store
from ppal_backend.worker.sync import Synchroniser
from tests.store.conftest import database_url, postgres  # noqa: F401

BUDGET = 3
TURNS = 15


class Worker:
    """A worker of a host of its own; a round that it enqueues is claimed and finished at once."""

    annotated = range(0)

    def __init__(self, url, number, tmp_path):
        self.store, self.lease = Store(Database(url)), Lease(f"host{number}", number, 1.0)
        settings = Settings(START_TRAINING_EACH_N_UPDATES=BUDGET, MODEL_DIR=tmp_path, poll_interval_s=1000)
        self.sync = Synchroniser(self.store, settings, None, self.run)

    def run(self, project_id):
        record = self.store.rounds.claim(project_id, self.lease)
        if record is not None:
            self.store.ledger.used_by(project_id, record.number, list(self.annotated))
            self.store.rounds.finish(record.id, {}, self.lease)


@pytest.fixture
def workers(database_url, tmp_path):  # noqa: F811
    if database_url == "sqlite://":
        pytest.skip("a database in memory has one process, and that one worker")
    both = [Worker(database_url, number, tmp_path) for number in (1, 2)]
    both[0].store.projects.connect(1, "1.1", "<View/>", "http://ls", {})
    both[0].sync(1)
    yield both
    for worker in both:
        worker.store.close()


def at_once(workers):
    """Both handle the project; they start together."""
    barrier, failed = threading.Barrier(2), []

    def run(worker):
        barrier.wait(30)
        try:
            worker.sync(1)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=run, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []


def trainings(workers):
    rounds = workers[0].store.rounds.of_project(1)
    assert {r.state for r in rounds} == {"done"}
    return sum(r.kind == "train" for r in rounds)


def test_a_training_started_by_hand_is_one_round(workers):
    for turn in range(TURNS):
        workers[0].store.events.add(1, "START_TRAINING", {})
        at_once(workers)
        assert trainings(workers) == turn + 1
    assert workers[0].store.events.counts() == {"done": TURNS}


def test_a_budget_that_is_full_is_one_round(workers):
    for turn in range(TURNS):
        ids = range(turn * BUDGET + 1, (turn + 1) * BUDGET + 1)
        for worker in workers:
            worker.annotated = ids
        workers[0].store.ledger.see(1, [SeenAnnotation(i, i) for i in ids])
        at_once(workers)
        assert trainings(workers) == turn + 1


def test_an_event_that_was_handled_since_it_was_read_does_nothing_more(workers, monkeypatch):
    first, second = workers
    first.store.events.add(1, "START_TRAINING", {})
    begin = second.store.events.begin

    def late(event_ids):
        first.sync(1)
        begin(event_ids)

    monkeypatch.setattr(second.store.events, "begin", late)
    second.sync(1)
    assert trainings(workers) == 1


def test_an_old_label_config_does_not_come_back(workers, monkeypatch):
    first, second = workers
    for config in ("<View>old</View>", "<View>new</View>"):
        first.store.events.add(1, "PROJECT_UPDATED", {"label_config": config})
    pending = second.store.events.pending

    def read_before_the_other(project_id):
        events = pending(project_id)
        first.sync(1)
        return events

    monkeypatch.setattr(second.store.events, "pending", read_before_the_other)
    second.sync(1)
    assert first.store.projects.get(1).label_config == "<View>new</View>"
