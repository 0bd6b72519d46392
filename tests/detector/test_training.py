from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope

from ppal_backend.detector.train.training import TrainRequest, TrainResult, evaluate, train
from ppal_backend.detector.weights import load_checkpoint, load_final, newest_loadable, training_checkpoints
from ppal_backend.errors import (
    CheckpointError,
    DatasetError,
    DetectorError,
    ImageError,
    RoundCancelled,
    UnknownDetector,
    WeightsUnavailable,
)
from ppal_backend.structures.round import Progress
from tests.detector.shapes import CLASSES, write_set


@pytest.fixture(scope="module")
def uninterrupted(zoo_root: Path, train_json: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """What ``request_`` gives when nothing happens to it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return train(
        TrainRequest(
            "small", CLASSES, train_json, None, folder, 3, "cpu", "random", max_iterations=6, zoo_root=zoo_root
        )
    )


def stop_after(steps: int) -> Any:
    """A ``should_stop`` that says yes when polled for the ``steps``-th time."""
    polls = iter(range(1, 10_000))
    return lambda: next(polls) >= steps


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_checkpoint(one)["state_dict"], load_checkpoint(other)["state_dict"]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_final_checkpoint_is_plain_and_says_what_it_is(trained: TrainResult) -> None:
    content = torch.load(trained.checkpoint, weights_only=True)
    assert set(content) == {"state_dict", "meta"}
    assert content["meta"]["classes"] == list(CLASSES) and content["meta"]["detector"] == "small"
    assert content["meta"]["difficulty"] == list(trained.difficulty or ())
    assert trained.iterations == 60 and trained.final_loss < 2
    assert [path.name for path in trained.checkpoint.parent.glob("*.pth")] == ["final.pth"]


def test_difficulty_falls_from_one_for_the_classes_seen(trained: TrainResult) -> None:
    assert trained.difficulty is not None and len(trained.difficulty) == 3
    assert all(0.5 < value < 0.99 for value in trained.difficulty)


def test_a_finished_training_is_not_repeated(request_: TrainRequest) -> None:
    first = train(request_)
    seen: list[Progress] = []
    assert train(request_, seen.append) == first
    assert seen == []


def test_a_stopped_training_resumes_to_the_bit(uninterrupted: TrainResult, request_: TrainRequest) -> None:
    with pytest.raises(RoundCancelled, match="step 4 of 6"):
        train(request_, should_stop=stop_after(4))
    assert [path.name for path in training_checkpoints(Path(request_.work_dir))] == ["iter_4.pth"]
    steps: list[int] = []
    resumed = train(request_, lambda progress: steps.append(progress.done))
    assert min(steps) == 5
    assert same_weights(resumed.checkpoint, uninterrupted.checkpoint)
    assert resumed.difficulty == uninterrupted.difficulty


def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    uninterrupted: TrainResult, request_: TrainRequest
) -> None:
    for step in (2, 3):
        with pytest.raises(RoundCancelled):
            train(request_, should_stop=stop_after(step if step == 2 else 1))
    newest, before = training_checkpoints(Path(request_.work_dir))
    assert (newest.name, before.name) == ("iter_3.pth", "iter_2.pth")
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    assert newest_loadable(Path(request_.work_dir)) == before
    steps: list[int] = []
    resumed = train(request_, lambda progress: steps.append(progress.done))
    assert min(steps) == 3
    assert same_weights(resumed.checkpoint, uninterrupted.checkpoint)
    assert resumed.difficulty == uninterrupted.difficulty


def test_the_hook_changes_no_weight(uninterrupted: TrainResult, request_: TrainRequest) -> None:
    without = train(replace(request_, difficulty=False))
    assert without.difficulty is None
    assert same_weights(without.checkpoint, uninterrupted.checkpoint)
    assert without.final_loss == uninterrupted.final_loss


def test_half_precision_on_a_cpu_trains_nearly_the_same(
    request_: TrainRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and optimiser stay in full precision; a CPU without the instructions trains in full precision."""
    request = replace(request_, work_dir=tmp_path / "full", mixed_precision=False)
    full = train(request)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    half = train(replace(request, work_dir=tmp_path / "half", mixed_precision=True))
    assert not same_weights(half.checkpoint, full.checkpoint)
    assert half.final_loss == pytest.approx(full.final_loss, rel=0.02)
    assert {v.dtype for v in load_checkpoint(half.checkpoint)["state_dict"].values()} <= {torch.float32, torch.int64}
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    without = train(replace(request, work_dir=tmp_path / "without", mixed_precision=True))
    assert same_weights(without.checkpoint, full.checkpoint)


def test_seeds_matter(uninterrupted: TrainResult, request_: TrainRequest) -> None:
    other = train(replace(request_, seed=4))
    assert not same_weights(other.checkpoint, uninterrupted.checkpoint)


def test_progress_counts_every_step(request_: TrainRequest) -> None:
    seen: list[Progress] = []
    train(request_, seen.append)
    assert seen[-1].done == seen[-1].total == 6 and seen[0].step == "train"
    assert seen[-1].detail.startswith("loss ")
    assert not [one.detail for one in seen if "left" in one.detail], "the page tells the time that is left, once"


def test_diverging_training_is_a_clear_error(request_: TrainRequest) -> None:
    with pytest.raises(DetectorError, match=r"diverged.*learning rate"):
        train(replace(request_, detector="explosive"))


def test_a_folder_belongs_to_one_training(request_: TrainRequest) -> None:
    with pytest.raises(RoundCancelled):
        train(request_, should_stop=stop_after(1))
    with pytest.raises(DetectorError, match=r"another training.*seed"):
        train(replace(request_, seed=99))


def test_an_attempt_that_never_began_does_not_claim_the_folder(request_: TrainRequest) -> None:
    """Weights cannot be had, the user then asks for a random start: the same folder must do."""
    with pytest.raises(WeightsUnavailable):
        train(replace(request_, init_weights=None))
    assert train(replace(request_, max_iterations=1)).iterations == 1


def test_nothing_reaches_the_terminal_and_nothing_stays_behind(
    request_: TrainRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    managed = (MMLogger, MessageHub, DefaultScope)
    before = [set(item._instance_dict) for item in managed]
    with pytest.raises(RoundCancelled):
        train(request_, should_stop=stop_after(3))
    train(request_)
    assert capfd.readouterr() == ("", "")
    assert [set(item._instance_dict) for item in managed] == before
    assert (
        "Iter(train)" in (Path(request_.work_dir) / "train.log").read_text()
        or "loss" in (Path(request_.work_dir) / "train.log").read_text()
    )
    assert sorted(path.name for path in Path(request_.work_dir).iterdir()) == [
        "config.json",
        "final.pth",
        "request.json",
        "train.log",
    ]


def test_initial_weights_are_taken_over(trained: TrainResult, request_: TrainRequest) -> None:
    def first_loss(init_weights: Any) -> float:
        seen: list[Progress] = []
        folder = Path(request_.work_dir) / ("warm" if init_weights != "random" else "cold")
        train(replace(request_, work_dir=folder, init_weights=init_weights, max_iterations=1), seen.append)
        return float(seen[0].detail.removeprefix("loss "))

    assert first_loss(trained.checkpoint) < first_loss("random") - 0.05


def test_other_classes_keep_all_but_the_class_layer(trained: TrainResult, request_: TrainRequest) -> None:
    with pytest.raises(RoundCancelled):
        train(
            replace(request_, classes=(*CLASSES, "new"), init_weights=trained.checkpoint, max_iterations=2),
            should_stop=stop_after(1),
        )
    state = load_checkpoint(training_checkpoints(Path(request_.work_dir))[0])["state_dict"]
    start = load_checkpoint(trained.checkpoint)["state_dict"]
    assert state["bbox_head.retina_cls.weight"].shape[0] == 2 * 4
    moved = (state["backbone.layer1.0.conv1.weight"] - start["backbone.layer1.0.conv1.weight"]).abs().max()
    assert moved < 0.01


def test_a_missing_zoo_weight_never_means_a_random_start(request_: TrainRequest, tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable):
        train(replace(request_, init_weights=None))
    packaged = replace(
        request_, detector="retinanet_r50_fpn", init_weights=None, zoo_root=None, weights_dir=tmp_path / "cache",
        work_dir=tmp_path / "r50",
    )  # fmt: skip
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "resnet50-0676ba61.pth").write_bytes(b"cut off")
    with pytest.raises(WeightsUnavailable, match=r"sha256.*download\.pytorch\.org"):
        train(packaged)


def test_a_detector_that_trains_from_scratch_needs_no_weights(
    request_: TrainRequest, zoo_root: Path, tmp_path: Path
) -> None:
    """Only because the zoo says so, and then exactly as when random weights are asked for."""
    root = tmp_path / "zoo"
    root.mkdir()
    (root / "small.py").write_text((zoo_root / "small.py").read_text())
    text = (zoo_root / "zoo.toml").read_text().replace("title = ", "from_scratch = true\ntitle = ", 1)
    (root / "zoo.toml").write_text(text)
    short = replace(request_, max_iterations=2)
    asked_for = train(short)
    by_the_zoo = train(replace(short, init_weights=None, zoo_root=root, work_dir=tmp_path / "other"))
    assert same_weights(asked_for.checkpoint, by_the_zoo.checkpoint)


def test_initial_weights_of_something_else_are_refused_and_nothing_in_them_runs(
    request_: TrainRequest, tmp_path: Path
) -> None:
    path, sprung = tmp_path / "odd.pth", tmp_path / "sprung"
    trap = type("Trap", (), {"__reduce__": lambda self: (open, (str(sprung), "w"))})
    torch.save({"state_dict": {"a": torch.ones(1)}, "hook": trap()}, path)
    with pytest.raises(CheckpointError, match="same architecture"):
        train(replace(request_, init_weights=path))
    assert not sprung.exists()
    path.write_bytes(b"no checkpoint at all")
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(replace(request_, init_weights=path))


def test_unusable_data_is_told_apart(request_: TrainRequest, tmp_path: Path) -> None:
    with pytest.raises(UnknownDetector, match="small"):
        train(replace(request_, detector="nothing"))
    with pytest.raises(DatasetError, match="got none"):
        train(replace(request_, train_json=tmp_path / "absent.json"))
    none = tmp_path / "none.json"
    none.write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": CLASSES[0]}]}))
    with pytest.raises(DetectorError, match="annotate images first"):
        train(replace(request_, train_json=none))
    gone = write_set(tmp_path / "gone", 4)
    (tmp_path / "gone" / "2.png").unlink()
    with pytest.raises(ImageError, match="image 2 "):
        train(replace(request_, train_json=gone))


def test_a_set_of_true_negatives_trains(request_: TrainRequest, tmp_path: Path) -> None:
    result = train(replace(request_, train_json=write_set(tmp_path / "empty", 4, empty_every=1), max_iterations=2))
    assert result.difficulty == (1.0, 1.0, 1.0)


def test_a_checkpoint_is_only_used_for_what_it_was_made_for(trained: TrainResult) -> None:
    with pytest.raises(CheckpointError, match="order counts"):
        load_final(trained.checkpoint, "small", CLASSES[::-1])
    with pytest.raises(CheckpointError, match="one of small"):
        load_final(trained.checkpoint, "retinanet_tiny", CLASSES)


KILLED = """
import os, signal, sys
from pathlib import Path
from ppal_backend.detector.train.training import TrainRequest, train
from tests.detector.shapes import CLASSES

def at_step_forty(progress):
    if progress.done >= 40:
        os.kill(os.getpid(), signal.SIGKILL)

import ppal_backend.detector.train.hooks as hooks
hooks._REPORT_EVERY_S = 0.0
data, work, zoo = (Path(item) for item in sys.argv[1:4])
train(TrainRequest("small", CLASSES, data, None, work, 3, "cpu", "random", zoo_root=zoo), at_step_forty)
"""


@pytest.mark.slow
def test_a_killed_training_ends_as_if_nothing_had_happened(
    trained: TrainResult, request_: TrainRequest, train_json: Path, zoo_root: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(train_json), str(request_.work_dir), str(zoo_root)]
    killed = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in training_checkpoints(Path(request_.work_dir))] == ["iter_25.pth"]
    steps: list[int] = []
    resumed = train(replace(request_, max_iterations=None), lambda progress: steps.append(progress.done))
    assert min(steps) == 26
    assert same_weights(resumed.checkpoint, trained.checkpoint)
    assert resumed.difficulty == trained.difficulty


@pytest.mark.slow
def test_the_tiny_detector_learns(tmp_path: Path) -> None:
    """Overfits 16 images from its shipped weights."""
    data = write_set(tmp_path / "data", 16)
    result = train(TrainRequest("retinanet_tiny", CLASSES, data, None, tmp_path / "work", device="cpu"))
    metrics = evaluate("retinanet_tiny", result.checkpoint, CLASSES, data, "cpu")
    assert metrics.map50 is not None and metrics.map50 >= 0.8
