"""What a round left on disk is checked before it is used again; what is damaged is done again, no more and no less."""

import json

import pytest

from ppal_backend.errors import LeaseLost, OutOfSpace, StateError
from ppal_backend.files import is_full, sha256_of
from ppal_backend.rounds.folder import OUTPUTS, RoundFolder, need_intact, need_space
from ppal_backend.rounds.run import AS_IS_STEPS, TRAIN_STEPS
from tests.rounds.fakes import FakeWorld, Killed

DAMAGE = {
    "export": ("export/annotated.json", TRAIN_STEPS),
    "dataset": ("dataset/train.json", TRAIN_STEPS[1:]),
    "train": ("train/model.pth", TRAIN_STEPS[2:]),
    "evaluate": ("metrics.json", TRAIN_STEPS[3:]),
    "infer": ("detections/shard-00000.npz", TRAIN_STEPS[4:]),
    "candidates": ("candidates.json", TRAIN_STEPS[5:]),
    "query": ("query_set.json", TRAIN_STEPS[6:]),
}


def killed_before_publishing(path):
    world = FakeWorld()
    world.kill_in = "publish"
    with pytest.raises(Killed):
        world.run(path)
    world.steps.clear()
    return world


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_steps_and_their_outputs_are_the_ones_of_a_round():
    assert [step for step in OUTPUTS if step != "adopt"] == list(TRAIN_STEPS)
    assert [step for step in OUTPUTS if step in AS_IS_STEPS] == list(AS_IS_STEPS)


def test_every_file_a_step_leaves_is_in_its_mark(tmp_path):
    FakeWorld().run(tmp_path)
    sums = {}
    for step in TRAIN_STEPS[:-1]:
        mark = json.loads((tmp_path / "steps" / f"{step}.json").read_text())["sha256"]
        assert mark, f"step {step} left nothing"
        sums |= mark
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    left_out = {f for f in files if f.startswith("steps/")} | {"spec.json", "publish.json"}
    assert set(sums) == files - left_out
    assert all(sha256_of(tmp_path / name) == digest for name, digest in sums.items())


@pytest.mark.parametrize("how", ["flipped", "gone"])
@pytest.mark.parametrize("step", DAMAGE)
def test_a_damaged_artifact_is_done_again_with_all_that_came_of_it(tmp_path, step, how):
    undisturbed = FakeWorld().run(tmp_path / "a")
    world = killed_before_publishing(tmp_path / "b")
    name, again = DAMAGE[step]
    flip_a_byte(tmp_path / "b" / name) if how == "flipped" else (tmp_path / "b" / name).unlink()
    assert world.run(tmp_path / "b").queue == undisturbed.queue
    assert tuple(world.steps) == again
    assert RoundFolder(tmp_path / "b").repair() == []


def test_a_training_done_again_starts_from_nothing(tmp_path):
    world = killed_before_publishing(tmp_path)
    (tmp_path / "train" / "request.json").write_text("{}")
    flip_a_byte(tmp_path / "dataset" / "pool.json")
    RoundFolder(tmp_path).repair()
    assert not (tmp_path / "train").exists(), "the finished training was of other data"
    assert world.run(tmp_path).version == "ppal-r1-x"


def test_undamaged_detections_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("ppal_backend.rounds.detections_store.DetectionsWriter.__init__.__defaults__", (8,))
    undisturbed = FakeWorld().run(tmp_path / "a")
    world = killed_before_publishing(tmp_path / "b")
    flip_a_byte(tmp_path / "b" / "detections" / "shard-00001.npz")
    world.infer_limit = 8  # more would be images of the three undamaged shards
    assert sorted(world.run(tmp_path / "b").queue) == sorted(undisturbed.queue)


def test_a_damaged_shard_of_an_unfinished_inference_is_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr("ppal_backend.rounds.detections_store.DetectionsWriter.__init__.__defaults__", (8,))
    undisturbed = FakeWorld().run(tmp_path / "a")
    world = FakeWorld()
    world.infer_limit = 20
    with pytest.raises(Killed):
        world.run(tmp_path / "b")
    flip_a_byte(tmp_path / "b" / "detections" / "shard-00000.npz")
    world.infer_limit = 22  # 8 of the damaged shard, 14 that were missing
    assert sorted(world.run(tmp_path / "b").queue) == sorted(undisturbed.queue)
    assert len(list((tmp_path / "b" / "detections").glob("*.npz"))) == 4


def test_half_an_inference_of_a_model_that_is_gone_is_not_kept(tmp_path, monkeypatch):
    """Shards of the discarded model counted as done, and the queue mixed two models."""
    monkeypatch.setattr("ppal_backend.rounds.detections_store.DetectionsWriter.__init__.__defaults__", (8,))
    world = FakeWorld()
    world.infer_limit = 20
    with pytest.raises(Killed):
        world.run(tmp_path)
    assert len(list((tmp_path / "detections").glob("*.npz"))) == 2
    flip_a_byte(tmp_path / "train" / "model.pth")
    assert RoundFolder(tmp_path).repair() == ["train", "evaluate"]
    assert not list((tmp_path / "detections").glob("*.npz"))
    world.infer_limit = 30  # every image of the pool
    assert len(world.run(tmp_path).queue) == 30


def test_a_round_that_is_lost_writes_to_nobody(tmp_path):
    world = FakeWorld()
    world.lost = True
    with pytest.raises(LeaseLost):
        world.run(tmp_path)
    assert world.published == [] and not (tmp_path / "publish.json").exists()


def test_damaged_marks_and_notes_are_no_dead_end(tmp_path):
    world = killed_before_publishing(tmp_path)
    (tmp_path / "steps" / "query.json").write_text("{")
    (tmp_path / "publish.json").write_text("\x00\x00")
    (tmp_path / "spec.json").write_text("")
    world.run(tmp_path)
    assert world.steps == ["query", "publish"] and world.states[-1] is None


def test_what_is_published_is_not_done_again_for_files_nobody_needs_any_more(tmp_path):
    world = FakeWorld()
    first = world.run(tmp_path)
    world.steps.clear()
    flip_a_byte(tmp_path / "detections" / "shard-00000.npz")
    assert world.run(tmp_path) == first and world.steps == []


def test_marks_from_before_there_were_checksums_are_believed(tmp_path):
    world = killed_before_publishing(tmp_path)
    for path in (tmp_path / "steps").glob("*.json"):
        mark = json.loads(path.read_text())
        del mark["sha256"]
        path.write_text(json.dumps(mark))
    world.run(tmp_path)
    assert world.steps == ["publish"]


def test_a_checkpoint_is_held_against_the_sum_of_its_training(tmp_path):
    FakeWorld().run(tmp_path / "1")
    checkpoint = tmp_path / "1" / "train" / "model.pth"
    need_intact(checkpoint, "v1")
    flip_a_byte(checkpoint)
    with pytest.raises(StateError, match="the file is damaged; train again"):
        need_intact(checkpoint, "v1")
    checkpoint.unlink()
    with pytest.raises(StateError, match="got no file; train again"):
        need_intact(checkpoint, "v1")


def test_too_little_space_names_the_figures_and_what_to_do(tmp_path):
    need_space(tmp_path, 0.0)
    with pytest.raises(OutOfSpace, match=r"expected at least 1e\+09 GiB free for .*; free some \(ppal prune"):
        need_space(tmp_path, 1e9)


def test_a_full_disk_is_known_by_its_errors():
    wrapped = ValueError("could not save")
    wrapped.__cause__ = OSError(28, "No space left on device")
    torch_says = RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file data/1")
    assert is_full(OSError(28, "x")) and is_full(OSError(122, "quota")) and is_full(wrapped) and is_full(torch_says)
    assert not is_full(OSError(13, "denied")) and not is_full(RuntimeError("x")) and not is_full(None)
