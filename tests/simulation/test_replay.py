"""Rounds with an oracle: paired starts, what gets labelled, and that a killed simulation picks the same images."""

import json
from pathlib import Path

import numpy as np
import pytest

from ppal_backend.errors import RoundCancelled, StateError
from ppal_backend.files import read_json
from ppal_backend.rounds.ports import Inferred
from ppal_backend.simulation.folder import first_model_folder, locked, round_place
from ppal_backend.simulation.oracle import take_boxes
from ppal_backend.simulation.replay import Replay
from ppal_backend.simulation.schedule import Task, run_tasks, tasks_of
from tests.simulation.fakes import FakeEngine, Killed, benchmark, broken_engine, fake_engine, lay_out, make_plan

STRATEGIES = "random,random:match=ppal,entropy,ppal,ppal:delta=2,ppal:xi=0.2"


def run(root, strategies=STRATEGIES, engine=None, **changes):
    data = benchmark()
    plan = make_plan(data, strategies, **changes)
    lay_out(root, data, plan)
    own = engine or FakeEngine()
    run_tasks(root, plan, lambda _: own)
    return plan


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One simulation of every kind of strategy, for tests that only look."""
    root, engine = tmp_path_factory.mktemp("finished"), FakeEngine()
    return root, run(root, engine=engine), engine


def labelled(root, plan, name, seed, number):
    return round_place(root, seed, plan.variant(name).folder, number).labelled()


def all_picks(root, plan):
    return {
        (v.name, seed, k): round_place(root, seed, v.folder, k).result()["picks"]
        for v in plan.variants
        for seed in plan.seeds
        for k in range(plan.rounds + 1)
    }


def test_every_strategy_of_a_seed_starts_with_the_same_images_and_the_same_first_model(finished):
    root, plan, engine = finished
    for seed in plan.seeds:
        starts = {tuple(labelled(root, plan, v.name, seed, 0)) for v in plan.variants}
        assert len(starts) == 1 and len(next(iter(starts))) == 8
    assert labelled(root, plan, "ppal", 0, 0) != labelled(root, plan, "ppal", 1, 0)
    # a seed trains one first model for the usual difficulty and one for xi = 0.2, then one a later round
    assert engine.calls.count("train") == 2 * (2 + 6 * plan.rounds)
    first = [round_place(root, 0, v.folder, 0).result() for v in plan.variants]
    assert len({r["map"] for r in first}) == 1
    difficulties = {v.name: r["difficulty"]["dog"] for v, r in zip(plan.variants, first, strict=True)}
    assert difficulties["ppal:xi=0.2"] != difficulties["ppal"] == difficulties["random"]


def test_typical_first_images_are_chosen_once_and_have_a_first_model_of_their_own(tmp_path):
    engine = FakeEngine()
    plan = run(tmp_path, "ppal,ppal:start=typical,random:start=typical", engine)
    for seed in plan.seeds:
        typical = [labelled(tmp_path, plan, name, seed, 0) for name in ("ppal:start=typical", "random:start=typical")]
        assert typical[0] == typical[1] != labelled(tmp_path, plan, "ppal", seed, 0)
        assert len(set(typical[0])) == plan.start
    assert engine.calls.count("untrained") == 2 and engine.calls.count("train") == 2 * (2 + 3 * plan.rounds)
    assert not (tmp_path / "seed-0" / "typical" / "detections").exists()


def test_typical_first_images_need_initial_weights(tmp_path):
    engine = FakeEngine()
    engine.has_weights = False
    with pytest.raises(StateError, match=r"initial weights of retinanet_tiny.*ppal zoo fetch"):
        run(tmp_path, "ppal:start=typical", engine)


def test_every_training_may_learn_from_all_images_without_labels_the_last_one_too(tmp_path):
    class Watching(FakeEngine):
        def train(self, spec, labels, files, *rest):
            sizes[spec.number].add((len(read_json(files.train)["images"]), len(set(files.unlabelled))))
            return super().train(spec, labels, files, *rest)

    sizes = {number: set() for number in range(4)}
    plan = run(tmp_path, "ppal", Watching())
    for number, seen in sizes.items():
        labelled_images = plan.start + number * plan.budget
        assert seen == {(labelled_images, 60 - labelled_images)}


class RivalEngine(FakeEngine):
    """Says a utility of its own of each image, and notes which strategy each training was for."""

    def __init__(self):
        super().__init__()
        self.trained_for = []

    def train(self, spec, *rest):
        self.trained_for.append((spec.seed, spec.number, spec.strategy))
        return super().train(spec, *rest)

    def infer(self, spec, *rest):
        for found in super().infer(spec, *rest):
            utility = np.float32([found.detections.image_id % 7])
            yield Inferred(found.detections, {**found.features, spec.strategy: utility})


def test_a_strategy_that_changes_the_detector_trains_it_from_the_first_model_on(tmp_path):
    engine = RivalEngine()
    plan = run(tmp_path, "random,ppal,learnloss", engine)
    for seed in plan.seeds:
        assert engine.trained_for.count((seed, 0, "learnloss")) == 1, "of its own"
        assert engine.trained_for.count((seed, 0, "random")) == 1, "shared by the others"
        assert labelled(tmp_path, plan, "learnloss", seed, 0) == labelled(tmp_path, plan, "ppal", seed, 0)
        start = set(labelled(tmp_path, plan, "learnloss", seed, 0))
        best = sorted((i for i in range(1, 61) if i not in start), key=lambda i: (-(i % 7), i))
        assert round_place(tmp_path, seed, "learnloss", 0).result()["picks"] == best[: plan.budget]
    assert (0, plan.rounds, "learnloss") in engine.trained_for


def test_other_levels_have_a_first_look_of_their_own(tmp_path):
    engine = FakeEngine()
    plan = run(tmp_path, "ppal,ppal:levels=scale", engine)
    first = {read_json(first_model_folder(tmp_path, 0, v.first_model) / "spec.json")["levels"] for v in plan.variants}
    assert first == {"provenance", "scale"}


def test_a_round_labels_budget_images_that_were_not_labelled_and_keeps_the_others(finished):
    root, plan, _ = finished
    for name in ("random", "entropy", "ppal", "ppal:delta=2"):
        for number in range(1, plan.rounds + 1):
            before = labelled(root, plan, name, 0, number - 1)
            now = labelled(root, plan, name, 0, number)
            assert now[: len(before)] == before and len(now) == len(set(now)) == len(before) + 6
            picks = round_place(root, 0, plan.variant(name).folder, number - 1).result()["picks"]
            assert now[len(before) :] == picks


def test_the_query_set_is_labelled_in_its_order(finished):
    root, plan, _ = finished
    place = round_place(root, 0, "ppal", 1)
    query = json.loads((place.path / "query_set.json").read_text())
    assert query["image_ids"] == place.result()["picks"]
    assert set(query["explanations"]) == {str(i) for i in query["image_ids"]}
    assert plan.spec(0, 1, plan.variant("ppal:delta=2"), "cpu", False).delta == 2.0


def test_options_change_what_is_picked(tmp_path):
    plan = run(tmp_path, "ppal,ppal:delta=1.5,entropy,random")
    picks = [tuple(round_place(tmp_path, 0, v.folder, 0).result()["picks"]) for v in plan.variants]
    assert len(set(picks)) == 4


def test_results_count_true_boxes(finished):
    root, plan, _ = finished
    for name in ("random", "ppal"):
        result = round_place(root, 1, name, 2).result()
        ids = labelled(root, plan, name, 1, 2)
        assert (result["labelled_images"], result["labelled_boxes"]) == (20, sum(i % 5 for i in ids))


def test_box_matched_random_follows_the_boxes_of_the_other_strategy(finished):
    root, plan, _ = finished
    for seed in plan.seeds:
        for number in range(1, plan.rounds + 1):
            mine = round_place(root, seed, plan.variant("random:match=ppal").folder, number).result()
            theirs = round_place(root, seed, "ppal", number).result()
            assert abs(mine["labelled_boxes"] - theirs["labelled_boxes"]) <= 2  # half of the largest image
    assert mine["labelled_images"] > theirs["labelled_images"], "random images hold fewer boxes than PPAL's"


@pytest.mark.parametrize(
    ("wanted", "picks"), [(0, []), (3, [1]), (4, [1, 2]), (5, [1, 2]), (6, [1, 2, 3]), (99, [1, 2, 3, 4])]
)
def test_box_matching_comes_as_near_as_whole_images_allow(wanted, picks):
    boxes = {1: 3, 2: 1, 3: 3, 4: 1}  # 3, 4, 7, 8 together
    assert take_boxes(wanted, boxes)([9], [1, 2, 3, 4]) == picks


def test_a_budget_in_boxes_labels_the_query_set_it_pays_for(tmp_path):
    plan = run(tmp_path, "ppal:unit=boxes,budget=9", seeds=(0,), rounds=1)
    place = round_place(tmp_path, 0, plan.variants[0].folder, 0)
    picks = place.result()["picks"]
    assert picks == json.loads((place.path / "query_set.json").read_text())["image_ids"]
    assert 0 < len(picks) < 9 and sum(max(1, i % 5) for i in picks) <= 9


@pytest.mark.parametrize(
    "kill_at", [("train", k) for k in range(0, 8, 2)] + [("infer", 1), ("infer", 4), ("image", 70), ("evaluate", 3)]
)
def test_a_killed_simulation_goes_on_with_equal_picks(tmp_path, kill_at):
    strategies = "random,random:match=ppal,ppal"
    plan = run(tmp_path / "a", strategies, seeds=(0,))
    engine = FakeEngine()
    engine.kill_at = kill_at
    with pytest.raises(Killed):
        run(tmp_path / "b", strategies, engine, seeds=(0,))
    run(tmp_path / "b", strategies, engine, seeds=(0,))
    assert all_picks(tmp_path / "a", plan) == all_picks(tmp_path / "b", plan)


@pytest.mark.parametrize("written", ["labelled.json", "result.json", "query_set.json", "start.json"])
def test_a_kill_around_a_state_file_does_no_harm(tmp_path, monkeypatch, written):
    plan = run(tmp_path / "a", "ppal", seeds=(0,))
    original = Path.replace
    left = [2]

    def replace_then_die(self, target):
        done = original(self, target)
        if Path(target).name == written:
            left[0] -= 1
            if left[0] == 0 or written == "start.json":
                raise Killed(written)
        return done

    monkeypatch.setattr(Path, "replace", replace_then_die)
    with pytest.raises(Killed):
        run(tmp_path / "b", "ppal", seeds=(0,))
    monkeypatch.undo()
    run(tmp_path / "b", "ppal", seeds=(0,))
    assert all_picks(tmp_path / "a", plan) == all_picks(tmp_path / "b", plan)


def test_a_finished_simulation_does_nothing_again_and_a_new_strategy_runs_alone(tmp_path):
    engine = FakeEngine()
    run(tmp_path, "random,ppal", engine)
    trained = engine.calls.count("train")
    run(tmp_path, "random,ppal", engine)
    assert engine.calls.count("train") == trained
    plan = run(tmp_path, "random,ppal,entropy", engine)
    assert engine.calls.count("train") == trained + len(plan.seeds) * plan.rounds, "the first models were there"
    assert round_place(tmp_path, 0, "entropy", 0).result()["map"] == round_place(tmp_path, 0, "ppal", 0).result()["map"]


@pytest.mark.parametrize("keep", [True, False])
def test_more_rounds_go_on_from_the_last_one_with_the_picks_of_a_run_in_one_go(tmp_path, keep):
    strategies, data, engine = "ppal,random:match=ppal,ppal+labelled", benchmark(), FakeEngine()
    whole = run(tmp_path / "whole", strategies)
    short = make_plan(data, strategies, rounds=1)
    lay_out(tmp_path / "grown", data, short)
    run_tasks(tmp_path / "grown", short, lambda _: engine, keep=keep)
    trained = engine.calls.count("train")
    longer = make_plan(data, strategies).extends(short)
    lay_out(tmp_path / "grown", data, longer)
    run_tasks(tmp_path / "grown", longer, lambda _: engine, keep=keep)
    assert all_picks(tmp_path / "grown", longer) == all_picks(tmp_path / "whole", whole)
    assert labelled(tmp_path / "grown", longer, "ppal+labelled", 1, 3) == labelled(
        tmp_path / "whole", whole, "ppal+labelled", 1, 3
    )
    again = 0 if keep else 6  # the last models of three strategies and two seeds, whose checkpoints are gone
    assert engine.calls.count("train") - trained == 2 * 3 * 2 + again
    assert tasks_of(tmp_path / "grown", make_plan(data, strategies, rounds=1).extends(longer)) == []


def test_strategies_that_look_at_labelled_images_see_them(tmp_path, monkeypatch):
    seen = {}
    from ppal_backend.rounds import run as rounds_run

    original = rounds_run.get_strategy

    def spy(name, **options):
        strategy = original(name, **options)

        class Spy:
            def __getattr__(self, attribute):
                return getattr(strategy, attribute)

            def candidates(self, context, budget, rng):
                labelled = list(context.labelled)  # read now: a round's files go when it is over
                seen.setdefault(name, []).append((labelled, context.labelled_features))
                return strategy.candidates(context, budget, rng)

        return Spy()

    monkeypatch.setattr(rounds_run, "get_strategy", spy)
    run(tmp_path, "ppal,coreset,pal,ppal+labelled,typiclust", seeds=(0,), rounds=1)
    first = {name: looks[0] for name, looks in seen.items()}
    assert not first["ppal"][0] and len(first["coreset"][0]) == 8
    assert first["coreset"][1]["global"].shape == (8, 6)
    marked = [d.true_positive for d in first["pal"][0] if len(d)]
    assert marked and all(flags.all() for flags in marked), "the fake detections are the true boxes"


def test_a_strategy_that_looks_at_labelled_images_may_come_later(tmp_path):
    data = benchmark()
    for strategies in ("ppal", "ppal,coreset"):
        plan = make_plan(data, strategies, seeds=(0,), rounds=1)
        lay_out(tmp_path, data, plan)
        run_tasks(tmp_path, plan, fake_engine, keep=True)
    assert list((tmp_path / "seed-0" / "coreset" / "round-00" / "labelled_detections").glob("*.npz"))


@pytest.mark.parametrize("strategies", [("random,pal",), ("random,coreset", "random,coreset,pal")])
def test_a_strategy_that_reads_counts_has_them_from_the_first_query_on(tmp_path, strategies):
    data, engine = benchmark(), FakeEngine()
    for named in strategies:
        plan = make_plan(data, named, seeds=(0,), rounds=1)
        lay_out(tmp_path, data, plan)
        run_tasks(tmp_path, plan, lambda _: engine, keep=True)
    for kind in ("detections", "labelled_detections"):
        (shard,) = (tmp_path / "seed-0" / "pal" / "round-00" / kind).glob("*.npz")
        assert "pre_nms_counts" in np.load(shard).files
    strategies_with_a_second_model = len(plan.variants)
    assert engine.calls.count("train") == 1 + strategies_with_a_second_model, "the first model was trained once"


def test_a_last_round_that_chooses_nothing_warns_of_nothing(tmp_path, caplog):
    run(tmp_path, "pal,auto", seeds=(0,), rounds=1)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


def test_only_small_artifacts_stay(tmp_path):
    run(tmp_path, "random,ppal", seeds=(0,))
    folder = tmp_path / "seed-0" / "ppal" / "round-01"
    left = {path.name for path in folder.rglob("*") if path.is_file() and path.parent.name != "steps"}
    assert {"result.json", "labelled.json", "query_set.json", "metrics.json", "spec.json", "model.json"} <= left
    assert not left & {"weights.json", "train.json", "pool.json", "val.json", "candidates.json"}
    assert not list(tmp_path.rglob("*.npz"))


def test_keep_keeps_checkpoints_and_detections(tmp_path):
    data = benchmark()
    plan = make_plan(data, "ppal", seeds=(0,), rounds=1)
    lay_out(tmp_path, data, plan)
    run_tasks(tmp_path, plan, fake_engine, keep=True)
    round_1 = tmp_path / "seed-0" / "ppal" / "round-01"
    assert (round_1 / "train" / "weights.json").is_file()
    assert list((tmp_path / "seed-0" / "ppal" / "round-00" / "detections").glob("*.npz"))


def test_a_failing_part_is_told_and_the_others_run(tmp_path):
    data = benchmark()
    plan = make_plan(data, "random,ppal", seeds=(0, 1))
    lay_out(tmp_path, data, plan)
    with pytest.raises(StateError, match=r"6 of 6 parts.*seed 0, first model \(default\): no such luck.*waits for"):
        run_tasks(tmp_path, plan, broken_engine)


def test_a_full_disk_is_told_and_finished_rounds_stay(tmp_path, monkeypatch):
    data = benchmark()
    plan = make_plan(data, "ppal", seeds=(0,))
    lay_out(tmp_path, data, plan)
    engine = FakeEngine()
    original = engine.train
    trainings = []

    def full(*arguments):
        trainings.append(1)
        if len(trainings) == 3:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    engine.train = full
    with pytest.raises(StateError, match=r"no space left for .* finished rounds are kept"):
        run_tasks(tmp_path, plan, lambda _: engine)
    assert round_place(tmp_path, 0, "ppal", 1).result() is not None
    run_tasks(tmp_path, plan, lambda _: engine)
    assert round_place(tmp_path, 0, "ppal", 3).result() is not None


def test_ctrl_c_keeps_what_is_done(tmp_path):
    data = benchmark()
    plan = make_plan(data, "ppal", seeds=(0,))
    lay_out(tmp_path, data, plan)
    engine = FakeEngine()
    original, calls = engine.evaluate, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    engine.evaluate = interrupted
    with pytest.raises(RoundCancelled, match="goes on from here"):
        run_tasks(tmp_path, plan, lambda _: engine)
    assert round_place(tmp_path, 0, "ppal", 0).result() is not None
    run_tasks(tmp_path, plan, lambda _: engine)
    assert not tasks_of(tmp_path, plan)


def test_tasks_wait_for_what_they_need(tmp_path):
    plan = make_plan(benchmark(), "random:match=ppal,ppal,ppal:xi=0.2", seeds=(3,))
    tasks = {task.key: task for task in tasks_of(tmp_path, plan)}
    assert tasks["seed 3, ppal"].after == ("seed 3, first model (default)",)
    assert tasks["seed 3, ppal:xi=0.2"].after == ("seed 3, first model (xi=0.2)",)
    assert set(tasks["seed 3, random:match=ppal"].after) == {"seed 3, first model (default)", "seed 3, ppal"}
    assert len(tasks) == 5


def test_processes_give_the_same_picks_as_one(tmp_path):
    plan = run(tmp_path / "a", "random:match=ppal,ppal")
    data = benchmark()
    lay_out(tmp_path / "b", data, plan)
    run_tasks(tmp_path / "b", plan, fake_engine, jobs=2)
    assert all_picks(tmp_path / "a", plan) == all_picks(tmp_path / "b", plan)


def test_two_processes_never_work_in_one_folder(tmp_path):
    lock = tmp_path / "x" / ".lock"
    with locked(lock, "busy"), pytest.raises(StateError, match="busy"), locked(lock, "busy"):
        pass
    with locked(lock, "busy"):
        pass


def test_the_first_model_is_looked_at_again_when_its_detections_are_gone(tmp_path):
    data = benchmark()
    plan = make_plan(data, "ppal", seeds=(0,))
    lay_out(tmp_path, data, plan)
    engine = FakeEngine()
    run_tasks(tmp_path, plan, lambda _: engine)
    first = first_model_folder(tmp_path, 0, "default")
    assert not (first / "detections").exists() and (first / "train" / "weights.json").is_file()
    before = engine.calls.count("train")
    Replay(tmp_path, plan, data, engine).first_model(0, "default")
    assert engine.calls.count("train") == before and list((first / "detections").glob("*.npz"))


def test_a_key_names_a_task_for_people():
    assert Task(1, "default").key == "seed 1, first model (default)"
    assert Task(1, "default", "ppal").key == "seed 1, ppal"


def test_a_budget_in_boxes_that_no_image_fits_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.simulation.fakes.boxes_of", lambda image_id: 4)
    with pytest.raises(StateError, match=r"at least one image, got none: each of the 52 left .*budget="):
        run(tmp_path, "ppal:unit=boxes,budget=3", seeds=(0,), rounds=1)


class Faulty(FakeEngine):
    """Has a fault of one strategy, as of a GPU's memory."""

    def infer(self, spec, *rest):
        if spec.strategy == "entropy":
            raise RuntimeError("CUDA out of memory")
        return super().infer(spec, *rest)


def test_a_strategys_fault_of_any_kind_leaves_the_others_running(tmp_path):
    with pytest.raises(StateError, match=r"1 of 3 parts .*seed 0, entropy: RuntimeError: CUDA out of memory"):
        run(tmp_path, "entropy,random", Faulty(), seeds=(0,))
    assert len(list(tmp_path.glob("seed-0/random/round-*/result.json"))) == 4
