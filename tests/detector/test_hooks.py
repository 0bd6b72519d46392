from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from ppal_backend.acquisition.difficulty import DifficultyEMA
from ppal_backend.detector.heads import Positives
from ppal_backend.detector.train.hooks import CHECKPOINT_KEY, DifficultyHook
from ppal_backend.errors import CheckpointError, UnsupportedHead
from tests.detector.families import batch, build
from tests.detector.test_heads_training import loss_step


def positives(classes: list[int], p: list[float], iou: list[float]) -> Positives:
    return Positives(torch.tensor(classes), torch.tensor(p), torch.tensor(iou))


def test_one_step_moves_the_average_by_equation_two() -> None:
    hook = DifficultyHook(DifficultyEMA(3, momentum=0.9), xi=0.6)
    hook._take(positives([0, 0, 2], [0.25, 1.0, 0.5], [0.5, 1.0, 0.25]))
    hook.after_train_iter(None, 0)
    q = [1 - 0.25**0.6 * 0.5**0.4, 0.0, 1 - 0.5**0.6 * 0.25**0.4]
    expected = [0.9 + 0.1 * (q[0] + q[1]) / 2, 1.0, 0.9 + 0.1 * q[2]]
    assert hook.ema.difficulty.tolist() == pytest.approx(expected, abs=1e-6)
    assert hook.ema.momentum.tolist() == pytest.approx([0.9, 0.81, 0.9])


def test_several_loss_computations_of_one_step_count_together() -> None:
    once, twice = (DifficultyHook(DifficultyEMA(2)) for _ in range(2))
    once._take(positives([0, 1, 0], [0.2, 0.3, 0.9], [0.5, 0.5, 0.9]))
    twice._take(positives([0], [0.2], [0.5]))
    twice._take(positives([1, 0], [0.3, 0.9], [0.5, 0.9]))
    for hook in (once, twice):
        hook.after_train_iter(None, 0)
    assert torch.allclose(once.ema.difficulty, twice.ema.difficulty, atol=1e-12)


def test_values_that_are_no_numbers_do_not_count() -> None:
    hook = DifficultyHook(DifficultyEMA(1))
    hook._take(positives([0, 0], [float("nan"), 0.5], [0.5, 0.5]))
    assert hook._counts.tolist() == [1.0]


def test_a_training_step_feeds_the_average_and_the_end_detaches() -> None:
    model = build("retinanet")
    runner = SimpleNamespace(model=model)
    hook = DifficultyHook(DifficultyEMA(3))
    before = dict(model.bbox_head.__dict__)
    hook.before_train(runner)
    loss_step(model, batch())
    hook.after_train_iter(runner, 0)
    assert bool((hook.ema.difficulty < 1).all())
    hook.after_train(runner)
    assert model.bbox_head.__dict__ == before
    hook.detach()  # harmless


def test_state_travels_with_checkpoints() -> None:
    hook = DifficultyHook(DifficultyEMA(2))
    hook._take(positives([1], [0.5], [0.5]))
    hook.after_train_iter(None, 0)
    checkpoint: dict[str, Any] = {}
    hook.before_save_checkpoint(None, checkpoint)
    other = DifficultyHook(DifficultyEMA(2))
    other.after_load_checkpoint(None, checkpoint)
    assert torch.equal(other.ema.difficulty, hook.ema.difficulty)
    assert torch.equal(other.ema.momentum, hook.ema.momentum)
    with pytest.raises(CheckpointError, match="does not fit"):
        DifficultyHook(DifficultyEMA(3)).after_load_checkpoint(None, checkpoint)
    untouched = DifficultyHook(DifficultyEMA(3))
    untouched.after_load_checkpoint(None, {"state_dict": {}})
    assert untouched.ema.difficulty.tolist() == [1.0, 1.0, 1.0] and CHECKPOINT_KEY in checkpoint


def test_a_head_without_a_probe_stops_the_training_before_it_starts() -> None:
    with pytest.raises(UnsupportedHead, match=r"PAAHead; .*anchor.*FCOS.*difficulty: false.*PPAL_DIFFICULTY=false"):
        DifficultyHook(DifficultyEMA(3)).before_train(SimpleNamespace(model=build("paa")))


def _one_of_two(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    hook = DifficultyHook(DifficultyEMA(2))
    for step in range(3):
        if rank == 0:
            hook._take(positives([0, 0], [0.2, 0.4], [0.5, 0.6]))
        elif step > 0:
            hook._take(positives([0, 1], [0.9, 0.1 * step], [0.8, 0.3]))
        hook.after_train_iter(None, step)
    torch.save(hook.ema.state_dict(), Path(folder) / f"{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_hold_what_one_would(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_one_of_two, args=(port, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    alone = DifficultyHook(DifficultyEMA(2))
    for step in range(3):
        alone._take(positives([0, 0], [0.2, 0.4], [0.5, 0.6]))
        if step > 0:
            alone._take(positives([0, 1], [0.9, 0.1 * step], [0.8, 0.3]))
        alone.after_train_iter(None, step)
    for rank in (0, 1):
        state = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert torch.allclose(state["difficulty"], alone.ema.difficulty, atol=1e-9)
        assert torch.allclose(state["momentum"], alone.ema.momentum, atol=1e-9)
