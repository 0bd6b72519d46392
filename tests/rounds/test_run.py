"""The step line: what it publishes, and that a killed round goes on after its last complete step."""

import json
from dataclasses import replace

import pytest

from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.errors import RoundCancelled, TooFewAnnotations
from ppal_backend.rounds.evaluation_set import drawn
from ppal_backend.rounds.folder import RoundFolder, claim_project_folder
from ppal_backend.rounds.run import RANK_STEPS, TRAIN_STEPS
from ppal_backend.structures.query import QueryContext
from ppal_backend.structures.round import ModelRef, RoundSpec
from tests.reference import difficulty as reference
from tests.rounds.fakes import SPEC, FakeWorld, Killed, rank_spec

TEST_SET = CocoDataset(
    [CocoImage(501, "/images/501.jpg", 100, 80)],
    [CocoAnnotation(1, 501, 1, (10.0, 10.0, 20.0, 20.0))],
    [CocoCategory(1, "cat"), CocoCategory(2, "dog")],
)


def test_a_round_publishes_every_pool_task_once_query_set_first(tmp_path):
    world = FakeWorld(unreadable=(7001, 7002))
    result = world.run(tmp_path)
    ids = [entry.task_id for entry in world.published[0][1]]
    stored = RoundFolder(tmp_path).read("query_set.json")
    assert sorted(ids) == [*range(1000, 1030), 7001, 7002]
    assert ids[:5] == stored["image_ids"] and len(set(stored["image_ids"])) == 5
    assert set(stored["image_ids"]) <= set(stored["candidate_ids"]) and len(stored["candidate_ids"]) == 10
    assert ids[5:10] == [i for i in stored["candidate_ids"] if i not in stored["image_ids"]]
    assert ids[-2:] == [7001, 7002], "unreadable images belong at the end"
    utilities = dict(stored["utilities"])
    tail = [utilities[i] for i in ids[10:-2]]
    assert tail == sorted(tail, reverse=True)
    assert result.queue == tuple(ids)
    assert (stored["strategy"], stored["options"]) == ("ppal", {"delta": 2.0})


def test_the_result_tells_what_was_used_and_achieved(tmp_path):
    world = FakeWorld()
    result = world.run(tmp_path, replace(SPEC, holdout_fraction=0.2))
    assert (result.version, result.metrics["map"], result.metrics["labelled_images"]) == ("ppal-r1-x", 0.5, 20)
    assert result.model.labels == ("cat", "dog") and result.model.difficulty == (0.2, 0.9)
    assert list(result.seconds) == list(TRAIN_STEPS) == world.steps
    assert world.exported_ids == list(range(1, 21))
    held_out = result.metrics["held_out_images"]
    assert 1 <= held_out <= 10


def test_what_a_training_decided_about_tiles_is_in_its_result(tmp_path, monkeypatch):
    world = FakeWorld()
    plain = world.train

    def train(*args):
        decided = plain(*args)
        return replace(decided, facts={**decided.facts, "slices": None, "why_slices": "boxes are large"})

    monkeypatch.setattr(world, "train", train)
    result = world.run(tmp_path / "1")
    assert (result.metrics["slices"], result.metrics["why_slices"]) == (None, "boxes are large")
    ranked = world.run(tmp_path / "2", rank_spec(result.model))
    assert "slices" not in ranked.metrics


@pytest.mark.parametrize("call", ["export", "prepare", "train", "evaluate", "infer", "publish"])
def test_a_killed_round_goes_on_after_its_last_complete_step(tmp_path, call):
    undisturbed = FakeWorld().run(tmp_path / "a")
    world = FakeWorld()
    world.kill_in = call
    with pytest.raises(Killed):
        world.run(tmp_path / "b")
    before = list(world.calls)
    result = world.run(tmp_path / "b")
    again = [c for c in world.calls[len(before) :] if not c.startswith("progress")]
    assert again[0] == call, "it did something again that was complete, or left something out"
    assert result.queue == undisturbed.queue and len(world.published) == 1


def test_inference_killed_half_way_keeps_whole_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("ppal_backend.rounds.detections_store.DetectionsWriter.__init__.__defaults__", (8,))
    undisturbed = FakeWorld().run(tmp_path / "a")
    world = FakeWorld()
    world.infer_limit = 20
    with pytest.raises(Killed):
        world.run(tmp_path / "b")
    world.infer_limit = 14  # 30 images less two whole shards of 8
    assert world.run(tmp_path / "b").queue == undisturbed.queue


def test_an_interrupted_publish_gets_back_the_state_it_left(tmp_path):
    world = FakeWorld()
    world.kill_in = "publish"
    with pytest.raises(Killed):
        world.run(tmp_path)
    world.run(tmp_path)
    assert world.states == [None, {"version": "ppal-r1-x", "state": "importing"}]


def test_a_finished_round_does_nothing_again(tmp_path):
    world = FakeWorld()
    first = world.run(tmp_path)
    calls = list(world.calls)
    assert world.run(tmp_path) == first
    assert world.calls == calls


def test_without_a_model_the_order_is_random_and_repeatable(tmp_path):
    world = FakeWorld()
    result = world.run(tmp_path / "a", rank_spec())
    assert list(result.seconds) == list(RANK_STEPS)
    assert "infer" not in world.calls and "train" not in world.calls
    assert result.model is None and result.queue != tuple(sorted(result.queue))
    assert FakeWorld().run(tmp_path / "b", rank_spec()).queue == result.queue


@pytest.fixture
def cold():
    """A world whose zoo has weights, and a round that looks at the pool with them."""
    world = FakeWorld()
    world.has_weights = True
    return world, replace(rank_spec(), cold_start="typical")


def test_a_cold_start_takes_typical_images_of_every_kind_and_publishes_no_boxes(cold, tmp_path):
    world, spec = cold
    result = world.run(tmp_path, spec)
    kinds = [(i - 1000) % 6 for i in result.queue[: spec.budget]]
    assert {0, 1, 2} & set(kinds) and {3, 4} & set(kinds), "both dense kinds are among the first"
    stored = json.loads((tmp_path / "query_set.json").read_text())
    assert stored["strategy"] == "typiclust" and len(result.queue) == world.pool_size
    assert result.model is None and world.published[0][0] is None
    assert all(len(entry.detections) == 0 for entry in world.published[0][1])
    assert not (tmp_path / "untrained").exists()


def test_a_cold_start_without_weights_is_random_and_says_so(cold, tmp_path):
    world, spec = cold
    world.has_weights = False
    result = world.run(tmp_path / "a", spec)
    assert json.loads((tmp_path / "a" / "query_set.json").read_text())["strategy"] == "random"
    assert result.queue == FakeWorld().run(tmp_path / "b", rank_spec()).queue


def test_a_cold_start_killed_while_it_looks_goes_on(cold, tmp_path):
    world, spec = cold
    whole = world.run(tmp_path / "whole", spec)
    world.infer_limit = 10
    with pytest.raises(Killed):
        world.run(tmp_path / "cut", spec)
    world.infer_limit = None
    assert world.run(tmp_path / "cut", spec).queue == whole.queue


def test_ranking_with_a_model_trains_nothing(tmp_path):
    model = ModelRef("retinanet_tiny", "/m.pth", ("cat", "dog"), (0.1, 0.1))
    world = FakeWorld()
    result = world.run(tmp_path, rank_spec(model))
    assert world.published[0][0] == model and "train" not in world.calls
    assert result.model == model and all(e.detections is not None for e in world.published[0][1])


def test_too_few_annotated_images_is_a_clear_error(tmp_path):
    with pytest.raises(TooFewAnnotations, match="at least 2 annotated images"):
        FakeWorld(labelled=1).run(tmp_path)


def test_boxes_that_are_all_in_the_evaluation_set_are_told(tmp_path):
    class OneBox(FakeWorld):
        def prepare(self, *args):
            data = super().prepare(*args)
            boxes = [box for box in data.labelled.annotations if box.image_id == self.only]
            return replace(data, labelled=replace(data.labelled, annotations=boxes))

    world = OneBox(labelled=12)
    world.only, *_ = drawn(SPEC.project_key, range(1, 13), 0.4)
    with pytest.raises(TooFewAnnotations, match=r"got \d+ images with 0 boxes beside \d+ images with 1 boxes that are"):
        world.run(tmp_path, replace(SPEC, holdout_fraction=0.4))


def test_an_empty_pool_is_published_as_an_empty_queue(tmp_path):
    world = FakeWorld(pool=0)
    assert world.run(tmp_path).queue == ()
    assert list(world.published[0][1]) == []


def test_a_budget_larger_than_the_pool_takes_the_pool(tmp_path):
    world = FakeWorld(pool=3)
    assert sorted(world.run(tmp_path).queue) == [1000, 1001, 1002]


def test_a_round_told_to_stop_stops_between_steps_and_resumes(tmp_path):
    world = FakeWorld()
    world.stop = True
    with pytest.raises(RoundCancelled, match="before its step 'export'"):
        world.run(tmp_path)
    world.stop = False
    assert world.run(tmp_path).version == "ppal-r1-x"


def test_the_spec_survives_the_trip_to_disk(tmp_path):
    spec = rank_spec(ModelRef("d", "/m.pth", ("a",), (0.5,)))
    folder = RoundFolder(tmp_path)
    folder.write("spec.json", spec.as_dict())
    assert RoundSpec.from_dict(folder.read("spec.json")) == spec


def test_rounds_of_another_project_with_the_same_id_are_moved_aside(tmp_path):
    folder = tmp_path / "1"
    claim_project_folder(folder, "1.1")
    (folder / "rounds").mkdir()
    claim_project_folder(folder, "1.1")
    assert (folder / "rounds").is_dir()
    claim_project_folder(folder, "1.2")
    assert not (folder / "rounds").exists()
    assert len(list(tmp_path.glob("1.replaced-*/rounds"))) == 1


@pytest.mark.parametrize("strategy", ["ppal+labelled", "ppal"])
def test_strategies_that_use_labelled_images_get_the_models_view_of_them(tmp_path, strategy):
    world = FakeWorld()
    world.run(tmp_path, replace(SPEC, strategy=strategy))
    assert world.calls.count("infer") == (2 if strategy == "ppal+labelled" else 1)
    assert (tmp_path / "labelled_detections").exists() == (strategy == "ppal+labelled")


@pytest.mark.parametrize("patience", [None, 2])
def test_what_measures_a_model_reaches_no_training_and_images_to_end_by_are_others(tmp_path, patience):
    """A training that chose its weights by the images it is measured on would look better than it is."""
    seen = {}

    class World(FakeWorld):
        def train(self, spec, labels, files, folder, on_progress, should_stop):
            seen["train"], seen["pool"] = CocoDataset.read(files.train).image_ids, list(files.unlabelled)
            seen["validation"] = () if files.validation is None else CocoDataset.read(files.validation).image_ids
            return super().train(spec, labels, files, folder, on_progress, should_stop)

    World().run(tmp_path, replace(SPEC, holdout_fraction=0.2, patience=patience))
    measured = CocoDataset.read(tmp_path / "dataset" / "val.json").image_ids
    assert measured and not set(measured) & {*seen["train"], *seen["validation"]}
    assert len(seen["validation"]) == (0 if patience is None else 1)
    assert sorted([*measured, *seen["validation"], *seen["train"]]) == list(range(1, 21))
    assert seen["pool"] == [f"/images/{i}.jpg" for i in range(1000, 1030)]


def test_what_a_simulation_evaluates_on_never_reaches_the_training(tmp_path):
    class World(FakeWorld):
        def prepare(self, folder, on_progress):
            return replace(super().prepare(folder, on_progress), evaluation=TEST_SET)

        def train(self, spec, labels, files, folder, on_progress, should_stop):
            assert files.validation is None
            return super().train(spec, labels, files, folder, on_progress, should_stop)

    World().run(tmp_path, replace(SPEC, holdout_fraction=0.0))
    assert CocoDataset.read(tmp_path / "dataset" / "val.json").image_ids == TEST_SET.image_ids


@pytest.mark.parametrize("options", [{}, {"alpha": 0.1, "beta": 1.0}])
def test_weights_of_classes_are_told(tmp_path, options):
    """Those that rank the pool (Eq. 4); the dashboard shows them."""
    FakeWorld().run(tmp_path, replace(SPEC, strategy_options=options))
    told = RoundFolder(tmp_path).facts("candidates")["class_weights"]
    assert list(told) == ["cat", "dog"]
    assert list(told.values()) == pytest.approx(
        [reference.coefficient(d, options.get("alpha", 0.3), options.get("beta", 0.2)) for d in (0.2, 0.9)]
    )


def test_without_difficulty_every_class_weighs_one(tmp_path):
    """Boxes then add their plain entropy to an image's utility."""

    class World(FakeWorld):
        def train(self, *arguments):
            trained = super().train(*arguments)
            return replace(trained, model=replace(trained.model, difficulty=None))

    World().run(tmp_path / "off", replace(SPEC, difficulty=False))
    FakeWorld().run(tmp_path / "entropy", replace(SPEC, strategy="entropy+ccms"))
    off, entropy = (
        dict(RoundFolder(tmp_path / name).read("query_set.json")["utilities"]) for name in ("off", "entropy")
    )
    assert off == entropy and max(off.values()) > 0
    assert "class_weights" not in RoundFolder(tmp_path / "off").facts("candidates")


@pytest.mark.parametrize("now", [("cat", "dog", "bird"), ("dog", "cat"), ("cat",)])
def test_labelled_boxes_are_counted_by_the_labels_of_the_model(tmp_path, monkeypatch, now):
    """The labeling config has other labels since the model in force was trained."""
    seen = []

    class Relabelled(FakeWorld):
        def prepare(self, *args):
            data = super().prepare(*args)
            categories = [CocoCategory(n, label) for n, label in enumerate(now, 1)]
            rows = [replace(row, category_id=1) for row in data.labelled.annotations]
            return replace(data, labelled=CocoDataset(data.labelled.images, rows, categories), labels=now)

    class Seen(QueryContext):
        def __post_init__(self):
            super().__post_init__()
            seen.append(self.class_counts.tolist())

    (tmp_path / "model.pth").write_bytes(b"weights")
    monkeypatch.setattr("ppal_backend.rounds.run.QueryContext", Seen)
    model = ModelRef("retinanet_tiny", str(tmp_path / "model.pth"), ("cat", "dog"), (0.2, 0.9))
    Relabelled().run(tmp_path / "round", replace(rank_spec(model), strategy="dfreq"))
    assert seen[0] == ([0, 20] if now[0] == "dog" else [20, 0])
