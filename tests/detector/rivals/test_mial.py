"""Multiple instance active learning: formulas against slow ones, what learns in which phase, and from which images."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config

from ppal_backend.detector.data import MixedData
from ppal_backend.detector.heads import read_training
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.models import build_model
from ppal_backend.detector.rivals.mial import (
    MIAL,
    PhasesHook,
    agreement,
    bag_scores,
    disagreement,
    image_discrepancy,
    instance_weights,
    learns,
    phase_of,
    seen_classes,
)
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.train.training import TrainRequest, TrainResult, train
from ppal_backend.detector.weights import load_checkpoint
from ppal_backend.errors import DetectorError, RoundCancelled
from tests.detector.families import batch, shrunk, ssd
from tests.detector.shapes import CLASSES, write_set

# --- slow references ------------------------------------------------------------------------------------


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def slow_weights(bags: Any, first: Any, second: Any) -> list[list[list[float]]]:
    """Images, anchors and classes one by one."""
    answer = []
    for bag, a, b in zip(bags.tolist(), first.tolist(), second.tolist(), strict=True):
        objects = [
            math.exp(max(sigmoid((x + y) / 2) for x, y in zip(row, other, strict=True)))
            for row, other in zip(a, b, strict=True)
        ]
        rows = []
        for row, object_ in zip(bag, objects, strict=True):
            total = sum(math.exp(value) for value in row)
            rows.append([math.exp(value) / total * object_ / sum(objects) for value in row])
        answer.append(rows)
    return answer


def slow_apart(weights: Any, first: Any, second: Any, near: bool) -> list[float]:
    answer = []
    for rows, a, b in zip(weights.tolist(), first.tolist(), second.tolist(), strict=True):
        total = 0.0
        for weight, x, y in zip(rows, a, b, strict=True):
            for c, value in enumerate(weight):
                distance = abs(sigmoid(x[c]) - sigmoid(y[c]))
                total += value * (1 - distance if near else distance) / len(weight)
        answer.append(total)
    return answer


def logits(seed: int, anchors: int = 5, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    bags, first, second = torch.randn(3, 2, anchors, classes) * 2
    return bags, first, second


@pytest.mark.parametrize("seed", range(3))
def test_instance_weights(seed: int) -> None:
    bags, first, second = logits(seed)
    found = instance_weights(bags, first, second)
    np.testing.assert_allclose(found.numpy(), slow_weights(bags, first, second), rtol=1e-4)
    assert found.sum((1, 2)).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_only_the_branch_learns_from_the_weights() -> None:
    bags, first, second = (value.requires_grad_() for value in logits(0))
    bag_scores([instance_weights(bags, first, second)]).sum().backward()  # type: ignore[no-untyped-call]
    # the classes of an image add up to 1 whatever the branch says, so its gradient is looked at class by class
    bags.grad = None
    bag_scores([instance_weights(bags, first, second)])[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert bags.grad is not None and bags.grad.abs().sum() > 0 and first.grad is None and second.grad is None


def test_an_image_has_the_classes_of_the_level_that_says_most() -> None:
    levels = [torch.tensor([[[0.1, 0.2], [0.3, 0.0]]]), torch.tensor([[[0.05, 0.9]]])]
    assert bag_scores(levels)[0].tolist() == pytest.approx([0.4, 0.9])
    assert bag_scores([torch.zeros(1, 1, 2)])[0].tolist() == pytest.approx([1e-5, 1e-5])


@pytest.mark.parametrize("seed", range(3))
def test_disagreement_and_agreement(seed: int) -> None:
    bags, first, second = logits(seed)
    weights = instance_weights(bags, first, second)
    apart = slow_apart(weights, first, second, near=False)
    assert disagreement(weights, first, second).tolist() == pytest.approx(apart, rel=1e-4)
    assert agreement(weights, first, second).tolist() == pytest.approx(
        slow_apart(weights, first, second, near=True), rel=1e-4
    )


@pytest.mark.parametrize("top", [1, 3, 5, 100])
def test_utility_of_an_image(top: int) -> None:
    _, first, second = logits(4)
    apart = []
    for row, other in zip(first[0].tolist(), second[0].tolist(), strict=True):
        apart.append(sum((sigmoid(x) - sigmoid(y)) ** 2 for x, y in zip(row, other, strict=True)) / 3)
    best = sorted(apart, reverse=True)[:top]
    assert float(image_discrepancy(first[0], second[0], top)) == pytest.approx(sum(best) / len(best), rel=1e-4)


def test_classes_are_seen_from_a_mean_probability_of_one_half() -> None:
    first = [torch.tensor([[[0.0, -1.0], [-9.0, 3.0]]]), torch.tensor([[[-9.0, -9.0]]])]
    second = [torch.tensor([[[0.0, -9.0], [-9.0, -4.0]]]), torch.tensor([[[-9.0, -9.0]]])]
    assert seen_classes(first, second).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("steps", [13, 250, 1200])
def test_phases_have_the_authors_shares(steps: int) -> None:
    phases = [phase_of(step, steps) for step in range(steps)]
    changes = [phases[0]] + [b for a, b in pairwise(phases) if a != b]
    assert changes == ["label", "minimise", "maximise", "label", "minimise", "maximise", "label"]
    for name, share in {"label": 9, "minimise": 2, "maximise": 2}.items():
        assert Counter(phases)[name] == pytest.approx(steps * share / 13, abs=3)


# --- the head -------------------------------------------------------------------------------------------


def changed(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with isolated("mial"):
        built = build_model(Config({"model": shrunk("retinanet")}), "mial")
        built.init_weights()
    return built


def hooked(detector: Any, mixed: bool, step: int) -> PhasesHook:
    """The hook at a step of 13, one for each unit of the phases."""
    data = object.__new__(MixedData) if mixed else object()
    runner = SimpleNamespace(
        model=detector, iter=step, max_iters=13, train_loop=SimpleNamespace(dataloader=SimpleNamespace(dataset=data))
    )
    hook = PhasesHook()
    hook.before_train(runner)
    hook.before_train_iter(runner, step)
    return hook


@pytest.mark.parametrize(
    ("step", "mixed", "expected"),
    [
        (0, True, {"loss_cls", "loss_bbox", "loss_image"}),
        (3, True, {"loss_cls", "loss_bbox", "loss_image", "loss_discrepancy", "loss_seen"}),
        (4, True, {"loss_cls", "loss_bbox", "loss_discrepancy"}),
        (3, False, {"loss_cls", "loss_bbox", "loss_image"}),
        (4, False, {"loss_cls", "loss_bbox", "loss_image"}),
    ],
)
def test_losses_and_what_learns_in_each_phase(step: int, mixed: bool, expected: set[str]) -> None:
    detector, packed = changed().train(), batch(4)
    hook = hooked(detector, mixed, step)
    with isolated("mial"):
        ready = detector.data_preprocessor(packed, True)
        losses = detector.loss(ready["inputs"], ready["data_samples"])
        total, _ = detector.parse_losses(losses)
        total.backward()
    assert losses.keys() == expected
    moved = {name for name, value in detector.named_parameters() if value.grad is not None and value.grad.any()}
    phase = phase_of(step, 13) if mixed else "label"
    assert moved and all(learns(name, phase) for name in moved)
    parts = {name.removeprefix("bbox_head.").split(".")[0] for name in moved}
    classifiers = {"cls_convs", "retina_cls", "cls_convs_2", "retina_cls_2"}
    assert (parts & classifiers == classifiers) == (phase != "minimise") and (phase == "maximise") == (
        parts <= classifiers
    )
    assert ("retina_mil" in parts) == (phase != "maximise")
    hook.after_train(SimpleNamespace(model=detector))
    assert all(value.requires_grad for value in detector.parameters()) and "loss" not in detector.__dict__


@pytest.mark.parametrize("step", [0, 3, 4])
def test_boxes_of_unlabelled_images_are_never_looked_at(step: int) -> None:
    def losses(boxes: bool) -> dict[str, Any]:
        detector, packed = changed().train(), batch(5)
        packed = {name: values[:4] for name, values in packed.items()}
        if not boxes:
            for sample in packed["data_samples"][1::2]:
                sample.gt_instances = sample.gt_instances[:0]
        hooked(detector, True, step)
        with isolated("mial"):
            ready = detector.data_preprocessor(packed, True)
            found = detector.parse_losses(detector.loss(ready["inputs"], ready["data_samples"]))[1]
        return {name: float(value.detach()) for name, value in found.items()}

    assert losses(True) == losses(False)


def test_both_classifiers_count_half_and_difficulty_is_that_of_the_first() -> None:
    detector, packed = changed().train(), batch(3)
    head = detector.bbox_head
    head.retina_cls.weight.data *= 30
    seen: list[torch.Tensor] = []
    detach = read_training(detector, lambda positives: seen.append(positives.probabilities))
    with isolated("mial"):
        ready = detector.data_preprocessor(packed, True)
        maps = detector.extract_feat(ready["inputs"])
        losses = head.loss(maps, ready["data_samples"])
        assert len(seen) == 1
        branches = [head._branches(level) for level in maps]
        truths, metas = ([getattr(s, n) for s in ready["data_samples"]] for n in ("gt_instances", "metainfo"))
        own = [
            head.loss_by_feat([b[part] for b in branches], [b[3] for b in branches], truths, metas) for part in (0, 1)
        ]
    detach()
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    for name in ("loss_cls", "loss_bbox"):
        halves = [(float(a) + float(b)) / 2 for a, b in zip(own[0][name], own[1][name], strict=True)]
        assert [float(value) for value in losses[name]] == pytest.approx(halves, rel=1e-4)


# --- a training and what comes of it --------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = write_set(tmp_path_factory.mktemp("pool"), 6, seed=7)
    return tuple(item["file_name"] for item in json.loads(path.read_text())["images"])


def request_in(folder: Path, zoo_root: Path, train_json: Path, pool: tuple[str, ...]) -> TrainRequest:
    return TrainRequest(
        "small", CLASSES, train_json, None, folder, 3, "cpu", "random", 39, zoo_root=zoo_root, unlabelled=pool,
        rival="mial",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(
    zoo_root: Path, train_json: Path, pool: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> TrainResult:
    return train(request_in(tmp_path_factory.mktemp("mial"), zoo_root, train_json, pool))


def test_inference_says_the_discrepancy_of_each_image_whatever_its_batch(
    finished: TrainResult, zoo_root: Path, test_json: Path, tmp_path: Path
) -> None:
    assert finished.difficulty is not None
    other = write_set(tmp_path, 2, seed=9, size=(60, 100), first_id=300)
    rows = [row for path in (other, test_json) for row in json.loads(path.read_text())["images"]]
    images = [PoolImage(row["id"], row["file_name"]) for row in rows[:6]]
    detector = PoolInference("small", finished.checkpoint, CLASSES, "cpu", zoo_root)
    together, alone = ([r.features["mial"] for r in detector.run_with_features(images, size)] for size in (6, 1))
    assert all(value.shape == (1,) and 0 < float(value[0]) < 1 for value in together)
    assert len({float(value[0]) for value in together}) == 6
    np.testing.assert_allclose(together, alone, rtol=0.02)


def test_a_training_that_was_cut_off_ends_as_one_that_was_not(
    finished: TrainResult, zoo_root: Path, train_json: Path, pool: tuple[str, ...], tmp_path: Path
) -> None:
    request, polls = request_in(tmp_path, zoo_root, train_json, pool), iter([False] * 13)
    with pytest.raises(RoundCancelled):
        train(request, should_stop=lambda: next(polls, True))
    again = load_checkpoint(train(request).checkpoint)["state_dict"]
    whole = load_checkpoint(finished.checkpoint)["state_dict"]
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)


def test_without_unlabelled_images_it_learns_from_the_others(
    zoo_root: Path, train_json: Path, tmp_path: Path, finished: TrainResult
) -> None:
    alone = train(request_in(tmp_path, zoo_root, train_json, ()))
    assert math.isfinite(alone.final_loss)
    weights = [load_checkpoint(result.checkpoint)["state_dict"] for result in (alone, finished)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ssd", "atss", "faster_rcnn", "dino"])
def test_other_detectors_are_refused(name: str) -> None:
    with pytest.raises(DetectorError, match=r"expected a detector with a RetinaHead for mial, got .*; choose retina"):
        MIAL().change(ssd() if name == "ssd" else shrunk(name))
