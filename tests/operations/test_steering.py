"""Pins and quotas as people ask for them, and the queue that comes of it."""

from dataclasses import replace

import pytest

from ppal_backend.errors import StateError
from ppal_backend.operations import control, steering
from ppal_backend.rounds.ports import PoolEntry
from ppal_backend.store import SeenAnnotation
from tests.place import Place


@pytest.fixture
def place(make_place):
    return make_place(Place)


def published(place):
    """Tasks in the order in which Label Studio serves them."""
    version = place.label_studio.project["model_version"]
    mine = [p for p in place.label_studio.predictions if p["model_version"] == version]
    return [p["task"] for p in sorted(mine, key=lambda p: p["score"])]


def test_a_pin_changes_the_queue_with_a_ranking_and_stays_through_trainings(place):
    place.round()
    done = steering.pin(place.store, 1, [1029, 1003], "first")
    assert done.text == "Tasks 1029, 1003 in front of the queue; round 2 puts the queue in its new order."
    steering.pin(place.store, 1, [1010], "last")
    (record,) = [r for r in place.store.rounds.of_project(1) if r.state == "pending"]
    assert (record.number, record.kind) == (2, "rank"), "several pins ask for one ranking"
    place.world.calls.clear()
    assert place.run() and "train" not in place.world.calls
    queue = published(place)
    assert queue[:2] == [1029, 1003] and queue[-1] == 1010
    place.round()
    assert published(place)[:2] == [1029, 1003]
    steering.unpin(place.store, 1, [1029])
    place.run()
    assert published(place)[0] == 1003


def test_a_quota_holds_from_the_next_ranking_on_and_what_cannot_hold_is_told(place):
    place.round()
    done = steering.add_quota(place.settings, place.store, 1, "20% label:cat")
    steering.add_quota(place.settings, place.store, 1, "100% data:camera=north")
    assert done.text.startswith("Kept: at least 20 % with cat; round 2")
    place.run()
    assert (
        "at least 100 % with camera = north: 0 of 5, the pool has 0" in place.store.projects.get(1).problems["quotas"]
    )
    for quota in steering.listing(place.store, 1)["quotas"]:
        steering.remove_quota(place.store, 1, quota["id"])
    place.run()
    assert "quotas" not in place.store.projects.get(1).problems and steering.listing(place.store, 1)["quotas"] == []


def test_a_pin_of_a_deleted_task_is_dropped_and_told(place):
    place.round()
    steering.pin(place.store, 1, [1004, 555], "first")
    place.run()
    assert steering.listing(place.store, 1)["first"] == [1004]
    assert "1 pin dropped: no task to label is 555 any more" in place.store.projects.get(1).problems["pins"]


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_pin_of_a_task_imported_while_a_round_runs_waits_for_the_ranking_that_it_asked_for(place, where):
    """The round knew the tasks of its export alone, and threw the pin away as that of a task that is gone."""
    place.round()
    train = place.world.train

    def imports_meanwhile(*arguments):
        place.label_studio.add_task(2000)
        assert "round 3 puts the queue" in steering.pin(place.store, 1, [2000], where).text
        return train(*arguments)

    place.world.train = imports_meanwhile
    place.round()
    assert steering.listing(place.store, 1)[where] == [2000]
    assert "pins" not in place.store.projects.get(1).problems
    prepare = place.world.prepare

    def with_the_new_task(*arguments):
        data = prepare(*arguments)
        return replace(data, pool=[*data.pool, PoolEntry(2000, "/images/2000.jpg", 100, 80)])

    place.world.prepare = with_the_new_task
    assert place.run() and place.store.rounds.last(1).number == 3
    assert published(place)[0 if where == "first" else -1] == 2000


def test_a_task_of_a_round_s_labelled_ones_can_be_pinned_once_its_annotation_is_gone(place):
    place.round()
    train = place.world.train

    def deleted_meanwhile(*arguments):
        steering.pin(place.store, 1, [3], "first")  # one of the twenty that the round learns from
        return train(*arguments)

    place.world.train = deleted_meanwhile
    place.round()
    assert steering.listing(place.store, 1)["first"] == [3]
    place.run()
    assert steering.listing(place.store, 1)["first"] == [], "its export began after the pin, and it is labelled"


@pytest.mark.parametrize("ids", [[], [0], [-3], [2**63]])
def test_what_is_no_task_is_refused(place, ids):
    with pytest.raises(StateError, match="expected ids of tasks"):
        steering.pin(place.store, 1, ids, "first")
    assert place.store.rounds.of_project(1) == []


def test_what_cannot_be_asked_is_refused_and_asks_for_no_ranking(place):
    place.store.ledger.see(1, [SeenAnnotation(1, 1001)])
    with pytest.raises(StateError, match="got labelled ones: 1001"):
        steering.pin(place.store, 1, [1000, 1001], "first")
    with pytest.raises(StateError, match=r"a label of the project \(cat, dog\), got 'wolf'"):
        steering.add_quota(place.settings, place.store, 1, "10% label:wolf")
    with pytest.raises(StateError, match="label:stingray"):
        steering.add_quota(place.settings, place.store, 1, "some cats")
    with pytest.raises(StateError, match="has no quota 9; ppal pin 1"):
        steering.remove_quota(place.store, 1, 9)
    assert steering.unpin(place.store, 1, [1000]).round_number is None
    assert place.store.rounds.of_project(1) == [] and steering.listing(place.store, 1)["first"] == []
    with pytest.raises(StateError, match="not connected"):
        steering.pin(place.store, 2, [1], "first")


def test_pins_of_a_paused_project_say_that_they_wait(place):
    control.pause(place.store, 1)
    assert steering.pin(place.store, 1, [1000], "first").text.endswith("once the project's rounds are resumed.")
