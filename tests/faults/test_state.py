"""The state database locked, the clock jumping, an event that nothing can handle."""

import sqlite3
import threading
import time
from datetime import timedelta

import pytest

from ppal_backend.errors import StoreUnavailable
from ppal_backend.service.app import create_app
from ppal_backend.store import Database, Lease, Store, database_file
from ppal_backend.store import rounds as rounds_module
from ppal_backend.worker.sync import EVENT_TRIES, Synchroniser
from tests.service.conftest import FakeImages, FakePredictor, RecordingJobs, annotation_payload

pytestmark = pytest.mark.faults

ME = Lease.mine()
STRANGER = Lease("another-host", 1, 1.0)


class Lock:
    """The write lock of the database, held by somebody else."""

    def __init__(self, place):
        self.connection = sqlite3.connect(
            database_file(place.settings.state_url), isolation_level=None, check_same_thread=False
        )
        self.connection.execute("BEGIN IMMEDIATE")

    def release(self):
        self.connection.rollback()
        self.connection.close()


def test_sqlite_locked_for_a_moment_in_the_middle_of_a_round(place, recovered):
    locks = []

    def lock_for_a_second(*arguments):
        locks.append(Lock(place))
        threading.Timer(1.0, locks[0].release).start()
        return {"map": 0.5, "map50": 0.8, "per_class": {}}

    place.world.evaluate = lock_for_a_second
    started = time.monotonic()
    record = place.round()
    recovered(time.monotonic() - started)
    assert record.state == "done" and record.attempts == 1 and locks


def test_sqlite_locked_for_longer_than_anybody_waits(place, monkeypatch, recovered):
    monkeypatch.setattr("ppal_backend.store.database.BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(Database.__init__, "__defaults__", (0.05, True))
    record = place.store.rounds.request(1, "train", "x")
    locks = []
    publish = place.ports

    def ports(settings, store, project, spec, observer):
        made = publish(settings, store, project, spec, observer)
        made.engine.train = lambda *arguments: (
            locks.append(Lock(place)) or type(place.world).train(place.world, *arguments)
        )
        return made

    place.ports = ports
    with pytest.raises(StoreUnavailable, match="database is locked"):
        place.run()
    assert locks, "the training was over when the lock was met"
    locks[0].release()
    place.ports = publish
    del place.world.train
    started = time.monotonic()
    place.store.rounds.release(record.id)  # as when its process has ended
    place.run()
    recovered(time.monotonic() - started)
    assert place.store.rounds.get(record.id).state == "done" and place.world.calls.count("export") == 1


@pytest.fixture
def clock(monkeypatch):
    """``clock(hours)``: set the clock."""
    real = rounds_module.now

    def jump(hours):
        monkeypatch.setattr(rounds_module, "now", lambda: real() + timedelta(hours=hours))
        monkeypatch.setattr("ppal_backend.store.database.now", lambda: real() + timedelta(hours=hours))

    return jump


@pytest.mark.parametrize("hours", [2, -2])
def test_the_clock_jumping_takes_no_round_from_a_live_process(place, clock, hours):
    record = place.store.rounds.request(1, "train", "x")
    place.store.rounds.claim(1, ME)
    clock(hours)
    assert place.store.rounds.claimable_projects() == [] and place.store.rounds.claim(1, STRANGER) is None
    assert place.store.rounds.renew(record.id, ME)


def test_the_clock_set_back_makes_nobody_wait_for_hours(place, clock):
    place.store.rounds.request(1, "train", "x")
    record = place.store.rounds.claim(1, STRANGER)
    clock(-2)
    assert place.store.rounds.claimable_projects() == [1], "a lease of another host that seems to last two hours"
    clock(0)
    place.store.rounds.claim(1, ME)
    place.store.rounds.release(record.id, retry_after_s=600)
    assert place.store.rounds.claimable_projects() == []
    clock(-2)
    assert place.store.rounds.claimable_projects() == [1]
    clock(0)
    place.store.rounds.cancel(record.id, "x")
    place.store.rounds.request(1, "train", "asked for before the clock was set back")
    clock(-2)
    assert place.store.rounds.claim(1, ME).number == 2


def test_a_process_is_known_again_after_the_clock_was_set(monkeypatch):
    import psutil

    monkeypatch.setattr(psutil.Process, "create_time", lambda self: time.time() + 7200)
    assert not ME.is_dead_here() and Lease.mine() == ME


def test_an_event_that_nothing_can_handle_is_parked_with_its_reason(place):
    broken = place.store.events.add(1, "ANNOTATION_CREATED", {"annotations": [{"id": 666, "task_id": 1}]})
    for i in range(5):
        place.store.events.add(1, "ANNOTATION_CREATED", {"annotations": [{"id": i + 1, "task_id": i + 1}]})
    see = place.store.ledger.see

    def unforeseen(project_id, annotations):
        if any(a.annotation_id == 666 for a in annotations):
            raise RuntimeError("nobody thought of this")
        see(project_id, annotations)

    place.store.ledger.see = unforeseen
    synchronise = Synchroniser(place.store, place.settings, None, lambda project_id: None)
    for _ in range(EVENT_TRIES):
        with pytest.raises(RuntimeError):
            synchronise(1)
    synchronise(1)
    assert place.store.events.counts() == {"parked": 1, "done": 5}
    assert [r.kind for r in place.store.rounds.of_project(1)] == ["train"], "the others were not held up"
    with place.store.database.reading() as session:
        from ppal_backend.store.tables import EventRow

        assert session.get(EventRow, broken).reason == "its handling was begun 5 times and never ended"


def test_a_webhook_while_the_database_is_locked_is_refused_for_now(place):
    impatient = Store(Database(place.settings.state_url, busy_timeout_s=0.05))
    app = create_app(place.settings, impatient, RecordingJobs(), FakePredictor(), images=FakeImages(None))
    lock = Lock(place)
    answer = app.test_client().post("/webhook", json=annotation_payload(1, 1001, project=1))
    assert answer.status_code == 503 and "database is locked" in answer.json["error"]
    lock.release()
    assert app.test_client().post("/webhook", json=annotation_payload(1, 1001, project=1)).status_code == 201
    impatient.close()


def test_a_store_that_is_locked_says_so(place):
    lock = Lock(place)
    impatient = Store(Database(place.settings.state_url, busy_timeout_s=0.05))
    with pytest.raises(StoreUnavailable, match="database is locked"):
        impatient.events.add(1, "ANNOTATION_CREATED", {})
    assert impatient.projects.get(1).id == 1, "readers do not wait"
    lock.release()
    assert impatient.events.add(1, "ANNOTATION_CREATED", {}) == 1
    impatient.close()
