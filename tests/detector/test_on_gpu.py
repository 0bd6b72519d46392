"""On a GPU: every detector of the zoo trains and looks, and results are those of a CPU. ``make gpu-check`` runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.acquisition import synthetic_pool
from ppal_backend.acquisition.ccms import similarity_matrix
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.train.training import TrainRequest, TrainResult, train
from ppal_backend.detector.weights import load_checkpoint
from ppal_backend.detector.zoo import load_zoo
from ppal_backend.detector.zoo.check import check
from tests.detector.shapes import CLASSES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# It reads a text encoder from a file, which the repository does not have.
NAMES = sorted(name for name, entry in load_zoo().items() if entry.head_family != "grounding")


@pytest.mark.parametrize("name", NAMES)
def test_each_detector_trains_in_its_precision_and_looks_at_a_pool(name: str) -> None:
    report = check(name, "cuda")
    assert len(report.detections) == 4
    assert report.difficulty is not None
    assert all(0 <= value <= 1 for value in report.difficulty)


def test_what_a_detector_sees_is_what_it_sees_on_a_cpu(
    trained: TrainResult, zoo_root: Path, images: list[PoolImage]
) -> None:
    found = {
        device: list(PoolInference("small", trained.checkpoint, CLASSES, device, zoo_root, amp=False).run(images))
        for device in ("cpu", "cuda")
    }
    for there, here in zip(found["cuda"], found["cpu"], strict=True):
        close = min(len(there.scores), len(here.scores), 10)
        assert close
        np.testing.assert_allclose(there.scores[:close], here.scores[:close], atol=5e-3)


def test_similarities_are_those_of_a_cpu() -> None:
    pool = synthetic_pool(60)
    there = similarity_matrix(pool, device="cuda")
    np.testing.assert_allclose(
        np.asarray(torch.as_tensor(there).cpu()), similarity_matrix(pool, device="cpu"), atol=1e-4
    )


def test_difficulty_in_mixed_precision_is_that_in_full(request_: TrainRequest) -> None:
    found = []
    for wanted in (True, False):
        folder = request_.work_dir / str(wanted)
        asked = replace(request_, device="cuda", mixed_precision=wanted, work_dir=folder)
        found.append(train(asked).difficulty)
    np.testing.assert_allclose(found[0], found[1], atol=0.02)


def test_a_deterministic_training_gives_the_same_weights_twice(request_: TrainRequest) -> None:
    states = []
    for number in range(2):
        asked = replace(request_, device="cuda", deterministic=True, work_dir=request_.work_dir / str(number))
        states.append(load_checkpoint(train(asked).checkpoint)["state_dict"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
