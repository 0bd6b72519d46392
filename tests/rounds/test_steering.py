"""What people ask of the queue, in the rounds that order it."""

import json
from dataclasses import replace

import pytest

from ppal_backend.rounds.evaluation_set import drawn
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.structures.steering import Quota, Steering
from tests.rounds.fakes import LABELS, SPEC, FakeWorld, Killed, detections_of, rank_spec


class Asked:
    """Pins and quotas in memory."""

    def __init__(self, **asked):
        self.now, self.dropped = Steering(**asked), []

    def read(self):
        return self.now

    def drop(self, task_ids):
        self.dropped += task_ids


def ran(path, spec=SPEC, world=None, **asked):
    world = world or FakeWorld()
    world.steering = Asked(**asked)
    result = world.run(path, spec)
    return world, RoundFolder(path).read("query_set.json"), result.queue


def test_pins_come_in_front_and_at_the_end_and_count_for_the_budget(tmp_path):
    _, plain, _ = ran(tmp_path / "1")
    first, last = (1029, 1000), (plain["image_ids"][0], plain["image_ids"][1])
    _, query, queue = ran(tmp_path / "2", first=first, last=last)
    assert queue[:2] == first and queue[-2:] == last and sorted(queue) == list(range(1000, 1030))
    assert query["image_ids"][:2] == list(first) and len(query["image_ids"]) == SPEC.budget
    assert (query["first"], query["last"]) == (list(first), list(last))
    assert set(query["explanations"]) == {str(i) for i in query["image_ids"][2:]}


def test_more_pins_than_the_budget_are_all_in_front_and_the_evaluation_set_goes_on_growing(tmp_path):
    spec, pool = replace(SPEC, holdout_fraction=0.25), range(1000, 1030)
    reserve = drawn(spec.project_key, pool, spec.holdout_fraction)
    first = tuple(i for i in pool if i not in reserve)[:7]
    _, query, queue = ran(tmp_path, spec, first=first)
    assert queue[:7] == first and query["to_evaluate"] and query["image_ids"] == [*first, *query["to_evaluate"]]
    assert set(query["to_evaluate"]) <= set(reserve)


def test_unreadable_images_stay_behind_tasks_that_were_put_at_the_end(tmp_path):
    _, _, queue = ran(tmp_path, world=FakeWorld(unreadable=(7001,)), last=(1003,), first=(7001,))
    assert queue[-2:] == (1003, 7001)


def test_a_pin_takes_effect_in_a_ranking_without_a_training(tmp_path):
    world = FakeWorld()
    model = world.run(tmp_path / "1").model
    world.calls.clear()
    world.steering = Asked(first=(1017,))
    queue = world.run(tmp_path / "2", replace(rank_spec(model), number=2)).queue
    assert queue[0] == 1017 and "train" not in world.calls
    assert world.published[-1][1][0].task_id == 1017


def test_pins_before_the_first_model_order_the_random_queue(tmp_path):
    _, query, queue = ran(tmp_path, rank_spec(), first=(1017,), last=(1004,))
    assert (queue[0], queue[-1], query["strategy"]) == (1017, 1004, "random")


def test_pinned_tasks_keep_the_side_that_the_hash_draws(tmp_path):
    spec, pool = replace(SPEC, holdout_fraction=0.25), range(1000, 1030)
    reserve = drawn(spec.project_key, pool, spec.holdout_fraction)
    _, query, queue = ran(tmp_path, spec, first=(reserve[-1],), last=(reserve[0],))
    assert queue[0] == reserve[-1] and queue[-1] == reserve[0]
    split = RoundFolder(tmp_path).read("dataset/split.json")
    assert {reserve[0], reserve[-1]} <= set(split["reserve"]), "sides go by the hash, whatever is pinned"
    assert not {reserve[0], reserve[-1]} & {int(i) for i in query["explanations"]}


def test_pins_of_labelled_tasks_are_forgotten_and_those_of_deleted_ones_are_told(tmp_path):
    world, query, queue = ran(tmp_path, first=(3, 1002, 99), last=(4, 77))
    assert sorted(world.steering.dropped) == [3, 4, 77, 99] and queue[0] == 1002
    assert query["first"] == [1002]
    assert world.problems["pins"].startswith("2 pins dropped: no task to label is 99, 77 any more")
    world, _, _ = ran(tmp_path / "2", first=(1002,))
    assert world.problems["pins"] == "" and world.steering.dropped == []


def test_a_round_judges_no_pin_that_was_set_after_its_export_began(tmp_path):
    """What it does not know may have been imported since."""
    world = FakeWorld()
    world.steering = Asked(first=(1002, 3, 99, 5, 77), pinned_at={i: "before" for i in (1002, 3, 99, 5, 77)})
    export = world.export

    def steered_meanwhile(folder):
        ids = export(folder)
        pins = {1002: "before", 3: "before", 99: "before", 5: "after", 77: "after", 2000: "after", 4: "after"}
        world.steering.now = Steering(first=tuple(pins), last=(1003,), pinned_at={**pins, 1003: "after"})
        return ids

    world.export = steered_meanwhile
    world.kill_in = "infer"
    with pytest.raises(Killed):
        world.run(tmp_path)
    queue = world.run(tmp_path).queue
    assert sorted(world.steering.dropped) == [3, 99], "5 and 77 were pinned again, 4 and 2000 for the first time"
    assert world.problems["pins"].startswith("1 pin dropped: no task to label is 99 any more")
    assert (queue[0], queue[-1]) == (1002, 1003), "a later pin of a task that the round knows is heeded all the same"


def test_a_round_of_an_earlier_release_drops_no_pin(tmp_path):
    world = FakeWorld()
    world.kill_in = "infer"
    with pytest.raises(Killed):
        ran(tmp_path, world=world)
    (tmp_path / "export" / "steering.json").unlink()
    mark = RoundFolder(tmp_path).path / "steps" / "export.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "sha256": {}}))
    world, _, _ = ran(tmp_path, world=world, first=(1002, 99))
    assert world.steering.dropped == [] and world.problems["pins"] == ""


def test_a_round_killed_between_its_candidates_and_its_query_goes_on_with_what_was_asked_then(tmp_path, monkeypatch):
    world = FakeWorld()
    world.steering = Asked(first=(1007,))
    world.kill_in = "publish"
    with pytest.raises(Killed):
        world.run(tmp_path)
    RoundFolder(tmp_path).undo(["query"])
    world.steering.now = Steering(first=(1008,))
    assert world.run(tmp_path).queue[0] == 1007
    assert RoundFolder(tmp_path).read("query_set.json")["first"] == [1007]


def holding(label, least=SPEC.score_threshold):
    """Tasks of the pool on which the model sees a label."""
    sees = {}
    for image_id in range(1000, 1030):
        found = detections_of(image_id)
        sees[image_id] = {LABELS[c] for c, s in zip(found.class_indices, found.scores, strict=True) if s >= least}
    return {i for i, labels in sees.items() if label in labels}


def test_a_quota_of_a_class_holds_and_is_told_with_its_distance(tmp_path):
    spec = replace(SPEC, score_threshold=0.75)
    cats = holding("cat", 0.75)
    _, plain, _ = ran(tmp_path / "1", spec)
    before = len(set(plain["image_ids"]) & cats)
    world, query, queue = ran(tmp_path / "2", spec, quotas=(Quota("label", "cat", 0.8),))
    (told,) = query["quotas"]
    assert before < 4 <= len(cats), "else the quota has nothing to do"
    assert told["text"] == "at least 80 % with cat" and (told["needed"], told["in_pool"]) == (4, len(cats))
    assert told["reached"] == len(set(query["image_ids"]) & cats) == 4 and len(query["image_ids"]) == 5
    assert (
        set(told["entered"])
        == set(query["without_quotas"]["entered"])
        == set(query["image_ids"]) - set(plain["image_ids"])
    )
    assert len(query["without_quotas"]["left"]) == 4 - before and world.problems["quotas"] == ""
    assert set(query["explanations"]) == {str(i) for i in query["image_ids"]} and queue[:5] == tuple(query["image_ids"])


def test_quotas_by_data_and_storage_hold_together_and_pins_count(tmp_path):
    world = FakeWorld()
    world.data = {
        i: {"camera": "north" if i % 3 else "south", "image": f"s3://b/day{i % 2}/{i}.jpg"} for i in range(1000, 1030)
    }
    quotas = (Quota("data", "south", 0.6, "camera"), Quota("storage", "s3://b/day1/", 0.6))
    _, query, _ = ran(tmp_path, world=world, quotas=quotas, first=(1005,))
    ids = query["image_ids"]
    assert ids[0] == 1005 and len(ids) == 5
    assert [q["reached"] for q in query["quotas"]] == [sum(i % 3 == 0 for i in ids), sum(i % 2 for i in ids)]
    assert all(q["reached"] >= q["needed"] == 3 for q in query["quotas"]) and world.problems["quotas"] == ""


def test_a_quota_that_cannot_hold_is_told_with_what_was_reached_and_the_round_goes_on(tmp_path):
    quotas = (Quota("label", "unicorn", 0.5), Quota("label", "cat", 0.2))
    world, query, queue = ran(tmp_path, quotas=quotas)
    assert [q["reached"] >= q["needed"] for q in query["quotas"]] == [False, True]
    assert world.problems["quotas"].startswith(
        "the query set misses 1 quota (at least 50 % with unicorn: 0 of 3, the pool has 0)"
    )
    assert len(queue) == 30 and len(query["image_ids"]) == 5


def test_the_whole_pool_pinned_is_a_queue_like_any_other(tmp_path):
    everything = tuple(range(1000, 1030))
    _, query, queue = ran(tmp_path, first=everything[:10], last=everything[10:], quotas=(Quota("label", "cat", 0.5),))
    assert queue == everything and query["image_ids"] == list(everything[:10])
