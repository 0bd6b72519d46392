"""What runs on a node: clear words where a folder is not shared, progress and the wish to stop on their way."""

import pickle
from pathlib import Path

import pytest

from ppal_backend.engines.ray import node
from ppal_backend.engines.ray.node import FileStamp, Line, LocalOptions, Mailbox, Shard, run_step
from ppal_backend.errors import CheckpointError, DetectorError, ImageError
from ppal_backend.rounds.ports import PoolEntry
from ppal_backend.structures.round import Progress


class PlayedEngine:
    def __init__(self, *arguments):
        self.made_with = arguments

    def train(self, spec, on_progress, should_stop):
        on_progress(Progress("train", 1, 2))
        return f"{spec} stopped: {should_stop()}"

    def evaluate(self, spec):
        return {"map": 0.5, "spec": spec}


@pytest.fixture
def options(monkeypatch):
    monkeypatch.setattr(node, "LocalEngine", PlayedEngine)
    return LocalOptions()


def test_a_step_is_a_method_of_the_local_engine(options, tmp_path):
    marker = tmp_path / ".seen-1"
    marker.touch()
    mailbox = Mailbox()
    line = Line(mailbox.post, mailbox.is_stopped)
    assert run_step(options, str(marker), "evaluate", ["spec"], None) == {"map": 0.5, "spec": "spec"}
    assert run_step(options, str(marker), "train", ["spec"], line) == "spec stopped: False"
    assert mailbox.take() == [Progress("train", 1, 2)] and mailbox.take() == []


def test_a_node_without_the_rounds_folder_says_so(options, tmp_path):
    with pytest.raises(DetectorError, match=r"expected the folder /nowhere/train .* share MODEL_DIR"):
        run_step(options, "/nowhere/train/.seen-1", "train", ["spec"], None)


def test_a_node_without_the_operators_detectors_says_so(tmp_path):
    with pytest.raises(DetectorError, match="expected the operator's detectors in /nowhere/zoo"):
        LocalOptions(Path("/nowhere/zoo")).engine()


def test_the_engine_on_a_node_has_the_operators_options(monkeypatch, tmp_path):
    monkeypatch.setattr(node, "LocalEngine", PlayedEngine)
    options = (tmp_path, 3, 2, "mlflow", tmp_path / "weights")
    assert LocalOptions(*options).engine().made_with == options


def test_a_wish_to_stop_is_heard_within_half_a_second_and_asked_for_no_oftener(monkeypatch):
    clock, mailbox, asked = [100.0], Mailbox(), []
    monkeypatch.setattr(node.time, "monotonic", lambda: clock[0])
    line = Line(mailbox.post, lambda: asked.append(clock[0]) or mailbox.is_stopped())
    answers = []
    for step in range(20):
        clock[0] = 100.0 + step / 10
        if step == 7:
            mailbox.ask_to_stop()
        answers.append(line.should_stop())
    assert answers == [False] * 10 + [True] * 10 and asked == [100.0, 100.5, 101.0, 101.5]


def test_a_shard_knows_its_files(tmp_path):
    (tmp_path / "1.png").write_bytes(b"image")
    entries = [PoolEntry(n, str(tmp_path / f"{n}.png"), 4, 4) for n in (1, 2)]
    shard = Shard.of(entries)
    assert shard.entries == tuple(entries) and [file.size for file in shard.files] == [5, -1]
    assert shard.files[0] == FileStamp.of(entries[0].path)


@pytest.mark.parametrize("error", [CheckpointError("damaged"), ImageError("cut off")])
def test_errors_survive_the_way_back(error):
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error)
