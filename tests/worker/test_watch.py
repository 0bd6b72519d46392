"""The watch over a round: it stops what must stop, leaves what it lost, and stays calm when the database is away."""

import threading

import pytest

from ppal_backend.errors import LeaseLost, OutOfSpace, StoreUnavailable
from ppal_backend.store import LEASE_S, Database, Lease, SeenAnnotation, Store
from ppal_backend.store.tables import now
from ppal_backend.structures.round import Progress
from ppal_backend.worker import watch as module
from ppal_backend.worker.watch import Watch
from tests.servers import wait_for


class Watched:
    def __init__(self, path):
        self.store = Store(Database(f"sqlite:///{path}/ppal.db"))
        self.store.projects.connect(1, "1.1", "<View/>", "http://ls", {})
        self.store.rounds.request(1, "train", "x")
        self.lease = Lease.mine()
        self.record = self.store.rounds.claim(1, self.lease)
        self.left, self.gone = [], threading.Event()
        self.watch = Watch(self.store, self.record, self.lease, leave=self.leave)

    def leave(self, code):
        self.left.append(code)
        self.gone.set()


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    world = Watched(tmp_path)
    yield world
    world.watch.stop()


@pytest.mark.parametrize("ask", ["cancel", "pause"])
def test_who_asks_to_stop_is_heard(world, ask):
    world.watch.start()
    assert not world.watch.should_stop()
    world.store.rounds.ask_cancel(world.record.id) if ask == "cancel" else world.store.projects.set_paused(1, True)
    wait_for(world.watch.should_stop)
    assert world.left == []


def test_a_lost_round_is_left_at_once(world):
    world.watch.start()
    with world.store.database.transaction() as session:
        from ppal_backend.store.tables import RoundRow

        session.get(RoundRow, world.record.id).lease_owner = "another-host:1:1.00"
    assert world.gone.wait(10) and world.left == [1]


def test_a_round_that_has_just_ended_is_no_reason_to_end_the_process(world):
    world.watch.start()
    world.store.rounds.finish(world.record.id, {}, world.lease)
    wait_for(world.watch.should_stop)
    assert world.left == []


def test_a_round_whose_worker_is_gone_is_let_go_and_left(world, monkeypatch):
    world.watch.start()
    monkeypatch.setattr(module.os, "getppid", lambda: 1)
    assert world.gone.wait(10)
    assert not world.store.rounds.holds(world.record.id, world.lease)
    assert world.store.rounds.claimable_projects() == [1], "another worker need not wait for the lease to run out"
    assert world.store.rounds.claim(1, world.lease).crashes == 0, "the round did nothing wrong"


def test_a_database_that_is_away_for_a_moment_interrupts_nothing(world, monkeypatch):
    asked = []

    monkeypatch.setattr(module, "SILENCE_S", 0.0)  # under SQLite no other machine can take the round

    def renew(*arguments):
        asked.append(arguments)
        raise StoreUnavailable("it is away")

    monkeypatch.setattr(world.store.rounds, "renew", renew)
    monkeypatch.setattr(world.store.rounds, "report", renew)
    world.watch.start()
    world.watch.progress(Progress("train", 1, 2))
    wait_for(lambda: len(asked) > 5)
    assert not world.watch.should_stop() and world.left == []


def test_a_database_out_of_reach_for_longer_than_the_lease_means_the_round_may_be_lost(world, monkeypatch):
    def renew(*arguments):
        raise StoreUnavailable("it is away")

    monkeypatch.setattr(world.store.rounds, "renew", renew)
    monkeypatch.setattr(world.store.database, "is_sqlite", False)
    monkeypatch.setattr(module, "SILENCE_S", 0.05)
    world.watch.start()
    assert world.gone.wait(10)


def test_what_hinders_a_step_ends_the_attempt_after_it_was_told(world):
    def no_room(step):
        raise OutOfSpace(f"no room for {step}")

    watch = Watch(world.store, world.record, world.lease, no_room)
    with pytest.raises(OutOfSpace, match="no room for train"):
        watch.step_started("train")
    assert world.store.rounds.get(world.record.id).step == "train"


def take_away(world):
    """Another host's process holds the round now."""
    with world.store.database.transaction() as session:
        from ppal_backend.store.tables import RoundRow

        session.get(RoundRow, world.record.id).lease_owner = str(Lease("elsewhere", 1, 1.0))


def test_a_lost_round_is_neither_reported_nor_exported_nor_published(world):
    world.store.ledger.see(1, [SeenAnnotation(1, 10)])
    world.watch.step_started("export")
    take_away(world)
    for effect in (
        lambda: world.watch.fence(),
        lambda: world.watch.step_started("train"),
        lambda: world.watch.exported([]),
    ):
        with pytest.raises(LeaseLost, match="round 1 of project 1 is held by another process"):
            effect()
    assert world.store.ledger.new_count(1) == 1
    assert world.store.rounds.get(world.record.id).step == "export"


def test_a_fence_keeps_others_away_for_a_while(world):
    with world.store.database.transaction() as session:
        from ppal_backend.store.tables import RoundRow

        session.get(RoundRow, world.record.id).lease_until = now()
    world.watch.fence()
    with world.store.database.reading() as session:
        assert (session.get(RoundRow, world.record.id).lease_until - now()).total_seconds() > LEASE_S - 10
