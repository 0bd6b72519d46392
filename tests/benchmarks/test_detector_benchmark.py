"""The detector's benchmarks measure real work, on the same images both ways, and say which targets are met."""

import json
from itertools import cycle

import pytest
import torch
from mmdet.models.dense_heads import AnchorHead

from benchmarks import detector, gpu
from benchmarks.detector_loops import CLASSES, Trainer, own_time, scaled_zoo, write_images
from ppal_backend.detector.data import read_coco
from ppal_backend.detector.heads import detection_head
from ppal_backend.detector.runtime import isolated


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def trainer(folder):
    entry = scaled_zoo("retinanet_tiny", folder / "zoo", 0.4)
    train_json = write_images(folder / "images", 16, (96, 64))
    with isolated("test-benchmark"):
        return Trainer(entry, train_json, torch.device("cpu"))


def test_images_have_the_boxes_that_are_written_down(folder):
    records = read_coco(write_images(folder / "drawn", 6, (96, 64), seed=3), CLASSES)
    assert len(records) == 6 and {record.width for record in records} == {96}
    for record in records:
        assert 1 <= len(record.instances) <= 8
        for item in record.instances:
            x1, y1, x2, y2 = item.box_xyxy
            assert 0 <= x1 < x2 <= 96 and 0 <= y1 < y2 <= 64


def test_the_zoo_of_a_measurement_differs_in_size_only(trainer):
    assert [step["scale"] for step in trainer.config.train_pipeline if "scale" in step] == [(64, 51)]
    assert [step["scale"] for step in trainer.config.test_pipeline if "scale" in step] == [(64, 51)]
    assert trainer.batch_size == 16 and trainer.config.model.neck.out_channels == 48


def test_the_time_of_the_hook_is_its_own_code(trainer, monkeypatch):
    """Losses and targets take time too; that of the hook alone counts, and the head is left as it was."""
    hook, head = trainer.hook(), detection_head(trainer.model)
    now = [0.0]
    monkeypatch.setattr("benchmarks.detector_loops.time.perf_counter", lambda: now[0])

    def costing(work, seconds):
        def slow(*args, **kwargs):
            now[0] += seconds
            return work(*args, **kwargs)

        return slow

    monkeypatch.setattr(AnchorHead, "get_targets", costing(AnchorHead.get_targets, 5.0))
    monkeypatch.setattr(AnchorHead, "loss_by_feat", costing(AnchorHead.loss_by_feat, 7.0))
    monkeypatch.setattr(hook, "_take", costing(hook._take, 0.25))
    monkeypatch.setattr(hook, "after_train_iter", costing(hook.after_train_iter, 0.5))
    before = set(head.__dict__)
    (batch,) = trainer.batches(1)
    with own_time(trainer, hook) as clock:
        for _ in range(2):
            trainer.step(batch, hook)
    assert clock.seconds == pytest.approx(2 * (0.25 + 0.5))
    assert now[0] == pytest.approx(2 * 12.75)
    assert set(head.__dict__) == before


def test_steps_with_and_without_the_hook_take_turns(trainer, monkeypatch):
    hooked = []
    original = trainer.step
    monkeypatch.setattr(
        trainer, "step", lambda batch, hook=None: hooked.append(hook is not None) or original(batch, hook)
    )
    plan = detector.Plan("retinanet_tiny", 0.4, (96, 64), 2, 3, 4, 1)
    figures = detector.measure_training(trainer, plan)
    warm_up, blocks, own = hooked[:2], hooked[2:-3], hooked[-3:]
    assert (warm_up, own) == ([False] * 2, [True] * 3)
    assert blocks == [False, False, True, True, True, True, False, False, False, False, True, True]
    assert figures["steps"] == 6 and figures["hook_ratio"] == figures["step_with_hook_s"] / figures["step_s"]
    assert 0 < figures["hook_own_share"] == figures["hook_own_ms"] / 1000 / figures["step_s"]


def test_the_three_ways_over_a_pool_see_the_same_detections(trainer, folder):
    entry = scaled_zoo("retinanet_tiny", folder / "again", 0.4, batch_cpu=4)
    batches = cycle(trainer.batches(1))
    for _ in range(5):
        trainer.step(next(batches))
    engine = detector.engine_of(trainer, entry, folder / "again", "cpu")
    engine.model.bbox_head.test_cfg.score_thr = 0.02
    passes = detector.Passes(engine, trainer.records[:6])
    assert passes.plain() == passes.one() == passes.two() > 6
    figures = detector.measure_passes(passes, 2)
    assert figures["images"] == 6 and figures["infer_batch"] == 4
    assert figures["detections_per_image"] == passes.plain() / 6
    assert figures["one_pass_ratio"] == figures["one_pass_s"] / figures["plain_s"]


def test_the_table_says_which_targets_are_missed():
    row = {
        "detector": "a", "input": [10, 10], "batch": 2, "steps": 4, "step_s": 1.0, "step_with_hook_s": 1.01,
        "hook_ratio": 1.01, "hook_own_ms": 5.0, "hook_own_share": 0.005, "images": 6, "infer_batch": 1,
        "detections_per_image": 3.0, "plain_s": 0.1, "one_pass_s": 0.11, "two_pass_s": 0.2, "one_pass_ratio": 1.1,
        "two_pass_ratio": 2.0, "one_pass_cpu_ratio": 1.1, "two_pass_cpu_ratio": 1.9,
    }  # fmt: skip
    report = {"table": [row, {**row, "detector": "b", "hook_ratio": 1.03}], "threads": 1, "load_average": 0.0}
    report |= {"hook_met": False, "hook_own_met": True, "one_pass_met": True}
    text = detector.table(report)
    assert "| step with the hook ≤ 1.02 × without | 1.0300 (b) | **missed** |" in text
    assert "| one pass ≤ 1.15 × plain | 1.1000 (a) | met |" in text


def test_without_a_gpu_the_check_ends_before_anything_long(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(gpu, "measure_detector", lambda *_: pytest.fail("measured without a GPU"))
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 1
    assert "expected a CUDA device" in capsys.readouterr().err


def test_the_measurement_for_gpus_runs_on_a_cpu(folder, capsys):
    size = gpu.Size(0.4, (96, 64), 6, 1, 1, 30, None)
    report = gpu.run("cpu", size, ("retinanet_tiny",))
    (row,) = report["table"]
    assert (row["detector"], row["amp"], row["batch"]) == ("retinanet_tiny", False, 16)
    assert row["train_ours_per_s"] > 0 and row["pool_plain_per_s"] > 0 and row["pool_ours_mib"] is None
    assert row["pool_time_ratio"] == pytest.approx(row["pool_plain_per_s"] / row["pool_ours_per_s"])
    assert report["round_s"] is None and report["ccms_s"] > 0
    assert "| retinanet_tiny | off |" in gpu.table(report)
    json.dumps(report)
    assert capsys.readouterr().out == ""  # what libraries print would spoil --json


def test_rates_are_images_over_time_of_both_turns(monkeypatch):
    clock = [0.0]

    def work(seconds):
        def run():
            clock[0] += seconds
            return 10

        return run

    monkeypatch.setattr(gpu, "synchronised", lambda device: clock[0])
    figures = gpu.rates({"ours": work(2.0), "plain": work(1.0)}, torch.device("cpu"))
    assert (figures["ours_per_s"], figures["plain_per_s"], figures["time_ratio"]) == (5.0, 10.0, 2.0)
    assert clock[0] == 6.0


def test_what_mixed_precision_gains_is_told_against_plain_mmdet_in_full():
    figures = {f"{kind}_{key}": 1.0 for kind in ("train", "pool")
               for key in ("ours_per_s", "plain_per_s", "time_ratio", "ours_mib", "plain_mib")}  # fmt: skip
    full = {"detector": "a", "amp": False, "half": None, **figures, "train_plain_per_s": 20.0}
    mixed = {"detector": "a", "amp": True, "half": "bfloat16", **figures, "train_ours_per_s": 30.0}
    report = {"device": "b", "torch": "c", "table": [full, mixed], "ccms_images": 9, "ccms_s": 1.0, "round_s": None}
    assert "against plain mmdet in full: a 1.50 (bfloat16) times as fast." in gpu.table(report)
    assert "mixed precision" not in gpu.table({**report, "table": [full]})
