"""The local engine: what of a round reaches a training, and a project that changes its detector between rounds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ppal_backend.datasets.coco import CocoDataset
from ppal_backend.detector.train.training import TrainResult
from ppal_backend.engines.local import LocalEngine
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import PoolEntry, Ports, PreparedData, TrainingFiles
from ppal_backend.rounds.run import run_round
from ppal_backend.structures.round import ModelRef
from tests.detector.shapes import CLASSES, write_set
from tests.rounds.fakes import SPEC, FakeWorld

MODEL = ModelRef("retinanet_tiny", "/models/1.pth", CLASSES, (0.5, 0.5, 0.5))


@pytest.fixture
def asked(monkeypatch):
    """Requests that reach the training, which does nothing."""
    requests = []

    def train(request, on_progress, should_stop):
        requests.append(request)
        return TrainResult(Path("/models/2.pth"), None, 7, 0.5, 1.0, best_step=5, best_map=0.4)

    monkeypatch.setattr("ppal_backend.detector.train.training.train", train)
    return requests


def request_of(asked, spec, engine=None, files=None):
    trained = (engine or LocalEngine()).train(
        spec, CLASSES, files or TrainingFiles(Path("train.json")), Path("work"), lambda _: None, lambda: False
    )
    return asked[-1], trained


@pytest.mark.parametrize(
    ("spec", "start"),
    [
        (SPEC, None),
        (replace(SPEC, init_weights="random", model=MODEL), "random"),
        (replace(SPEC, init_weights="last", model=MODEL), "/models/1.pth"),
        (replace(SPEC, init_weights="last"), None),
        (replace(SPEC, init_weights="last", model=MODEL, detector="fcos_tiny"), None),
        (replace(SPEC, init_weights="zoo", model=MODEL), None),
    ],
)
def test_a_training_starts_where_the_round_says(asked, spec, start):
    assert request_of(asked, spec)[0].init_weights == start


def test_the_options_of_a_round_and_a_machine_reach_the_training(asked):
    spec = replace(
        SPEC, difficulty=False, patience=3, deterministic=True, mixed_precision=False, difficulty_options={"xi": 0.4}
    )
    files = TrainingFiles(Path("train.json"), Path("held_out.json"), ["/pool/1.jpg"])
    request, trained = request_of(
        asked, spec, LocalEngine(processes=2, tracking="mlflow", weights_dir=Path("w")), files
    )
    assert (request.difficulty, request.patience, request.deterministic, request.xi) == (False, 3, True, 0.4)
    assert (request.processes, request.tracking, request.unlabelled) == (2, "mlflow", ("/pool/1.jpg",))
    assert request.weights_dir == Path("w") and not request.mixed_precision
    assert (request.train_json, request.val_json) == (Path("train.json"), Path("held_out.json"))
    assert trained.facts == {"iterations": 7, "loss": 0.5, "best_step": 5}
    plain = request_of(asked, SPEC)[0]
    assert (plain.difficulty, plain.patience, plain.processes, plain.val_json) == (True, None, 1, None)


def test_a_strategy_that_changes_the_detector_reaches_the_training(asked):
    assert request_of(asked, replace(SPEC, strategy="learnloss"))[0].rival == "learnloss"
    assert request_of(asked, SPEC)[0].rival is None


def test_slices_reach_the_training_and_what_it_decided_is_a_fact(monkeypatch, asked):
    assert request_of(asked, replace(SPEC, slices="auto"))[0].slices == "auto"
    assert request_of(asked, SPEC)[0].slices == "off"
    decided = TrainResult(Path("/models/2.pth"), None, 7, 0.5, 1.0, slices=416, why_slices="boxes are small")
    monkeypatch.setattr("ppal_backend.detector.train.training.train", lambda *_: decided)
    _, trained = request_of([None], replace(SPEC, slices=416))
    assert trained.facts == {"iterations": 7, "loss": 0.5, "slices": 416, "why_slices": "boxes are small"}


class Shapes(FakeWorld):
    """Real images of shapes: twelve labelled ones and four in the pool."""

    def __init__(self, folder):
        super().__init__()
        self._labelled = CocoDataset.read(write_set(folder / "labelled", 12))
        self._pool = json.loads(write_set(folder / "pool", 4, seed=1, first_id=101).read_text())["images"]

    def prepare(self, folder, on_progress):
        pool = [PoolEntry(i["id"], i["file_name"], i["width"], i["height"]) for i in self._pool]
        return PreparedData(self._labelled, pool, CLASSES, {})


def test_a_project_changes_its_detector_between_rounds(tmp_path):
    world, engine = Shapes(tmp_path), LocalEngine()
    ports = Ports(world, engine, world, world)
    spec = replace(SPEC, detector="retinanet_tiny", budget=2, max_iterations=2, device="cpu", init_weights="last")
    first = run_round(spec, RoundFolder(tmp_path / "1"), ports)
    switched = replace(spec, number=2, detector="fcos_tiny", model=first.model)
    second = run_round(switched, RoundFolder(tmp_path / "2"), ports)
    assert (first.model.detector, second.model.detector) == ("retinanet_tiny", "fcos_tiny")
    assert sorted(second.queue) == [101, 102, 103, 104] and len(second.model.difficulty) == len(CLASSES)
    rank = replace(spec, number=3, kind="rank", detector="fcos_tiny", model=first.model)
    back = run_round(rank, RoundFolder(tmp_path / "3"), ports)
    assert back.model == first.model and back.queue == first.queue, "the old version predicts as it did"
    third = replace(spec, number=4, detector="retinanet_tiny", model=first.model)
    again = run_round(third, RoundFolder(tmp_path / "4"), ports)
    noted = json.loads((tmp_path / "4" / "train" / "request.json").read_text())
    assert noted["init_weights"] == first.model.checkpoint and again.model.detector == "retinanet_tiny"
