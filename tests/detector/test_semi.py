"""Student and teacher: what they are fed, what is kept of them, and what difficulty reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config

from ppal_backend.detector.data import ImageRecord, MixedData, TrainingData
from ppal_backend.detector.heads import Positives, read_training
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.models import build_model
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.train import semi
from ppal_backend.detector.train.training import TrainRequest, TrainResult, train
from ppal_backend.detector.weights import load_checkpoint
from ppal_backend.errors import DetectorError, ImageError, RoundCancelled
from tests.detector.conftest import REPOSITORY, zoo_entry
from tests.detector.families import batch, shrunk
from tests.detector.shapes import CLASSES, write_set
from tests.detector.test_heads_training import q_of, roi_reference

PAIR = """
_base_ = [{base!r}]
model = dict(
    detector=dict(
        backbone=dict(base_channels=8, stem_channels=8),
        neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
        rpn_head=dict(in_channels=16, feat_channels=16),
        roi_head=dict(bbox_roi_extractor=dict(out_channels=16), bbox_head=dict(in_channels=16, fc_out_channels=16)),
    ),
    semi_train_cfg=dict(rpn_pseudo_thr=0.3, cls_pseudo_thr=0.3, pseudo_label_initial_score_thr=0.3),
)
"""


@pytest.fixture(scope="module")
def pair_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher that take a step in a fraction of a second."""
    root = tmp_path_factory.mktemp("pair")
    (root / "zoo.toml").write_text(
        zoo_entry("pair", "roi", min_iterations=4, batch_size=2, warmup_iterations=None, decay="constant")
    )
    tiny = (REPOSITORY / "model_zoo" / "soft_teacher_tiny" / "config.py").read_text()
    (root / "base.py").write_text(tiny.replace("../", f"{REPOSITORY / 'model_zoo'}/").replace("(160, 128)", "(64, 64)"))
    (root / "pair.py").write_text(PAIR.format(base=str(root / "base.py")))
    return root


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("labelled"), 6, empty_every=5)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return paths_of(write_set(tmp_path_factory.mktemp("pool"), 6, seed=7))


def paths_of(coco: Path) -> tuple[str, ...]:
    return tuple(item["file_name"] for item in json.loads(coco.read_text())["images"])


@pytest.fixture
def request_(pair_zoo: Path, labelled: Path, pool: tuple[str, ...], tmp_path: Path) -> TrainRequest:
    return TrainRequest(
        "pair", CLASSES, labelled, None, tmp_path / "work", 3, "cpu", "random", 4, zoo_root=pair_zoo, unlabelled=pool
    )


@pytest.fixture(scope="module")
def finished(
    pair_zoo: Path, labelled: Path, pool: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> TrainResult:
    folder = tmp_path_factory.mktemp("finished")
    return train(
        TrainRequest("pair", CLASSES, labelled, None, folder, 3, "cpu", "random", 4, zoo_root=pair_zoo, unlabelled=pool)
    )


def stop_at_once() -> bool:
    return True


def parts(work: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Floating-point weights of student and teacher after a step."""
    state = load_checkpoint(work / f"iter_{step}.pth")["state_dict"]
    student, teacher = (
        floating({name.removeprefix(part): value for name, value in state.items() if name.startswith(part)})
        for part in ("student.", "teacher.")
    )
    assert student.keys() == teacher.keys() and student
    return student, teacher


def floating(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if value.is_floating_point()}


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# --- what they are fed --------------------------------------------------------------------------------


def stream(count: int, seed: int, broken: Callable[[str], bool] = lambda path: False, kind: str = "a") -> TrainingData:
    def load(info: dict[str, Any]) -> dict[str, Any]:
        if broken(info["img_path"]):
            raise OSError("gone")
        return {"path": info["img_path"], "draw": float(np.random.rand())}

    records = [ImageRecord(i, f"{kind}{i}", 0, 0, ()) for i in range(count)]
    return TrainingData(records, SimpleNamespace(transforms=[load]), ("x",), seed)  # type: ignore[arg-type]


def test_each_labelled_image_comes_with_the_next_unlabelled_ones() -> None:
    mixed = MixedData(stream(3, 0), stream(8, 1, kind="b"), 4)
    groups = [mixed[position] for position in range(6)]
    labelled, unlabelled = stream(3, 0), stream(8, 1, kind="b")
    for position, group in enumerate(groups):
        assert group[0] == labelled[position]
        assert group[1:] == [unlabelled[4 * position + step] for step in range(4)]
    assert {item["path"] for item in groups[0][1:] + groups[1][1:]} == {f"b{i}" for i in range(8)}
    assert len(mixed) == 3 and mixed.metainfo == {"classes": ("x",)}
    assert MixedData(stream(3, 0), stream(8, 1, kind="b"), 4)[5] == groups[5]  # no matter what was read before


def test_an_unlabelled_image_that_is_gone_gives_way_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    mixed = MixedData(stream(2, 0), stream(5, 1, lambda path: path == "b3", kind="b"), 1)
    whole = stream(5, 1, kind="b")
    with caplog.at_level(logging.WARNING):
        for position in range(10):
            expected = whole.record_at(position).path
            if expected == "b3":
                expected = whole.record_at(position + 1).path
            assert mixed[position][1]["path"] == expected
    assert [record.getMessage().count("b3") for record in caplog.records] == [1]  # told once
    with pytest.raises(ImageError, match="none of 5"):
        MixedData(stream(2, 0), stream(5, 1, lambda path: path.startswith("b"), kind="b"), 1)[0]


def test_labelled_images_that_are_gone_are_an_error() -> None:
    with pytest.raises(ImageError, match="a1"):
        mixed = MixedData(stream(2, 0, lambda path: path == "a1"), stream(2, 1, kind="b"), 1)
        _ = [mixed[position] for position in range(2)]


# --- what difficulty reads ----------------------------------------------------------------------------


def soft_teacher() -> Any:
    """A student and a teacher whose every proposal becomes a pseudo box."""
    config = {
        "type": "SoftTeacher",
        "detector": shrunk("faster_rcnn"),
        "data_preprocessor": {
            "type": "MultiBranchDataPreprocessor",
            "data_preprocessor": {"type": "DetDataPreprocessor", "pad_size_divisor": 32},
        },
        "semi_train_cfg": {
            "freeze_teacher": True, "sup_weight": 1.0, "unsup_weight": 1.0, "pseudo_label_initial_score_thr": 0.0,
            "rpn_pseudo_thr": 0.0, "cls_pseudo_thr": 0.0, "reg_pseudo_thr": 100.0, "jitter_times": 4,
            "jitter_scale": 0.06, "min_pseudo_bbox_wh": (0.01, 0.01),
        },
        "semi_test_cfg": {"predict_on": "teacher"},
    }  # fmt: skip
    torch.manual_seed(0)
    with isolated("test-semi"):
        model = build_model(Config({"model": config}))
        model.init_weights()
    return model.train()


def branches() -> dict[str, Any]:
    """A batch as the mixed stream gives it: three labelled images and two views of three others."""
    found: dict[str, Any] = {"inputs": {}, "data_samples": {}}
    for seed, name in enumerate(("sup", "unsup_teacher", "unsup_student")):
        own = batch(seed=min(seed, 1))
        for sample in own["data_samples"]:
            sample.set_metainfo({"homography_matrix": np.eye(3, dtype=np.float32)})
        found["inputs"][name], found["data_samples"][name] = own["inputs"], own["data_samples"]
    return found


def loss_of(model: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    data = model.data_preprocessor(branches(), True)
    losses: dict[str, Any] = model.loss(data["inputs"], data["data_samples"])
    return losses


def test_difficulty_comes_from_labelled_images_alone() -> None:
    model, seen, calls = soft_teacher(), list[Positives](), list[dict[str, Any]]()
    head = model.student.roi_head.bbox_head
    original = head.loss_and_target

    def remember(*args: Any, **kwargs: Any) -> Any:
        names = ("cls_score", "bbox_pred", "rois", "sampling_results")
        calls.append({**dict(zip(names, args, strict=False)), **kwargs})
        return original(*args, **kwargs)

    head.loss_and_target = remember
    restore = read_training(model, seen.append)
    loss_of(model)
    restore()
    assert len(calls) == 2 and sum(len(item.pos_priors) for item in calls[1]["sampling_results"]) > 0  # pseudo boxes
    assert len(seen) == 1
    expected = sorted((label, q_of(p, overlap)) for label, p, overlap in roi_reference(head, calls[:1]))
    got = sorted(
        (int(label), q_of(float(p), float(overlap)))
        for label, p, overlap in zip(seen[0].class_indices, seen[0].probabilities, seen[0].ious, strict=True)
    )
    assert len(expected) >= 8
    np.testing.assert_allclose(got, expected, atol=1e-5)
    loss_of(model)
    assert len(seen) == 1  # detached


def test_losses_are_bitwise_the_same_while_difficulty_is_read() -> None:
    outcomes = []
    for attached in (False, True):
        model = soft_teacher()
        if attached:
            read_training(model, lambda positives: None)
        total, _ = model.parse_losses(loss_of(model))
        total.backward()
        gradients = [item.grad for item in model.student.parameters() if item.grad is not None]
        assert all(item.grad is None for item in model.teacher.parameters())
        outcomes.append([total.detach(), *gradients])
    assert len(outcomes[0]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


# --- what is kept of them -----------------------------------------------------------------------------


def test_the_teacher_follows_the_student_and_survives_a_stop(request_: TrainRequest) -> None:
    """A teacher that a resumed training copied from the student, or left alone, would not be this average."""
    work = Path(request_.work_dir)
    for _ in range(3):
        with pytest.raises(RoundCancelled):
            train(request_, should_stop=stop_at_once)
    assert semi.teacher_momentum(4) == 0.5
    before = parts(work, 2)[1]
    student, teacher = parts(work, 3)
    expected = {name: (before[name] + student[name]) / 2 for name in student}
    assert farthest(teacher, expected) < 1e-6
    assert farthest(teacher, student) > 1e-4


def test_the_teacher_is_what_a_training_leaves_behind(request_: TrainRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a teacher that does not move, the result is the initial weights however far the student went."""
    monkeypatch.setattr(semi, "teacher_momentum", lambda total: 1e-9)
    for _ in range(2):
        with pytest.raises(RoundCancelled):
            train(request_, should_stop=stop_at_once)
    student, teacher = parts(Path(request_.work_dir), 2)
    result = train(request_)
    left = {name: value for name, value in load_checkpoint(result.checkpoint)["state_dict"].items() if name in teacher}
    assert left.keys() == teacher.keys()
    assert farthest(left, teacher) < 1e-5
    assert farthest(left, student) > 1e-3


def test_the_result_runs_over_a_pool_as_a_plain_detector(
    finished: TrainResult, pair_zoo: Path, pool: tuple[str, ...]
) -> None:
    engine = PoolInference("pair", finished.checkpoint, CLASSES, "cpu", pair_zoo)
    assert type(engine.model).__name__ == "FasterRCNN"
    engine.model.roi_head.test_cfg.score_thr = 0.0
    found = list(engine.run([PoolImage(number, path) for number, path in enumerate(pool[:2])]))
    assert [item.image_id for item in found] == [0, 1]
    assert all(item.embeddings.shape == (len(item), 16) and len(item) for item in found)
    assert finished.difficulty is not None and min(finished.difficulty) < 1.0


def test_unlabelled_images_change_the_weights(request_: TrainRequest, finished: TrainResult, tmp_path: Path) -> None:
    other = paths_of(write_set(tmp_path / "other", 6, seed=8))
    trained = train(replace(request_, unlabelled=other)).checkpoint
    one, two = (floating(load_checkpoint(path)["state_dict"]) for path in (trained, finished.checkpoint))
    assert farthest(one, two) > 1e-4


def test_without_unlabelled_images_it_learns_from_the_labelled_ones(
    request_: TrainRequest, finished: TrainResult, caplog: pytest.LogCaptureFixture
) -> None:
    """As at the end of a project, when nothing is left to label."""
    with caplog.at_level(logging.WARNING):
        alone = train(replace(request_, unlabelled=()))
    assert "no unlabelled images" in caplog.text
    assert alone.iterations == 4 and alone.difficulty is not None and min(alone.difficulty) < 1.0
    weights = load_checkpoint(alone.checkpoint)["state_dict"]
    assert weights.keys() == load_checkpoint(finished.checkpoint)["state_dict"].keys()


def test_a_training_starts_from_the_weights_of_a_plain_detector(
    request_: TrainRequest, finished: TrainResult, tmp_path: Path
) -> None:
    """Those of the last training, here moved away from where this one would begin by itself."""
    start = {name: value + 0.05 for name, value in load_checkpoint(finished.checkpoint)["state_dict"].items()}
    torch.save({"state_dict": start}, tmp_path / "last.pth")
    with pytest.raises(RoundCancelled):
        train(replace(request_, init_weights=tmp_path / "last.pth"), should_stop=stop_at_once)
    for part in parts(Path(request_.work_dir), 1):
        moved = farthest({name: value for name, value in part.items() if not name.endswith(("mean", "var"))}, start)
        assert moved < 0.01


def test_a_folder_belongs_to_one_pool(request_: TrainRequest) -> None:
    with pytest.raises(RoundCancelled):
        train(request_, should_stop=stop_at_once)
    with pytest.raises(DetectorError, match=r"another training.*unlabelled"):
        train(replace(request_, unlabelled=request_.unlabelled[:-1]))


def test_a_teacher_without_a_pipeline_for_unlabelled_images_is_an_error(pair_zoo: Path) -> None:
    base = Config.fromfile(pair_zoo / "pair.py")
    assert semi.semi_parts(base)["unlabelled_ratio"] == 1
    base.pop("unlabelled_pipeline")
    with pytest.raises(DetectorError, match="unlabelled_pipeline"):
        semi.semi_parts(base)
    assert semi.semi_parts({"model": base.model.detector}) == {}


def test_a_short_training_has_a_teacher_with_a_short_memory() -> None:
    assert semi.teacher_momentum(180_000) == 0.001
    assert semi.teacher_momentum(500) == pytest.approx(0.04)
    assert semi.teacher_momentum(1) == 0.5
