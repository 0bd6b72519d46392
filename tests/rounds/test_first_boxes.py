"""Round 0: the zoo's detector orders the pool as it is, in the one step line that every round goes through."""

import shutil
import uuid
from dataclasses import replace

import numpy as np
import pytest

from ppal_backend.errors import CheckpointError, WeightsUnavailable
from ppal_backend.rounds.bucket import Bucket
from ppal_backend.rounds.folder import RoundFolder, Rounds, need_intact
from ppal_backend.rounds.ports import Inferred, Ports
from ppal_backend.rounds.run import AS_IS_STEPS, RANK_STEPS, run_round, steps_of
from ppal_backend.settings import load_settings
from ppal_backend.structures.round import STRATEGY_NAMES, ModelRef, RoundSpec
from tests.rounds.fakes import FakeWorld, Killed, rank_spec

SPEC = replace(rank_spec(), number=0, known={"cat": ["cat"]})


def test_boxes_are_published_and_order_the_pool(tmp_path):
    world = FakeWorld(labelled=0)
    result = world.run(tmp_path, SPEC)
    model, queue = world.published[0]
    assert world.steps == list(AS_IS_STEPS) and "train" not in world.calls and "evaluate" not in world.calls
    assert model == result.model and model.labels == ("cat", "dog") and model.difficulty is None
    assert model.checkpoint == str(tmp_path / "adopt" / "as_is.pth")
    assert any(len(entry.detections) for entry in queue)
    assert world.known == {"cat": ["cat"]} and result.metrics["known"] == {"cat": ["cat"]}
    ranked = RoundFolder(tmp_path).read("query_set.json")
    assert ranked["strategy"] == "ppal" and len(ranked["image_ids"]) == 5
    assert any(utility > 0 for _, utility in ranked["utilities"])


class Describing(FakeWorld):
    """Detections with all that any strategy reads of them."""

    def infer(self, *arguments):
        for item in super().infer(*arguments):
            found, vector = item.detections, item.features["global"]
            probs = np.full((len(found), 2), 0.1, np.float32)
            probs[np.arange(len(found)), found.class_indices] = found.scores
            counted = np.ones(len(found), np.int64)
            detections = replace(found, class_probs=probs, softmax=False, pre_nms_counts=counted, image_size=(100, 80))
            yield Inferred(detections, {"global": vector, "fpn": vector})


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_every_strategy_orders_a_pool_without_a_labelled_image(tmp_path, strategy):
    world = Describing(labelled=0)
    result = world.run(tmp_path, replace(SPEC, strategy=strategy))
    assert sorted(result.queue) == list(range(1000, 1030))


def test_without_known_labels_or_with_a_model_nothing_is_adopted():
    model = ModelRef("retinanet_tiny", "/m.pth", ("cat", "dog"))
    for spec in (rank_spec(), replace(SPEC, known={}), replace(SPEC, model=model)):
        assert steps_of(spec) == RANK_STEPS
    assert "adopt" not in steps_of(replace(SPEC, kind="train"))
    assert RoundSpec.from_dict(SPEC.as_dict()) == SPEC


@pytest.mark.parametrize("error", [WeightsUnavailable("they are missing: get them"), CheckpointError("no classes")])
def test_weights_that_cannot_be_had_are_told_and_the_pool_is_ordered_all_the_same(tmp_path, error):
    world = FakeWorld(labelled=0)
    world.as_is_error = error
    result = world.run(tmp_path, SPEC)
    told = world.problems["first boxes"]
    assert str(error) in told and "retinanet_tiny knows cat" in told and "ppal round 1 --rank" in told
    assert result.model is None and world.published[0][0] is None and len(result.queue) == 30
    assert not any(entry.detections is not None and len(entry.detections) for entry in world.published[0][1])


def test_the_problem_is_taken_back_by_the_next_round(tmp_path):
    world = FakeWorld()
    world.as_is_error = CheckpointError("no classes")
    world.run(tmp_path / "0", SPEC)
    assert world.problems["first boxes"]
    world.run(tmp_path / "1", replace(SPEC, kind="train", number=1))
    assert world.problems["first boxes"] == ""


def test_an_empty_pool_and_labels_that_went_away_since_adopt_nothing(tmp_path):
    world = FakeWorld(labelled=0, pool=0)
    assert world.run(tmp_path / "empty", SPEC).model is None
    world = FakeWorld(labelled=0)
    assert world.run(tmp_path / "gone", replace(SPEC, known={"zebra": ["zebra"]})).model is None
    assert "as_is" not in world.calls and world.problems["first boxes"] == ""


@pytest.mark.parametrize("call", ["export", "prepare", "as_is", "infer", "publish"])
def test_a_killed_round_goes_on_after_its_last_complete_step(tmp_path, call):
    undisturbed = FakeWorld(labelled=0).run(tmp_path / "a", SPEC)
    world = FakeWorld(labelled=0)
    world.kill_in = call
    with pytest.raises(Killed):
        world.run(tmp_path / "b", SPEC)
    before = list(world.calls)
    result = world.run(tmp_path / "b", SPEC)
    again = [c for c in world.calls[len(before) :] if not c.startswith("progress")]
    assert again[0] == call and result.queue == undisturbed.queue and len(world.published) == 1
    assert result.model.checkpoint == str(tmp_path / "b" / "adopt" / "as_is.pth")


def test_a_damaged_checkpoint_is_noticed_and_made_again(tmp_path):
    world = FakeWorld(labelled=0)
    world.kill_in = "publish"
    with pytest.raises(Killed):
        world.run(tmp_path, SPEC)
    (tmp_path / "adopt" / "as_is.pth").write_bytes(b"other")
    with pytest.raises(Exception, match="damaged"):
        need_intact(tmp_path / "adopt" / "as_is.pth", "ppal-r0")
    folder = RoundFolder(tmp_path)
    assert folder.repair() == ["adopt", "infer", "candidates", "query"]
    assert not (tmp_path / "adopt").exists()
    assert world.run(tmp_path, SPEC).model is not None and world.calls.count("as_is") == 2


def test_another_machine_takes_up_round_0_and_gets_its_checkpoint(tmp_path):
    """Machines share a bucket and no disk: the published detector travels with the round."""
    bucket = Bucket(f"memory://{uuid.uuid4().hex}", lambda _: None)

    def rounds(machine):
        return Rounds(load_settings(MODEL_DIR=tmp_path / machine), bucket)

    def attempt(machine, world, first):
        folder = rounds(machine).open("1.1", 1, 0, "1.now", first)
        return run_round(SPEC, folder, Ports(world, world, world, world))

    world = FakeWorld(labelled=0)
    world.kill_in = "infer"
    with pytest.raises(Killed):
        attempt("a", world, True)
    shutil.rmtree(tmp_path / "a")
    world = FakeWorld(labelled=0)
    result = attempt("b", world, False)
    there = tmp_path / "b" / "projects" / "1" / "rounds" / "0" / "adopt" / "as_is.pth"
    assert "as_is" not in world.calls and result.model.checkpoint == str(there)
    fetched = rounds("c").fetch_checkpoint("1.1", "projects/1/rounds/0/adopt/as_is.pth")
    assert fetched.read_bytes() == b"published weights" and fetched.is_relative_to(tmp_path / "c")
