"""Two processes over gloo: the same difficulty as one, errors and cancelling that reach the caller, one writer."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ppal_backend.detector.train.distributed import check_processes
from ppal_backend.detector.train.training import TrainRequest, train
from ppal_backend.detector.weights import load_checkpoint
from ppal_backend.errors import DetectorError, ImageError, OutOfMemory, RoundCancelled
from ppal_backend.structures.round import Progress
from tests.detector.conftest import REPOSITORY, zoo_entry
from tests.detector.shapes import write_set

CONFIG = """
_base_ = [{base!r}]
model = dict(backbone=dict(norm_eval=True))
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=0.01, momentum=0.9))
"""


@pytest.fixture(scope="module")
def zoo(zoo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Detectors, one for which half a batch in each of two processes is the same as a whole one in one.

    Its batch statistics are fixed, since those of half a batch are others. The optimiser is SGD, since Adam divides by
    small gradients and so magnifies the rounding of a sum in another order.
    """
    root = tmp_path_factory.mktemp("zoo")
    text = (zoo_root / "zoo.toml").read_text()
    (root / "small.py").write_text((zoo_root / "small.py").read_text())
    (root / "fcos_tiny.py").write_text(CONFIG.format(base=str(REPOSITORY / "model_zoo" / "fcos_tiny" / "config.py")))
    (root / "zoo.toml").write_text(text + zoo_entry("fcos_tiny", "dense"))
    return root


@pytest.fixture
def request_(request_: TrainRequest, zoo: Path, tmp_path: Path) -> TrainRequest:
    return replace(request_, work_dir=tmp_path / "two", zoo_root=zoo, processes=2)


def start_of(detector: str, request: TrainRequest, folder: Path) -> Path:
    """Weights to start from: only with some are the statistics of a backbone fixed."""
    short = replace(request, detector=detector, processes=1, max_iterations=1, work_dir=folder)
    return train(short).checkpoint


@pytest.mark.slow
def test_two_processes_learn_what_one_does(request_: TrainRequest, tmp_path: Path) -> None:
    start = start_of("fcos_tiny", request_, tmp_path / "start")
    wanted = replace(request_, detector="fcos_tiny", init_weights=start)
    one = train(replace(wanted, processes=1, work_dir=tmp_path / "one"))
    seen: list[Progress] = []
    two = train(wanted, seen.append)
    assert one.difficulty is not None and two.difficulty is not None
    assert max(abs(a - b) for a, b in zip(one.difficulty, two.difficulty, strict=True)) < 1e-6
    assert max(two.difficulty) < 0.9999
    assert two.final_loss == pytest.approx(one.final_loss, rel=1e-6)
    a, b = (load_checkpoint(result.checkpoint)["state_dict"] for result in (one, two))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name].float(), b[name].float(), atol=1e-6) for name in a)
    assert seen[-1].done == 6
    assert sorted(path.name for path in Path(wanted.work_dir).iterdir()) == [
        "config.json",
        "final.pth",
        "request.json",
        "train.log",
    ]


@pytest.mark.slow
def test_a_cancelled_training_of_two_goes_on_with_one(request_: TrainRequest, tmp_path: Path) -> None:
    steps: list[int] = []
    wanted = replace(request_, max_iterations=60, val_json=write_set(tmp_path / "held_out", 2))

    def note(progress: Progress) -> None:
        if "mAP" in progress.detail:
            steps.append(progress.done)

    with pytest.raises(RoundCancelled, match="asked to stop"):
        train(wanted, note, lambda: bool(steps))
    assert min(steps) >= 15 and (Path(request_.work_dir) / "best.pth").is_file()
    (left,) = Path(request_.work_dir).glob("iter_*.pth")
    begun = int(left.stem.removeprefix("iter_"))
    later: list[int] = []
    result = train(replace(wanted, processes=1), lambda p: later.append(p.done))
    assert result.iterations == 60 and min(later) == begun + 1
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_the_error_of_any_process_reaches_the_caller(request_: TrainRequest, tmp_path: Path) -> None:
    gone = write_set(tmp_path / "gone", 4)
    (tmp_path / "gone" / "2.png").unlink()
    with pytest.raises(ImageError, match="image 2 "):
        train(replace(request_, train_json=gone))
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_process_that_dies_ends_the_training(request_: TrainRequest) -> None:
    def kill_the_second(progress: Progress) -> None:
        for child in multiprocessing.active_children():
            if child.name == "ppal-train-1" and child.pid is not None:
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(DetectorError, match=r"training process [12] of 2 ended with code"):
        train(replace(request_, max_iterations=1000), kill_the_second)
    assert multiprocessing.active_children() == []


def test_memory_of_several_processes_is_halved_by_whole_shares(
    request_: TrainRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four images of two processes become two; of four processes they cannot become less than four."""
    tried: list[int] = []

    def short(attempt: Any, *_: Any) -> None:
        tried.append(attempt.batch_size)
        raise OutOfMemory("short of memory")

    monkeypatch.setattr("ppal_backend.detector.train.training.run_in_processes", short)
    with pytest.raises(OutOfMemory):
        train(request_)
    with pytest.raises(OutOfMemory):
        train(replace(request_, processes=4, work_dir=Path(request_.work_dir) / "four"))
    assert tried == [4, 2, 4]


def test_what_cannot_work_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    check_processes(1, 3, torch.device("cuda", 1))
    check_processes(2, 4, torch.device("cpu"))
    with pytest.raises(DetectorError, match=r"2 processes can share evenly, got 5; change PPAL_GPUS"):
        check_processes(2, 5, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_processes(2, 4, torch.device("cuda"))
    with pytest.raises(DetectorError, match=r"expected 4 GPUs .*got 2 GPUs"):
        check_processes(4, 4, torch.device("cuda"))
    with pytest.raises(DetectorError, match="cuda:1"):
        check_processes(2, 4, torch.device("cuda:1"))
