"""A step that does not fit into memory: half the batch once, then an error that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.models.detectors import SingleStageDetector

from ppal_backend.detector.config import with_batch_size
from ppal_backend.detector.train.attempt import is_out_of_memory
from ppal_backend.detector.train.training import TrainRequest, train
from ppal_backend.detector.zoo import Schedule
from ppal_backend.errors import OutOfMemory, RoundCancelled


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Memory for so many images; returns the batch sizes that were tried."""
    whole = SingleStageDetector.loss

    def limit(images: int, error: Exception) -> list[int]:
        tried: list[int] = []

        def loss(self: Any, batch_inputs: torch.Tensor, samples: Any) -> Any:
            tried.append(len(batch_inputs))
            if len(batch_inputs) > images:
                raise error
            return whole(self, batch_inputs, samples)

        monkeypatch.setattr(SingleStageDetector, "loss", loss)
        return tried

    return limit


CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 80 GB")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), CPU_ERROR])
def test_half_the_batch_is_tried_over_as_many_images(request_: TrainRequest, limited: Any, error: Exception) -> None:
    tried = limited(2, error)
    result = train(request_)
    assert tried == [4, *[2] * 12] and result.iterations == 12
    folder = Path(request_.work_dir)
    config = json.loads((folder / "config.json").read_text())
    assert config["optim_wrapper"]["optimizer"]["lr"] == pytest.approx(0.001)
    assert config["param_scheduler"][0]["end"] == 2, "warm-up is never more than a fifth of the training"
    assert not (folder / "batch.json").exists()


def test_a_second_time_is_an_error_that_says_what_to_do(request_: TrainRequest, limited: Any) -> None:
    tried = limited(1, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(OutOfMemory, match=r"small with a batch size of 2; .*smaller detector.*batch_size.*zoo\.toml"):
        train(request_)
    assert tried == [4, 2]


def test_what_is_resumed_keeps_the_smaller_batch(request_: TrainRequest, limited: Any) -> None:
    tried = limited(2, torch.OutOfMemoryError("CUDA out of memory"))
    polls = iter(range(1, 100))
    with pytest.raises(RoundCancelled, match="step 5 of 12"):
        train(request_, should_stop=lambda: next(polls) == 5)
    assert train(request_).iterations == 12
    assert tried == [4, *[2] * 12]


def test_a_batch_is_halved_once_in_all(request_: TrainRequest, limited: Any) -> None:
    """Also when the second time is in a later process."""
    limited(2, torch.OutOfMemoryError("CUDA out of memory"))
    polls = iter(range(1, 100))
    with pytest.raises(RoundCancelled):
        train(request_, should_stop=lambda: next(polls) == 2)
    tried = limited(1, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(OutOfMemory, match="batch size of 2"):
        train(request_)
    assert tried == [2]


def test_memory_that_runs_out_late_begins_again(request_: TrainRequest, limited: Any) -> None:
    """Checkpoints of the larger batch count steps of another length: they must not be resumed."""
    polls = iter(range(1, 100))
    with pytest.raises(RoundCancelled):
        train(request_, should_stop=lambda: next(polls) == 3)
    tried = limited(2, torch.OutOfMemoryError("CUDA out of memory"))
    steps: list[int] = []
    assert train(request_, lambda progress: steps.append(progress.done)).iterations == 12
    assert min(steps) == 1 and tried == [4, *[2] * 12]


def test_other_errors_are_not_about_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert is_out_of_memory(MemoryError())


def test_a_schedule_keeps_its_images_and_its_pace() -> None:
    half = with_batch_size(Schedule(10, 1, 1000, 16, 0.02, warmup_iterations=50), 8)
    assert (half.batch_size, half.lr, half.warmup_iterations) == (8, 0.01, 100)
