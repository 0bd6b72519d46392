"""Learning loss: its formulas against slow ones, whose loss it predicts, and that the detector learns as without it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ppal_backend.detector.heads import read_training
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.rivals import find_rival
from ppal_backend.detector.rivals.learnloss import (
    FREE_AFTER,
    LearnLoss,
    LearnLossHook,
    LossPredictor,
    image_losses,
    ranking_loss,
    recorded_losses,
)
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.train.training import TrainRequest, TrainResult, train
from ppal_backend.detector.weights import load_checkpoint, load_final
from ppal_backend.errors import DetectorError, RoundCancelled
from tests.detector.families import DETR_LIKE, FILES, TWO_STAGE, batch, build, shrunk
from tests.detector.shapes import CLASSES, write_set

DENSE = [name for name in FILES if name not in (*DETR_LIKE, *TWO_STAGE)]


# --- slow references ------------------------------------------------------------------------------------


def slow_ranking_loss(predicted: list[float], losses: list[float], margin: float) -> float:
    """Eq. 2 pair by pair: 1 where the first loss is larger, else -1."""
    total, pairs = 0.0, len(predicted) // 2
    for pair in range(pairs):
        i, j = 2 * pair, 2 * pair + 1
        sign = 1.0 if losses[i] > losses[j] else -1.0
        total += max(0.0, -sign * (predicted[i] - predicted[j]) + margin)
    return total / pairs if pairs else 0.0


def slow_prediction(module: LossPredictor, means: list[torch.Tensor]) -> list[float]:
    """Fig. 2 unit by unit."""
    answers = []
    for image in range(len(means[0])):
        hidden: list[float] = []
        for layer, mean in zip(module.layers, means, strict=True):
            for weights, bias in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True):  # type: ignore[operator]
                value = sum(w * x for w, x in zip(weights, mean[image].tolist(), strict=True)) + bias
                hidden.append(max(0.0, value))
        weights, bias = module.last.weight[0].tolist(), module.last.bias.tolist()[0]
        answers.append(sum(w * h for w, h in zip(weights, hidden, strict=True)) + bias)
    return answers


@pytest.mark.parametrize("images", [0, 1, 2, 3, 8, 9])
@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0])
def test_ranking_loss(images: int, margin: float) -> None:
    rng = np.random.default_rng(images)
    predicted, losses = rng.normal(size=images).round(1), rng.random(images).round(1)  # ties happen
    found = ranking_loss(torch.tensor(predicted), torch.tensor(losses), margin)
    assert float(found) == pytest.approx(slow_ranking_loss(predicted.tolist(), losses.tolist(), margin))


def test_a_pair_in_order_costs_nothing_and_equal_losses_count_as_the_second_larger() -> None:
    assert float(ranking_loss(torch.tensor([3.0, 1.0]), torch.tensor([0.9, 0.2]))) == 0.0
    assert float(ranking_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.9, 0.2]))) == 3.0
    assert float(ranking_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5]))) == 0.0


def test_no_gradient_reaches_the_losses_themselves() -> None:
    predicted, losses = torch.zeros(4, requires_grad=True), torch.rand(4, requires_grad=True)
    ranking_loss(predicted, losses).backward()  # type: ignore[no-untyped-call]
    assert predicted.grad is not None and predicted.grad.abs().sum() > 0 and losses.grad is None


@pytest.mark.parametrize("channels", [(5,), (3, 4, 6)])
def test_predictor(channels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, means = LossPredictor(channels, width=7), [torch.randn(4, count) for count in channels]
    assert module(means).tolist() == pytest.approx(slow_prediction(module, means), rel=1e-4)


# --- whose loss it predicts -----------------------------------------------------------------------------


def losses_of(detector: Any, images: list[int], packed: dict[str, Any]) -> tuple[list[Any], float]:
    """What is recorded while the detector computes the loss of some images of a batch, and that loss."""
    data = {name: [values[i] for i in images] for name, values in packed.items()}
    with isolated("losses"), torch.no_grad(), recorded_losses(detector) as calls:
        torch.manual_seed(1)
        ready = detector.data_preprocessor(data, True)
        _, shown = detector.parse_losses(detector.loss(ready["inputs"], ready["data_samples"]))
    return calls, float(shown["loss"])


@pytest.mark.parametrize("name", DENSE)
def test_the_loss_of_an_image_is_what_the_detector_says_of_it_alone(name: str) -> None:
    detector, packed = build(name), batch(4)
    for layer in detector.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.momentum = 1.0
    losses_of(detector, [0, 1, 2, 3], packed)  # statistics of these images
    detector.eval()  # else its batch norms would see another batch
    packed["data_samples"][1].set_metainfo({"img_shape": (96, 128)})  # one size, so that all are padded alike
    packed["inputs"] = [torch.nn.functional.pad(i, (0, 128 - i.shape[2], 0, 96 - i.shape[1])) for i in packed["inputs"]]
    calls, _ = losses_of(detector, [0, 1, 2, 3], packed)
    before = copy.deepcopy(vars(detector.bbox_head).get("cls_num_pos_samples_per_level"))
    found = image_losses(calls, 4).tolist()
    assert vars(detector.bbox_head).get("cls_num_pos_samples_per_level") == before, "DDOD counts from step to step"
    alone = [losses_of(copy.deepcopy(detector), [image], packed)[1] for image in range(4)]
    assert found == pytest.approx(alone, rel=1e-3)
    assert len({round(value, 5) for value in found}) == 4


@pytest.mark.parametrize("name", TWO_STAGE)
def test_of_two_stages_every_head_counts(name: str) -> None:
    detector, packed = build(name).eval(), batch(3)
    for image in range(3):
        calls, whole = losses_of(detector, [image], packed)
        assert [method for _, method, _ in calls] == ["loss_by_feat"] + ["loss_and_target"] * (len(calls) - 1)
        assert len(calls) == (4 if name == "cascade_rcnn" else 2)
        expected = whole if name != "cascade_rcnn" else None  # whose stages have weights of their own in the sum
        torch.manual_seed(1)  # the anchors of the proposals' loss are a random sample
        found = image_losses(calls, 1)
        assert expected is None or float(found[0]) == pytest.approx(expected, rel=1e-5)
    calls, _ = losses_of(detector, [0, 1, 2], packed)
    _, _, args = calls[-1]
    rows = torch.bincount(args[2][:, 0].long(), minlength=3)
    own = [image_losses([(calls[-1][0], "loss_and_target", args)], 3)]
    both = type(calls[-1][0]).loss_and_target(calls[-1][0], *args)["loss_bbox"]
    total = float(both["loss_cls"] + both["loss_bbox"])
    assert float((own[0] * rows).sum() / rows.sum()) == pytest.approx(total, rel=1e-4)


def test_difficulty_sees_each_positive_once() -> None:
    def reported(with_ranking: bool) -> list[int]:
        detector, counts = build("retinanet"), list[int]()
        LearnLoss().attach(detector)
        detach = read_training(detector, lambda positives: counts.append(len(positives.ious)))
        hook = LearnLossHook()
        if with_ranking:
            hook.before_train(SimpleNamespace(model=detector))
        for _ in range(2):
            ready = detector.data_preprocessor(batch(4), True)
            losses = detector.loss(ready["inputs"], ready["data_samples"])
            assert ("loss_ranking" in losses) == with_ranking
        hook.after_train(None)
        detach()
        assert not {"loss", "extract_feat"} & detector.__dict__.keys()
        assert not {"loss_by_feat", "get_targets"} & detector.bbox_head.__dict__.keys()
        return counts

    with isolated("difficulty"):
        assert reported(True) == reported(False) and sum(reported(False)) > 0


@pytest.mark.parametrize("iteration", [0, 59, 60, 99])
def test_after_its_share_of_the_training_the_module_learns_alone(iteration: int) -> None:
    assert FREE_AFTER == 0.6
    with isolated("share"):
        detector, hook = build("retinanet"), LearnLossHook()
        LearnLoss().attach(detector)
        hook.before_train(SimpleNamespace(model=detector))
        hook.before_train_iter(SimpleNamespace(iter=iteration, max_iters=100), iteration)
        ready = detector.data_preprocessor(batch(4), True)
        detector.loss(ready["inputs"], ready["data_samples"])["loss_ranking"].backward()
    moved = {name.split(".")[0] for name, value in detector.named_parameters() if value.grad is not None}
    assert moved == ({"loss_predictor"} if iteration >= 60 else {"loss_predictor", "backbone", "neck"})


def test_the_detector_starts_as_it_would_without_the_module() -> None:
    torch.manual_seed(5)
    plain = torch.rand(3)
    torch.manual_seed(5)
    LearnLoss().attach(build_quietly("retinanet"))
    torch.manual_seed(5)
    detector = build_quietly("ssd")
    torch.manual_seed(5)
    LearnLoss().attach(detector)
    assert torch.equal(torch.rand(3), plain)
    assert [layer.in_features for layer in detector.loss_predictor.layers] == [16, 32, 64]


def build_quietly(name: str) -> Any:
    with isolated("quiet"):
        return build(name)


# --- a training and what comes of it --------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(zoo_root: Path, train_json: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    work = tmp_path_factory.mktemp("learnloss")
    return train(
        TrainRequest(
            "small", CLASSES, train_json, None, work, 3, "cpu", "random", 40, zoo_root=zoo_root, rival="learnloss"
        )
    )


def test_the_checkpoint_says_what_changed_the_detector(finished: TrainResult) -> None:
    final = load_final(finished.checkpoint, "small", CLASSES)
    assert final.meta["rival"] == "learnloss" and finished.difficulty is not None
    assert {name for name in final.state_dict if name.startswith("loss_predictor.")} >= {"loss_predictor.last.weight"}


def test_inference_says_the_predicted_loss_of_each_image_whatever_its_batch(
    finished: TrainResult, zoo_root: Path, test_json: Path, tmp_path: Path
) -> None:
    other = write_set(tmp_path, 2, seed=9, size=(60, 100), first_id=300)  # another shape, so that batches are padded
    rows = [row for path in (other, test_json) for row in json.loads(path.read_text())["images"]]
    pool = [PoolImage(row["id"], row["file_name"]) for row in rows[:6]]
    detector = PoolInference("small", finished.checkpoint, CLASSES, "cpu", zoo_root)
    together = [result.features["learnloss"] for result in detector.run_with_features(pool, 6)]
    alone = [result.features["learnloss"] for result in detector.run_with_features(pool, 1)]
    assert all(value.shape == (1,) and np.isfinite(value).all() for value in together)
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)
    assert len({float(value[0]) for value in together}) == 6
    assert "extract_feat" not in detector.model.__dict__


def test_without_a_rival_there_is_no_such_feature(trained: TrainResult, zoo_root: Path, test_json: Path) -> None:
    row = json.loads(test_json.read_text())["images"][0]
    detector = PoolInference("small", trained.checkpoint, CLASSES, "cpu", zoo_root)
    (result,) = detector.run_with_features([PoolImage(row["id"], row["file_name"])])
    assert set(result.features) == {"global", "fpn"}


def test_a_training_that_was_cut_off_ends_as_one_that_was_not(
    finished: TrainResult, zoo_root: Path, train_json: Path, tmp_path: Path
) -> None:
    request = TrainRequest(
        "small", CLASSES, train_json, None, tmp_path, 3, "cpu", "random", 40, zoo_root=zoo_root, rival="learnloss"
    )
    polls = iter([False] * 27)
    with pytest.raises(RoundCancelled):
        train(request, should_stop=lambda: next(polls, True))
    with pytest.raises(DetectorError, match=r"another training .it differs in rival"):
        train(replace(request, rival="learnlos"))
    again = load_checkpoint(train(request).checkpoint)["state_dict"]
    whole = load_checkpoint(finished.checkpoint)["state_dict"]
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETR_LIKE)
def test_detectors_with_queries_are_refused(name: str) -> None:
    with pytest.raises(DetectorError, match="expected a detector with a dense or a RoI head for learnloss, got "):
        LearnLoss().change(shrunk(name))


def test_detectors_with_a_teacher_are_refused() -> None:
    with pytest.raises(DetectorError, match="got SoftTeacher; choose another"):
        LearnLoss().change({"type": "SoftTeacher", "detector": {"bbox_head": {}}, "semi_train_cfg": {}})


def test_steps_of_one_image_are_refused() -> None:
    with pytest.raises(DetectorError, match=r"expected at least 2 images a step for learnloss.* got 1; raise the"):
        LearnLoss().hooks(1)


def test_an_unknown_rival_is_refused() -> None:
    with pytest.raises(DetectorError, match=r"expected a rival of learnloss.*, got 'learnlos'"):
        find_rival("learnlos")
