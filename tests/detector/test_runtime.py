"""Switches of torch that a training turns, and puts back."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppal_backend.detector.runtime import deterministic, pick_device
from ppal_backend.detector.train.training import TrainRequest, train
from ppal_backend.errors import DetectorError
from tests.detector.shapes import CLASSES

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def switches() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        os.environ.get(WORKSPACE),
    )


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("gpu", "such as auto, cpu or cuda, got 'gpu'"),
        ("mps", "such as auto, cpu or cuda, got 'mps'"),
        ("meta", "such as auto, cpu or cuda, got 'meta'"),
        ("", "such as auto, cpu or cuda, got ''"),
        ("cuda:2", "a CUDA device from cuda:0 to cuda:1, got 'cuda:2'"),
    ],
)
def test_a_device_that_is_none_of_this_machine_is_told(device: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DetectorError, match=told):
        pick_device(device)
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]


@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_determinism_is_turned_on_and_put_back(monkeypatch: pytest.MonkeyPatch, workspace: str | None) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    if workspace is None:
        monkeypatch.delenv(WORKSPACE, raising=False)
    else:
        monkeypatch.setenv(WORKSPACE, workspace)
    before = switches()
    with pytest.raises(ZeroDivisionError), deterministic(True):
        assert switches() == (True, True, False, ":4096:8")
        raise ZeroDivisionError
    assert switches() == before == (False, False, True, workspace)
    with deterministic(False):
        assert switches() == before


def test_an_operation_without_such_a_form_is_told() -> None:
    told = "upsample_nearest2d_backward_out_cuda does not have a deterministic implementation, but you set …"
    with pytest.raises(DetectorError, match=r"upsample_nearest2d.*set deterministic to false"), deterministic(True):
        raise RuntimeError(told)
    with pytest.raises(RuntimeError, match="something else"), deterministic(True):
        raise RuntimeError("something else")


def test_a_training_runs_under_it(
    zoo_root: Path, train_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = TrainRequest(
        "small", CLASSES, train_json, None, tmp_path / "a", 3, "cpu", "random", 2, zoo_root=zoo_root,
        deterministic=True,
    )  # fmt: skip
    seen: list[tuple[object, ...]] = []
    train(request, lambda _: seen.append(switches()[:3]))
    assert set(seen) == {(True, True, False)} and switches()[0] is False
    seen.clear()
    train(replace(request, deterministic=False, work_dir=tmp_path / "b"), lambda _: seen.append(switches()[:1]))
    assert set(seen) == {(False,)}
