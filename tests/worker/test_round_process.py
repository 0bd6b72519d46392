"""What becomes of a round in its process: done, failed, waiting, cancelled, resumed."""

import json
import logging
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from ppal_backend.errors import (
    DetectorError,
    LabelStudioAuthError,
    LabelStudioUnavailable,
    QueueUnavailable,
    StoreUnavailable,
)
from ppal_backend.logs import configure_logging
from ppal_backend.store import Lease, RoundStore, SeenAnnotation, open_store
from ppal_backend.worker.round_process import earlier_models, run_next_round
from ppal_backend.worker.worker import _tick
from tests.rounds.fakes import FakeWorld, Killed


def only(store):
    (record,) = store.rounds.of_project(1)
    return record


def test_a_finished_round_records_its_version_and_uses_up_the_annotations(settings, store):
    store.rounds.request(1, "train", "x")
    world = FakeWorld()
    assert run_next_round(settings, 1, world.ports)
    record, version = only(store), store.versions.active(1)
    assert (record.state, record.metrics["map"], record.metrics["version"]) == ("done", 0.5, "ppal-r1-x")
    assert (version.version, version.labels, version.difficulty) == ("ppal-r1-x", ("cat", "dog"), (0.2, 0.9))
    assert version.checkpoint == "projects/1/rounds/1/train/model.pth"
    assert store.ledger.new_count(1) == 0
    assert (world.spec.budget, world.spec.delta, world.spec.kind) == (5, 2.0, "train")
    assert not run_next_round(settings, 1, world.ports), "there was nothing left to claim"


def test_what_a_round_notices_stays_a_problem_of_its_project_until_a_round_notices_otherwise(settings, store):
    world, told = FakeWorld(), {"images": "none of the 30 images can be used: they are gone"}
    prepare = world.prepare
    world.prepare = lambda *arguments: replace(prepare(*arguments), problems=told)
    for text in ("none of the 30 images can be used: they are gone", ""):
        told["images"] = text
        store.rounds.request(1, "rank", "x")
        run_next_round(settings, 1, world.ports)
        assert store.projects.get(1).problems == ({"images": text} if text else {})


def test_annotated_images_that_are_missing_are_the_reason_when_there_is_nothing_to_train_on(settings, store):
    """It said "annotate more tasks", and more did not help."""
    store.rounds.request(1, "train", "x")
    world = FakeWorld(labelled=0)
    prepare = world.prepare
    report = {"conversion": {"missing_images": 4}, "image_problems": ["task 7: status 404; check the storage"]}
    world.prepare = lambda *arguments: replace(prepare(*arguments), report=report)
    run_next_round(settings, 1, world.ports)
    assert only(store).state == "failed"
    wanted = "got 0 images with 0 boxes: the images of 4 annotated tasks cannot be used (task 7: status 404"
    assert wanted in only(store).error and "annotate more" not in only(store).error


def test_a_process_that_lost_its_round_brings_no_version_into_force(settings, store, monkeypatch):
    """It activated its version first and found out that the round was not its own afterwards."""
    store.rounds.request(1, "train", "x")
    monkeypatch.setattr(RoundStore, "finish", lambda self, *arguments: False)
    run_next_round(settings, 1, FakeWorld().ports)
    assert store.versions.active(1) is None and only(store).state == "running"


def test_a_round_that_cannot_succeed_fails_with_its_reason(settings, store):
    store.rounds.request(1, "train", "x")
    world = FakeWorld()
    world.error = DetectorError("expected weights, got none; put them there")
    run_next_round(settings, 1, world.ports)
    assert (only(store).state, only(store).error) == ("failed", "expected weights, got none; put them there")


def test_a_bug_is_tried_again_told_and_given_up(settings, store):
    store.rounds.request(1, "train", "x")
    world = FakeWorld()
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
    world = FakeWorld()
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
    world = FakeWorld()
    world.kill_in = "infer"
    with pytest.raises(Killed):
        run_next_round(settings, 1, world.ports)
    assert only(store).state == "running"
    store.rounds.release(only(store).id)  # what the lease does once the process is gone
    run_next_round(settings, 1, world.ports)
    assert only(store).state == "done" and world.calls.count("train") == 1


@pytest.mark.parametrize("killed", [False, True])
def test_a_round_of_a_new_database_takes_nothing_over_from_an_old_one_of_its_number(settings, store, tmp_path, killed):
    """It was done at once, with the results and the options of the old one. ``killed``: between its claim and its
    folder, so that the attempt that opens it is not its first."""
    store.rounds.request(1, "train", "x")
    run_next_round(settings, 1, FakeWorld().ports)
    settings = settings.model_copy(update={"database_url": f"sqlite:///{tmp_path}/other.db"})
    with closing(open_store(settings)) as new:
        new.projects.connect(1, "1.1", "<View/>", "http://ls", {"delta": 3.0})
        new.ledger.see(1, [SeenAnnotation(i, i) for i in range(1, 7)])
        new.rounds.request(1, "train", "x")
        if killed:
            record = new.rounds.claim(1, Lease.mine())
            new.rounds.release(record.id)
        world = FakeWorld()
        run_next_round(settings, 1, world.ports)
        assert only(new).state == "done" and world.spec.delta == 3.0 and new.ledger.new_count(1) == 0
        done = dict.fromkeys(call for call in world.calls if " " not in call)
        assert list(done) == ["export", "prepare", "train", "evaluate", "infer", "publish"]
    (replaced,) = (tmp_path / "projects/1/rounds").glob("1.replaced-*")
    assert (replaced / "train" / "model.pth").is_file() and (replaced / "steps" / "publish.json").is_file()


def test_an_unfinished_round_of_an_earlier_release_goes_on(settings, store, tmp_path):
    """Its folder bears no identity."""
    store.rounds.request(1, "train", "x")
    world = FakeWorld()
    world.kill_in = "infer"
    with pytest.raises(Killed):
        run_next_round(settings, 1, world.ports)
    (tmp_path / "projects/1/rounds/1/round.json").unlink()
    store.rounds.release(only(store).id)
    run_next_round(settings, 1, world.ports)
    assert only(store).state == "done" and world.calls.count("train") == 1
    assert not list((tmp_path / "projects/1/rounds").glob("*.replaced-*"))


def test_a_resumed_round_keeps_the_options_it_started_with(settings, store):
    store.rounds.request(1, "train", "x")
    world = FakeWorld()
    world.kill_in = "train"
    with pytest.raises(Killed):
        run_next_round(settings, 1, world.ports)
    store.rounds.release(only(store).id)
    store.projects.connect(1, "1.1", "<View/>", "http://ls", {"budget": 9})
    run_next_round(settings, 1, world.ports)
    assert (world.spec.budget, world.spec.delta) == (5, 2.0)


def test_a_cancelled_round_stops_and_stays_cancelled(settings, store, monkeypatch):
    monkeypatch.setattr("ppal_backend.worker.watch.HEARTBEAT_S", 0.01)

    class Cancelled(FakeWorld):
        def export(self, folder):
            store.rounds.ask_cancel(only(store).id)
            time.sleep(0.3)
            return super().export(folder)

    store.rounds.request(1, "train", "x")
    run_next_round(settings, 1, Cancelled().ports)
    assert only(store).state == "cancelled"


def test_a_paused_round_leaves_what_it_has_and_goes_on_when_resumed(settings, store, monkeypatch):
    monkeypatch.setattr("ppal_backend.worker.watch.HEARTBEAT_S", 0.01)
    from ppal_backend.errors import RoundCancelled

    class Pausing(FakeWorld):
        """An engine that leaves as the real one does: when it is told to stop, with a checkpoint on disk."""

        def train(self, spec, labels, files, folder, on_progress, should_stop):
            if store.projects.get(1).paused or (folder / "checkpoint").exists():
                return super().train(spec, labels, files, folder, on_progress, should_stop)
            store.projects.set_paused(1, True)
            end = time.monotonic() + 10
            while not should_stop():
                assert time.monotonic() < end, "nobody told the training to stop"
                time.sleep(0.01)
            folder.mkdir(exist_ok=True)
            (folder / "checkpoint").touch()
            raise RoundCancelled("a checkpoint is on disk")

    store.rounds.request(1, "train", "x")
    world = Pausing()
    run_next_round(settings, 1, world.ports)
    assert only(store).state == "running" and store.rounds.claimable_projects() == []
    assert not run_next_round(settings, 1, world.ports), "it is paused"
    store.projects.set_paused(1, False)
    assert store.rounds.claimable_projects() == [1], "it goes on at once"
    run_next_round(settings, 1, world.ports)
    assert only(store).state == "done" and world.calls.count("export") == 1 and world.calls.count("train") == 1


def test_a_database_that_was_away_for_a_moment_does_not_fail_the_round(settings, store, monkeypatch):
    store.rounds.request(1, "train", "x")
    finish = RoundStore.finish

    def away(self, *arguments):
        monkeypatch.setattr(RoundStore, "finish", finish)
        raise StoreUnavailable("it is locked")

    monkeypatch.setattr(RoundStore, "finish", away)
    world = FakeWorld()
    with pytest.raises(StoreUnavailable):
        run_next_round(settings, 1, world.ports)
    assert only(store).state == "running", "it is back by now, and the round is as good as done"
    store.rounds.release(only(store).id)
    run_next_round(settings, 1, world.ports)
    assert only(store).state == "done" and world.calls.count("publish") == 1


def test_a_warm_start_from_a_damaged_model_starts_from_the_zoo(settings, store):
    settings = settings.model_copy(update={"init_weights": "last"})
    store.rounds.request(1, "train", "x")
    run_next_round(settings, 1, FakeWorld().ports)
    store.rounds.request(1, "train", "x")
    world = FakeWorld()
    run_next_round(settings, 1, world.ports)
    assert world.spec.model.checkpoint.endswith("rounds/1/train/model.pth")
    checkpoint = settings.project_folder(1) / "rounds" / "2" / "train" / "model.pth"
    checkpoint.write_bytes(b"damaged")
    store.rounds.request(1, "train", "x")
    run_next_round(settings, 1, world.ports)
    assert world.spec.model is None and store.rounds.of_project(1)[-1].state == "done"


def test_a_rank_round_uses_up_no_annotations(settings, store):
    store.ledger.see(1, [SeenAnnotation(i, i) for i in (1, 2, 3)])
    store.rounds.request(1, "rank", "new tasks")
    run_next_round(settings, 1, FakeWorld().ports)
    assert store.ledger.new_count(1) == 3


def test_ranking_new_tasks_uses_the_newest_model(settings, store):
    store.rounds.request(1, "train", "x")
    run_next_round(settings, 1, FakeWorld().ports)
    store.rounds.request(1, "rank", "new tasks")
    world = FakeWorld()
    run_next_round(settings, 1, world.ports)
    assert world.spec.model.checkpoint.endswith("rounds/1/train/model.pth")
    assert world.spec.model.labels == ("cat", "dog") and "train" not in world.calls


@pytest.mark.parametrize("start", ["last", "zoo"])
def test_a_training_starts_from_the_last_version_where_the_project_says_so(settings, store, start):
    store.projects.connect(1, "1.1", "<View/>", "http://ls", {"init_weights": start, "difficulty": False})
    for _ in range(2):
        store.rounds.request(1, "train", "x")
        world = FakeWorld()
        run_next_round(settings, 1, world.ports)
    begun_from = None if world.spec.model is None else world.spec.model.checkpoint
    first = str(settings.model_dir.resolve() / "projects/1/rounds/1/train/model.pth")
    assert begun_from == (first if start == "last" else None)
    assert (world.spec.init_weights, world.spec.difficulty) == (start, False)


class Jobs:
    """A queue that remembers; ``error`` makes it fail."""

    def __init__(self):
        self.synced, self.rounds, self.error = [], [], None

    def sync(self, project_id):
        if self.error is not None:
            raise self.error
        self.synced.append(project_id)

    def run_round(self, project_id):
        self.rounds.append(project_id)


class NotDue:
    def poll_in_background(self, project_id, at_once=False):
        return False


def test_the_tick_finds_what_no_job_announced(settings, store, monkeypatch):
    monkeypatch.setattr("ppal_backend.worker.worker.LATE_S", 0.0)
    jobs = Jobs()
    _tick(store, jobs, NotDue())
    assert (jobs.synced, jobs.rounds) == ([], [])
    store.events.add(1, "START_TRAINING", {})
    store.rounds.request(1, "train", "x")
    _tick(store, jobs, NotDue())
    assert (jobs.synced, jobs.rounds) == ([1], [1])


def test_a_queue_that_is_away_does_not_end_the_worker(settings, store, monkeypatch):
    monkeypatch.setattr("ppal_backend.worker.worker.LATE_S", 0.0)
    store.events.add(1, "START_TRAINING", {})
    jobs = Jobs()
    jobs.error = QueueUnavailable("Redis is away")
    _tick(store, jobs, NotDue())
    jobs.error = None
    _tick(store, jobs, NotDue())
    assert jobs.synced == [1]


@pytest.fixture
def logging_as_it_was():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_records_of_a_round_carry_its_ids(settings, store, capfd, logging_as_it_was):
    class Talking(FakeWorld):
        def train(self, *arguments):
            logging.getLogger("mmengine").warning("deep within")
            return super().train(*arguments)

    store.rounds.request(1, "train", "x")
    configure_logging("INFO", "json")
    assert run_next_round(settings, 1, Talking().ports)
    records = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (deep,) = [r for r in records if r["message"] == "deep within"]
    assert (deep["project"], deep["round"], deep["level"]) == (1, 1, "WARNING")


def test_earlier_models_are_those_whose_training_was_fair_and_whose_files_are_there(settings, store):
    world = FakeWorld()
    for _ in range(8):
        store.rounds.request(1, "train", "x")
        world.publish = lambda spec, *_: f"ppal-r{spec.number}"
        run_next_round(settings, 1, world.ports)
    store.rounds.request(1, "rank", "x")
    run_next_round(settings, 1, world.ports)
    versions = {v.round_number: v for v in store.versions.of_project(1)}
    unfair = replace(versions[7], metrics={**versions[7].metrics, "trained_on_everything": True}, active=False)
    store.versions.activate(unfair)
    store.versions.activate(versions[9])
    project = store.projects.get(1)
    found = earlier_models(settings, store, project, 10)
    assert versions[9].checkpoint == versions[8].checkpoint and found.active == 8, "the round that trained it"
    assert sorted(found.models) == [5, 6, 8], "without that of round 7, and those whose files were removed"
    Path(found.models[5].checkpoint).unlink()
    found = earlier_models(settings, store, project, 10)
    assert sorted(found.models) == [6, 8]
    assert sorted(earlier_models(settings, store, project, 8).models) == [6], "a round that is done again"
    store.versions.activate(versions[5])
    assert earlier_models(settings, store, project, 10).active is None, "its files are gone"
