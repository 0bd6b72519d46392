"""The best weights on held-out images: which are kept, when training ends, and what a resumed one knows of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ppal_backend.detector.train.training import TrainRequest, TrainResult, evaluate, train
from ppal_backend.detector.train.validation import validation_steps
from ppal_backend.detector.weights import load_checkpoint
from ppal_backend.errors import RoundCancelled
from ppal_backend.structures.round import Progress
from tests.detector.shapes import CLASSES, write_set

State = dict[str, torch.Tensor]


@pytest.fixture
def request_(request_: TrainRequest, test_json: Path) -> TrainRequest:
    """Sixteen steps of four images with eight held-out ones: time for two evaluations, after steps 8 and 16."""
    return replace(request_, val_json=test_json, max_iterations=16)


@pytest.fixture(scope="module")
def plain(zoo_root: Path, train_json: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The same sixteen steps without held-out images."""
    folder = tmp_path_factory.mktemp("plain")
    return train(TrainRequest("small", CLASSES, train_json, None, folder, 3, "cpu", "random", 16, zoo_root=zoo_root))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[State]]:
    """Gives evaluations in order, and returns the weights that were evaluated."""

    def script(*values: float) -> list[State]:
        seen: list[State] = []
        rest: Iterator[float] = iter(values)

        def evaluate(model: torch.nn.Module) -> float:
            assert not model.training
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
            return next(rest)

        monkeypatch.setattr("ppal_backend.detector.train.attempt._evaluation", lambda *_: evaluate)
        return seen

    return script


def weights_of(result: TrainResult) -> State:
    return dict(load_checkpoint(result.checkpoint)["state_dict"])


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("total", "batch", "images", "steps"),
    [
        (300, 16, 40, (75, 150, 225, 300)),
        (16, 4, 8, (8, 16)),
        (100, 4, 33, (33, 67, 100)),
        (15, 4, 8, ()),
        (300, 16, 0, ()),
        (2, 1000, 1, (1, 2)),
    ],
)
def test_evaluations_are_few_and_cost_little(total: int, batch: int, images: int, steps: tuple[int, ...]) -> None:
    assert validation_steps(total, batch, images) == steps
    assert len(steps) * images * 4 <= total * batch


def test_the_best_weights_are_kept_and_the_difficulty_of_the_end(
    request_: TrainRequest, plain: TrainResult, scripted: Callable[..., list[State]]
) -> None:
    seen = scripted(0.5, 0.2)
    result = train(request_)
    assert (result.best_step, result.best_map, result.iterations) == (8, 0.5, 16)
    assert same(weights_of(result), seen[0]) and not same(seen[0], seen[1])
    assert result.difficulty == plain.difficulty
    assert not (Path(request_.work_dir) / "best.pth").exists()


def test_of_equal_weights_the_later_ones_are_kept(request_: TrainRequest, scripted: Callable[..., list[State]]) -> None:
    seen = scripted(0.5, 0.5)
    result = train(request_)
    assert result.best_step == 16 and same(weights_of(result), seen[1])


def test_evaluating_leaves_the_training_as_it_was(request_: TrainRequest, plain: TrainResult) -> None:
    """Real evaluations."""
    seen: list[Progress] = []
    result = train(request_, seen.append)
    assert result.best_step == 16 and same(weights_of(result), weights_of(plain))
    assert (result.difficulty, result.final_loss) == (plain.difficulty, plain.final_loss)
    assert "mAP 0.0" in seen[-1].detail and "on held-out images" in seen[-1].detail


def test_the_map_of_the_kept_weights_is_what_an_evaluation_says(
    request_: TrainRequest, trained: TrainResult, test_json: Path, zoo_root: Path
) -> None:
    result = train(replace(request_, init_weights=trained.checkpoint, classes=CLASSES))
    again = evaluate("small", result.checkpoint, CLASSES, test_json, "cpu", zoo_root=zoo_root)
    assert result.best_map is not None and again.map is not None and again.map > 0
    assert result.best_map == pytest.approx(again.map, abs=1e-4)


def test_training_ends_early_when_nothing_gets_better(
    request_: TrainRequest, scripted: Callable[..., list[State]]
) -> None:
    seen = scripted(0.5, 0.2, 0.9, 0.9)
    result = train(replace(request_, max_iterations=32, patience=1))
    assert (result.best_step, result.iterations, len(seen)) == (8, 16, 2)
    assert same(weights_of(result), seen[0])


def test_patience_counts_from_the_best(request_: TrainRequest, scripted: Callable[..., list[State]]) -> None:
    scripted(0.5, 0.2, 0.9, 0.1)
    assert train(replace(request_, max_iterations=32, patience=2)).best_step == 24


def stop_after(steps: int) -> Any:
    polls = iter(range(1, 10_000))
    return lambda: next(polls) >= steps


def test_a_resumed_training_knows_the_best_so_far(
    request_: TrainRequest, plain: TrainResult, scripted: Callable[..., list[State]]
) -> None:
    seen = scripted(0.5)
    with pytest.raises(RoundCancelled):
        train(request_, should_stop=stop_after(12))
    again = scripted(0.2)
    result = train(request_)
    assert (result.best_step, result.best_map, len(again)) == (8, 0.5, 1)
    assert same(weights_of(result), seen[0])
    assert result.difficulty == plain.difficulty


def test_a_training_that_was_to_end_ends_when_resumed(
    request_: TrainRequest, scripted: Callable[..., list[State]]
) -> None:
    """Killed between the last evaluation and the final checkpoint: no further step."""
    scripted(0.5, 0.2)
    longer = replace(request_, max_iterations=32, patience=1)
    with pytest.raises(RoundCancelled):
        train(longer, should_stop=stop_after(16))
    result = train(longer)
    assert (result.best_step, result.iterations) == (8, 16)


def test_another_request_does_not_inherit_the_best(
    request_: TrainRequest, scripted: Callable[..., list[State]]
) -> None:
    scripted(0.9)
    with pytest.raises(RoundCancelled):
        train(request_, should_stop=stop_after(8))
    (Path(request_.work_dir) / "iter_8.pth").unlink()
    seen = scripted(0.1, 0.3)
    result = train(replace(request_, seed=4))
    assert (result.best_step, result.best_map) == (16, 0.3) and same(weights_of(result), seen[1])


def test_held_out_images_without_boxes_choose_nothing(
    request_: TrainRequest, plain: TrainResult, tmp_path: Path
) -> None:
    empty = write_set(tmp_path / "empty", 4, empty_every=1)
    result = train(replace(request_, val_json=empty))
    assert result.best_step is None and same(weights_of(result), weights_of(plain))


KILLED = """
import os, signal, sys
from pathlib import Path
import ppal_backend.detector.train.hooks as hooks
from ppal_backend.detector.train.training import TrainRequest, train
from tests.detector.shapes import CLASSES

def at_step_forty(progress):
    if progress.done >= 40:
        os.kill(os.getpid(), signal.SIGKILL)

hooks._REPORT_EVERY_S = 0.0
data, held_out, work, zoo = (Path(item) for item in sys.argv[1:5])
train(TrainRequest("small", CLASSES, data, held_out, work, 3, "cpu", "random", zoo_root=zoo), at_step_forty)
"""


@pytest.mark.slow
def test_a_killed_training_ends_with_the_same_best_weights_and_difficulty(
    request_: TrainRequest, train_json: Path, test_json: Path, zoo_root: Path, tmp_path: Path
) -> None:
    """Killed at step 40 of 60, with evaluations after 15 and 30 and a checkpoint of step 25."""
    whole = replace(request_, max_iterations=None)
    command = [sys.executable, "-c", KILLED, *map(str, (train_json, test_json, whole.work_dir, zoo_root))]
    killed = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = sorted(path.name for path in Path(whole.work_dir).glob("*.pth"))
    assert left == ["best.pth", "iter_25.pth"]
    steps: list[int] = []
    resumed = train(whole, lambda progress: steps.append(progress.done))
    undisturbed = train(replace(whole, work_dir=tmp_path / "undisturbed"))
    assert min(steps) == 26
    assert (resumed.best_step, resumed.best_map) == (undisturbed.best_step, undisturbed.best_map)
    assert same(weights_of(resumed), weights_of(undisturbed))
    assert resumed.difficulty == undisturbed.difficulty and resumed.final_loss == undisturbed.final_loss
