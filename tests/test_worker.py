"""What becomes of a round in its process: done, failed, waiting, cancelled, resumed."""

import time

import pytest

from ppal_backend.errors import DetectorError, LabelStudioAuthError, LabelStudioUnavailable
from ppal_backend.rounds.ports import Ports
from ppal_backend.settings import load_settings
from ppal_backend.store import SeenAnnotation, open_store
from ppal_backend.worker import run_next_round
from tests.rounds.fakes import FakeWorld, Killed


@pytest.fixture
def settings(tmp_path):
    return load_settings(MODEL_DIR=tmp_path, START_TRAINING_EACH_N_UPDATES=5)


@pytest.fixture
def store(settings):
    store = open_store(settings)
    store.projects.connect(1, "1.1", "<View/>", "http://ls", {"delta": 2.0})
    yield store
    store.close()


class World(FakeWorld):
    """The fake ports, with an error to raise in a step, and the real observer."""

    error = None
    spec = None

    def ports(self, settings, store, project, spec, observer):
        self.spec = spec
        return Ports(self, self, self, observer)

    def train(self, *arguments):
        if self.error is not None:
            raise self.error
        return super().train(*arguments)


def only(store):
    (record,) = store.rounds.of_project(1)
    return record


def test_a_finished_round_records_its_version_and_uses_up_the_annotations(settings, store):
    store.rounds.request(1, "train", "x")
    world = World()
    assert run_next_round(settings, 1, world.ports)
    record, version = only(store), store.versions.active(1)
    assert (record.state, record.metrics["map"], record.metrics["version"]) == ("done", 0.5, "ppal-r1-x")
    assert (version.version, version.labels, version.difficulty) == ("ppal-r1-x", ("cat", "dog"), (0.2, 0.9))
    assert version.checkpoint == "projects/1/rounds/1/train/model.pth"
    assert store.ledger.new_count(1) == 0
    assert (world.spec.budget, world.spec.delta, world.spec.kind) == (5, 2.0, "train")
    assert not run_next_round(settings, 1, world.ports), "there was nothing left to claim"


def test_a_round_that_cannot_succeed_fails_with_its_reason(settings, store):
    store.rounds.request(1, "train", "x")
    world = World()
    world.error = DetectorError("expected weights, got none; put them there")
    run_next_round(settings, 1, world.ports)
    assert (only(store).state, only(store).error) == ("failed", "expected weights, got none; put them there")


def test_a_bug_is_tried_again_told_and_given_up(settings, store):
    store.rounds.request(1, "train", "x")
    world = World()
    world.error = ZeroDivisionError("division by zero")
    for _ in range(4):
        assert only(store).state in ("pending", "running")
        run_next_round(settings, 1, world.ports)
        if only(store).state == "running":
            store.rounds.release(only(store).id, error=only(store).error)
    assert only(store).state == "failed"
    assert "unexpected ZeroDivisionError in step 'train': division by zero" in only(store).error


@pytest.mark.parametrize("error", [LabelStudioUnavailable("it is down"), LabelStudioAuthError("token refused")])
def test_a_round_waits_while_label_studio_is_away_and_then_goes_on(settings, store, error):
    store.rounds.request(1, "train", "x")
    world = World()
    world.error = error
    run_next_round(settings, 1, world.ports)
    assert (only(store).state, only(store).error) == ("running", str(error))
    assert not run_next_round(settings, 1, world.ports), "it has to wait a little"
    store.rounds.release(only(store).id)
    world.error = None
    run_next_round(settings, 1, world.ports)
    assert only(store).state == "done" and world.calls.count("export") == 1


def test_a_killed_process_leaves_a_round_that_is_resumed(settings, store):
    store.rounds.request(1, "train", "x")
    world = World()
    world.kill_in = "infer"
    with pytest.raises(Killed):
        run_next_round(settings, 1, world.ports)
    assert only(store).state == "running"
    store.rounds.release(only(store).id)  # what the lease does once the process is gone
    run_next_round(settings, 1, world.ports)
    assert only(store).state == "done" and world.calls.count("train") == 1


def test_a_resumed_round_keeps_the_options_it_started_with(settings, store):
    store.rounds.request(1, "train", "x")
    world = World()
    world.kill_in = "train"
    with pytest.raises(Killed):
        run_next_round(settings, 1, world.ports)
    store.rounds.release(only(store).id)
    store.projects.connect(1, "1.1", "<View/>", "http://ls", {"budget": 9})
    run_next_round(settings, 1, world.ports)
    assert (world.spec.budget, world.spec.delta) == (5, 2.0)


def test_a_cancelled_round_stops_and_stays_cancelled(settings, store, monkeypatch):
    monkeypatch.setattr("ppal_backend.worker.HEARTBEAT_S", 0.01)

    class Cancelled(World):
        def export(self, folder):
            store.rounds.ask_cancel(only(store).id)
            time.sleep(0.3)
            return super().export(folder)

    store.rounds.request(1, "train", "x")
    run_next_round(settings, 1, Cancelled().ports)
    assert only(store).state == "cancelled"


def test_a_rank_round_uses_up_no_annotations(settings, store):
    store.ledger.see(1, [SeenAnnotation(i, i) for i in (1, 2, 3)])
    store.rounds.request(1, "rank", "new tasks")
    run_next_round(settings, 1, World().ports)
    assert store.ledger.new_count(1) == 3


def test_ranking_new_tasks_uses_the_newest_model(settings, store):
    store.rounds.request(1, "train", "x")
    run_next_round(settings, 1, World().ports)
    store.rounds.request(1, "rank", "new tasks")
    world = World()
    run_next_round(settings, 1, world.ports)
    assert world.spec.model.checkpoint.endswith("rounds/1/train/model.pth")
    assert world.spec.model.labels == ("cat", "dog") and "train" not in world.calls
