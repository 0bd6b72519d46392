"""Going back: the queue of the version again, its model again, and clear words where that is impossible."""

import importlib
import json
import shutil

import pytest

from ppal_backend.errors import StateError
from ppal_backend.operations.control import pause, resume, roll_back
from ppal_backend.rounds.folder import Rounds
from ppal_backend.store import Lease


def back(place, version):
    return roll_back(place.settings, place.store, place.client, 1, version)


def has_queue(place, version):
    return Rounds(place.settings).has_queue(1, version.round_number)


@pytest.fixture
def killed_while_pruning(monkeypatch):
    """``killed_while_pruning(call)``: the process ends while Label Studio deletes old predictions, which takes long."""

    def killed(call):
        def prune(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("ppal_backend.label_studio.publish.prune_versions", prune)
            with pytest.raises(KeyboardInterrupt):
                call()

    return killed


def test_a_version_that_label_studio_still_holds_is_active_again_without_an_import(place):
    place.round("rank")
    place.round()
    place.world.pool_size = 20  # another order than before
    place.round()
    first, second, third = place.versions()
    queue_of_second = place.label_studio.served()[:0] or [
        p["task"] for p in place.label_studio.predictions if p["model_version"] == second
    ]
    requests = len(place.label_studio.requests)
    done = back(place, second)
    assert (done.version, done.predictions, done.published_again) == (second, 30, False)
    assert place.label_studio.served() == queue_of_second and len(queue_of_second) == 30
    assert place.store.versions.active(1).version == second
    assert place.store.versions.active(1, with_model=True).checkpoint == "projects/1/rounds/2/train/model.pth"
    sent = place.label_studio.requests[requests:]
    assert [r.method for r in sent if r.method != "GET"] == ["PATCH"]
    assert back(place, second).version == second, "doing it twice is harmless"
    assert back(place, third).version == third and place.store.versions.active(1).version == third
    assert back(place, first).version == first
    assert place.store.versions.active(1, with_model=True) is None, "the first order had no model"


def test_a_ranking_after_a_rollback_uses_the_model_gone_back_to(place):
    place.round()
    place.round()
    back(place, place.versions()[0])
    place.round("rank")
    spec = (place.folder(3) / "spec.json").read_text()
    assert "rounds/1/train/model.pth" in spec


def test_a_version_gone_from_label_studio_is_published_again_from_its_files(make_place):
    place = make_place(keep_versions=1)
    place.round()
    first_queue = place.label_studio.served()
    boxes = {p["task"]: p["result"] for p in place.label_studio.predictions}
    place.round()
    place.round()
    first = place.versions()[0]
    assert first not in place.label_studio.counts()
    done = back(place, first)
    assert done.published_again and done.version != first and done.version.startswith("ppal-r1-")
    assert place.label_studio.served() == first_queue
    now = {p["task"]: p for p in place.label_studio.predictions if p["model_version"] == done.version}
    assert any(boxes.values())
    for task, result in boxes.items():
        assert [r["value"] for r in now[task]["result"]] == [r["value"] for r in result]
    active = place.store.versions.active(1)
    assert (active.version, active.checkpoint) == (done.version, "projects/1/rounds/1/train/model.pth")


def test_going_back_publishes_the_front_as_a_round_does_and_tells_how_many(make_place):
    place = make_place(keep_versions=1, publish_tasks=1)  # four budgets of 5
    place.round()
    first_queue = place.label_studio.served()
    facts = json.loads((place.folder(1) / "steps" / "publish.json").read_text())["facts"]
    assert (len(first_queue), facts["published"], facts["tasks"]) == (20, 20, 30)
    place.round()
    place.round()
    done = back(place, place.versions()[0])
    assert done.published_again and done.predictions == 20 and place.label_studio.served() == first_queue


def test_what_cannot_be_gone_back_to_is_told_and_changes_nothing(make_place):
    place = make_place(keep_versions=1)
    place.round()
    place.round()
    place.round()
    first, second, third = place.versions()
    with pytest.raises(StateError, match="project 9 is not connected"):
        roll_back(place.settings, place.store, place.client, 9, first)
    with pytest.raises(StateError, match=f"got 'v9'; it has: {first}, {second}, {third}"):
        back(place, "v9")
    shutil.rmtree(place.folder(1) / "detections")
    assert not has_queue(place, place.store.versions.get(1, first))
    with pytest.raises(StateError, match="they were removed"):
        back(place, first)
    (place.folder(2) / "train" / "model.pth").write_bytes(b"something else")
    with pytest.raises(StateError, match="the file is damaged"):
        back(place, second)
    (place.folder(2) / "train" / "model.pth").unlink()
    with pytest.raises(StateError, match="got no file"):
        back(place, second)
    assert place.label_studio.project["model_version"] == third == place.store.versions.active(1).version


def test_going_back_after_a_rollback_that_was_cut_off_goes_back(make_place, killed_while_pruning):
    """What it has noted was true until another round published."""
    place = make_place(keep_versions=1)
    place.round()
    queue = place.label_studio.served()
    place.round()
    place.round()
    first, third = place.versions()[0], place.versions()[2]
    killed_while_pruning(lambda: back(place, first))
    assert json.loads((place.folder(1) / "rollback.json").read_text())["state"] == "done"
    place.world.pool_size = 20  # another order
    place.round()
    assert place.label_studio.served() != queue
    done = back(place, first)
    assert place.label_studio.project["model_version"] == done.version == place.store.versions.active(1).version
    assert place.label_studio.served() == queue and done.predictions == 30 and done.version not in (first, third)
    assert not (place.folder(1) / "rollback.json").exists()


def test_a_rollback_that_was_cut_off_is_completed_by_the_next(make_place, killed_while_pruning):
    place = make_place(keep_versions=1)
    for _ in range(3):
        place.round()
    first = place.versions()[0]
    killed_while_pruning(lambda: back(place, first))
    served, imports = place.label_studio.project["model_version"], place.label_studio.paths("POST")
    done = back(place, first)
    assert done.version == served == place.label_studio.project["model_version"]
    assert place.store.versions.active(1).version == served and place.label_studio.paths("POST") == imports


def test_a_round_that_nobody_holds_while_it_is_published_hinders_no_rollback(place, killed_while_pruning):
    """Paused or waiting: the round publishes its version once it goes on, unless it is cancelled."""
    for _ in range(2):
        place.round()
    first = place.versions()[0]
    record = place.store.rounds.request(1, "train", "x")
    killed_while_pruning(place.run)
    with pytest.raises(StateError, match="round 3 of project 1 is publishing right now"):
        back(place, first)  # this process lives, and holds it
    pause(place.store, 1)
    place.store.rounds.release(record.id)
    assert place.store.rounds.running(1).step == "publish"
    assert back(place, first).version == first == place.label_studio.project["model_version"]
    resume(place.store, 1)
    place.run()
    assert place.store.rounds.get(record.id).state == "done"
    assert place.store.versions.active(1).version == place.label_studio.project["model_version"] != first
    assert place.store.versions.active(1).round_number == 3


@pytest.mark.parametrize("keep_versions", [1, 3])
def test_no_model_predicts_or_ranks_after_going_back_to_an_order_without_one(make_place, keep_versions):
    place = make_place(keep_versions=keep_versions)
    place.round("rank")
    place.round()
    place.round()
    done = back(place, place.versions()[0])
    assert done.published_again is (keep_versions == 1)
    for number in (4, 5):
        assert place.store.versions.active(1, with_model=True) is None
        place.round("rank")
        assert json.loads((place.folder(number) / "spec.json").read_text())["model"] is None
    place.round()
    assert place.store.versions.active(1, with_model=True).checkpoint == "projects/1/rounds/6/train/model.pth"


def test_a_round_that_is_publishing_is_not_crossed(place):
    place.round()
    place.store.rounds.request(1, "train", "x")
    record = place.store.rounds.claim(1, Lease.mine())
    place.store.rounds.report(record.id, "publish", {})
    with pytest.raises(StateError, match="round 2 of project 1 is publishing right now"):
        back(place, place.versions()[0])


@pytest.mark.parametrize("stored", [False, True])
def test_a_round_that_ends_while_somebody_goes_back_leaves_what_is_gone_back_to(make_place, monkeypatch, stored):
    """Publishing takes minutes; the version was older than those kept by then, and predicted with no checkpoint."""
    place = make_place(keep_artifacts=2, keep_versions=3 if stored else 1)
    place.round()
    place.round()
    first, second = place.versions()
    name = "activate_version" if stored else "publish"
    owner = "ppal_backend.operations.control" if stored else "ppal_backend.label_studio.publish"
    really = getattr(importlib.import_module(owner), name)

    def slowly(*arguments, **options):
        monkeypatch.undo()
        place.round()  # its end makes another version, and removes the files of old ones
        return really(*arguments, **options)

    monkeypatch.setattr(f"{owner}.{name}", slowly)
    done = back(place, first)
    active = place.store.versions.active(1)
    assert active.version == done.version and done.published_again is not stored
    assert place.label_studio.project["model_version"] == done.version
    assert (place.settings.model_dir / active.checkpoint).is_file() and has_queue(place, active)
    assert not any(version.wanted for version in place.store.versions.of_project(1))
    assert back(place, second).version, "the round before is among the last two"
    for _ in range(2):
        place.round()
    assert not has_queue(place, active), "it is old as any other once nobody goes back to it"


def test_a_version_that_could_not_be_gone_back_to_is_kept_no_longer(make_place):
    place = make_place(keep_versions=1)
    place.round()
    place.round()
    first = place.versions()[0]
    shutil.rmtree(place.folder(1) / "detections")
    with pytest.raises(StateError, match="they were removed"):
        back(place, first)
    assert not place.store.versions.get(1, first).wanted
