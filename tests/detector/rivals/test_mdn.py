"""Mixture density outputs: formulas, losses and predictions against slow ones, and uncertainties of each detection."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config

from ppal_backend.acquisition.baselines.mdn import WIDTH, image_summary, pool_utilities
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.models import build_model
from ppal_backend.detector.rivals.mdn import COMPONENTS, MDN, box_loss, class_loss, moments
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.train.training import TrainRequest, train
from ppal_backend.errors import DetectorError
from tests.detector.conftest import REPOSITORY, zoo_entry
from tests.detector.families import batch, shrunk, ssd
from tests.detector.shapes import CLASSES

Mixture = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def mixture(seed: int, rows: int, numbers: int, weights: int) -> Mixture:
    torch.manual_seed(seed)
    shape = (rows, COMPONENTS, numbers)
    return torch.randn(shape), torch.rand(shape) + 0.01, torch.randn(rows, COMPONENTS, weights).softmax(1)


# --- slow references ------------------------------------------------------------------------------------


def slow_box_loss(found: Mixture, targets: torch.Tensor, row: int) -> float:
    """The density of the authors' code, coordinate by coordinate."""
    total = 0.0
    for side in range(4):
        density = 0.0
        for k in range(COMPONENTS):
            mean, spread, weight = (float(part[row, k, side]) for part in found)
            height = math.exp(-(((float(targets[row, side]) - mean) / spread) ** 2) / 2)
            density += weight * height / math.sqrt(2 * math.pi) / (spread + 0.3)
        total += -math.log(density) / 2
    return total


def slow_class_loss(found: Mixture, label: int, draws: torch.Tensor, row: int) -> float:
    total = 0.0
    for k in range(COMPONENTS):
        logits = [
            float(found[0][row, k, c]) + math.sqrt(float(found[1][row, k, c])) * float(draws[row, k, c])
            for c in range(found[0].shape[2])
        ]
        total += float(found[2][row, k, 0]) * (math.log(sum(map(math.exp, logits))) - logits[label])
    return total


def slow_utilities(images: list[list[list[float]]]) -> list[float]:
    """The authors' normalisation with lists, for images of at least one detection each."""
    largest = []
    for kind in range(4):
        everything = [row[kind] for image in images for row in image]
        mean, spread = statistics.mean(everything), statistics.pstdev(everything)
        largest.append([(max(row[kind] for row in image) - mean) / spread for image in images])
    return [max(of_image) for of_image in zip(*largest, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_box_loss(seed: int) -> None:
    found = mixture(seed, 5, 4, 4)
    targets = torch.randn(5, 4)
    expected = [slow_box_loss(found, targets, row) for row in range(5)]
    assert box_loss(found, targets).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_target_far_from_all_means_still_teaches() -> None:
    means = torch.zeros(1, COMPONENTS, 4, requires_grad=True)
    flat = torch.full((1, COMPONENTS, 4), 0.25)
    box_loss((means, flat, flat), torch.full((1, 4), 50.0)).sum().backward()  # type: ignore[no-untyped-call]
    assert means.grad is not None and (means.grad < -1).all() and means.grad.isfinite().all()


@pytest.mark.parametrize("classes", [1, 3])
def test_class_loss(classes: int) -> None:
    found = mixture(classes, 6, classes + 1, 1)
    labels, draws = torch.randint(0, classes + 1, (6,)), torch.randn(6, COMPONENTS, classes + 1)
    expected = [slow_class_loss(found, int(labels[row]), draws, row) for row in range(6)]
    assert class_loss(found, labels, draws).tolist() == pytest.approx(expected, rel=1e-4)


def test_moments() -> None:
    found = mixture(7, 3, 4, 4)
    mean, aleatoric, epistemic = moments(found)
    for row in range(3):
        for side in range(4):
            means, spreads, weights = ([float(part[row, k, side]) for k in range(COMPONENTS)] for part in found)
            middle = sum(w * m for w, m in zip(weights, means, strict=True))
            assert float(mean[row, side]) == pytest.approx(middle, abs=1e-5)
            own = sum(w * s for w, s in zip(weights, spreads, strict=True))
            assert float(aleatoric[row, side]) == pytest.approx(own, rel=1e-5)
            between = sum(w * (m - middle) ** 2 for w, m in zip(weights, means, strict=True))
            assert float(epistemic[row, side]) == pytest.approx(between, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_utilities_of_a_pool(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [rng.random((int(rng.integers(1, 5)), 4)).tolist() for _ in range(9)]
    rows = [image_summary(torch.tensor(values), torch.full((len(values),), 0.5)) for values in images]
    found = pool_utilities(torch.stack(rows).numpy())
    assert found.tolist() == pytest.approx(slow_utilities(images), abs=1e-4)


def test_detections_below_a_score_of_one_half_do_not_count_and_images_without_any_come_last() -> None:
    sure = image_summary(torch.tensor([[1.0, 2, 3, 4], [9.0, 9, 9, 9]]), torch.tensor([0.5, 0.499]))
    assert sure.tolist() == [1, 1, 2, 3, 4, 1, 2, 3, 4, 1, 4, 9, 16]
    nothing = image_summary(torch.zeros(0, 4), torch.zeros(0))
    assert nothing.shape == (WIDTH,) and not nothing.any()
    other = image_summary(torch.tensor([[2.0, 1, 3, 4]]), torch.tensor([0.9]))
    assert pool_utilities(torch.stack([sure, nothing, other]).numpy()).tolist() == [1.0, 0.0, 1.0]
    assert pool_utilities(torch.stack([sure, sure]).numpy()).tolist() == [0.0, 0.0], "equal everywhere"
    assert pool_utilities(torch.stack([nothing, nothing]).numpy()).tolist() == [0.0, 0.0]


# --- the head -------------------------------------------------------------------------------------------


def changed(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with isolated("mixtures"):
        built = build_model(Config({"model": ssd()}), "mdn")
        built.init_weights()
    for conv in (*built.bbox_head.cls_convs, *built.bbox_head.reg_convs):
        conv.weight.data *= 0.02  # the pixels of these images are not normalised
    return built


def test_losses_of_a_batch() -> None:
    detector = changed().train()
    head = detector.bbox_head
    with isolated("mixtures"):
        ready = detector.data_preprocessor(batch(3), True)
        samples = ready["data_samples"]
        classes, boxes = head(detector.extract_feat(ready["inputs"]))
        metas, truths = [s.metainfo for s in samples], [s.gt_instances for s in samples]
        torch.manual_seed(4)
        found = head.loss_by_feat(classes, boxes, truths, metas)
        anchors, valid = head.get_anchors([level.shape[-2:] for level in classes], metas, "cpu")
        labels, _, targets, _, positives = head.get_targets(anchors, valid, truths, metas)
    torch.manual_seed(4)
    of_classes = of_boxes = 0.0
    for image in range(3):
        raw_classes, raw_boxes = slow_anchors(classes, image, 9), slow_anchors(boxes, image, 12)
        own, wanted = (torch.cat([level[image] for level in part]) for part in (labels, targets))
        mixed = raw_classes[:, :, :4], raw_classes[:, :, 4:8].sigmoid(), raw_classes[:, :, 8:].softmax(1)
        draws = torch.randn(len(own), COMPONENTS, 4)
        losses = [slow_class_loss(mixed, int(own[row]), draws, row) for row in range(len(own))]
        matched = [row for row in range(len(own)) if own[row] < 3]
        hard = sorted((losses[row] for row in range(len(own)) if own[row] == 3), reverse=True)[: 3 * len(matched)]
        of_classes += sum(losses[row] for row in matched) + sum(hard)
        spread = raw_boxes[:, :, :4], raw_boxes[:, :, 4:8].sigmoid(), raw_boxes[:, :, 8:].softmax(1)
        of_boxes += sum(slow_box_loss(spread, wanted, row) for row in matched)
    assert float(found["loss_cls"].detach()) == pytest.approx(of_classes / positives, rel=1e-4) and of_classes > 0
    assert float(found["loss_bbox"].detach()) == pytest.approx(of_boxes / positives, rel=1e-3)


def slow_anchors(maps: Any, image: int, numbers: int) -> torch.Tensor:
    """``[anchors, K, numbers]`` of one image, cell by cell."""
    rows = []
    for level in maps:
        _, channels, height, width = level.shape
        for y in range(height):
            for x in range(width):
                cell = level[image, :, y, x].detach()
                for anchor in range(channels // (COMPONENTS * numbers)):
                    start = anchor * COMPONENTS * numbers
                    rows.append(cell[start : start + COMPONENTS * numbers].reshape(COMPONENTS, numbers))
    return torch.stack(rows)


def test_predictions_are_the_means_of_the_mixtures() -> None:
    detector = changed().eval()
    head = detector.bbox_head
    with isolated("mixtures"), torch.no_grad():
        maps = detector.extract_feat(detector.data_preprocessor(batch(2), False)["inputs"])
        scores, boxes = head(maps)
        raw = [conv(level) for conv, level in zip(head.cls_convs, maps, strict=True)]
        raw_boxes = [conv(level) for conv, level in zip(head.reg_convs, maps, strict=True)]
    for image in range(2):
        slow, slow_boxes = slow_anchors(raw, image, 9), slow_anchors(raw_boxes, image, 12)
        weights = slow[:, :, 8:].softmax(1)
        expected = (weights * slow[:, :, :4].softmax(2)).sum(1)
        found = torch.cat([level[image].permute(1, 2, 0).reshape(-1, 4) for level in scores]).softmax(1)
        assert torch.allclose(found, expected, atol=1e-5)
        middle = (slow_boxes[:, :, 8:].softmax(1) * slow_boxes[:, :, :4]).sum(1)
        assert torch.allclose(torch.cat([b[image].permute(1, 2, 0).reshape(-1, 4) for b in boxes]), middle, atol=1e-5)
        unsure = torch.cat([level[0][image] for level in head.uncertainties])
        spread = (slow_boxes[:, :, 8:].softmax(1) * slow_boxes[:, :, 4:8].sigmoid()).sum(1).max(1).values
        assert torch.allclose(unsure[:, 0], spread, atol=1e-5)
        of_classes = torch.cat([level[1][image] for level in head.uncertainties])
        between = (weights * (slow[:, :, :4].softmax(2) - expected[:, None]) ** 2).sum(1)
        assert torch.allclose(of_classes[:, 1], between, atol=1e-6)


def test_each_detection_has_the_uncertainty_of_its_own_anchor_and_class(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = changed().eval()
    head = detector.bbox_head
    predicted = head._predicted

    def telling(classes: torch.Tensor, boxes: torch.Tensor) -> Any:
        """Puts the probability itself where the class's uncertainty stands."""
        scores, means = predicted(classes, boxes)
        flat = scores.permute(0, 2, 3, 1).reshape(len(scores), -1, 4).softmax(2)
        head.uncertainties[-1] = (head.uncertainties[-1][0], torch.stack([flat, -flat], 2))
        return scores, means

    monkeypatch.setattr(head, "_predicted", telling)
    with isolated("mixtures"), torch.no_grad():
        for _ in range(2):
            restore, read = MDN().watch(detector)
            samples = detector.test_step(batch(3))
            restore()
            assert sum(len(sample.pred_instances) for sample in samples) > 50
            for sample in samples:
                found = sample.pred_instances["ppal_mixture"]
                assert torch.allclose(found[:, 2], sample.pred_instances.scores, atol=1e-6)
                assert torch.allclose(found[:, 3], -sample.pred_instances.scores, atol=1e-6)
            assert read(samples).shape == (3, WIDTH)
    assert not {"_predict_by_feat_single", "_bbox_post_process"} & head.__dict__.keys()


# --- a training and what comes of it --------------------------------------------------------------------

SMALL = """
_base_ = [{base!r}]
model = dict(backbone=dict(base_channels=8, stem_channels=8), bbox_head=dict(in_channels=(16, 32, 64)))
"""


def test_training_and_inference_leave_a_summary_of_each_image(
    train_json: Path, test_json: Path, tmp_path: Path
) -> None:
    (tmp_path / "zoo.toml").write_text(zoo_entry("small_ssd", "ssd"))
    base = REPOSITORY / "model_zoo" / "ssd_tiny" / "config.py"
    (tmp_path / "small_ssd.py").write_text(SMALL.format(base=str(base)))
    request = TrainRequest(
        "small_ssd",
        CLASSES,
        train_json,
        None,
        tmp_path / "work",
        3,
        "cpu",
        "random",
        40,
        zoo_root=tmp_path,
        rival="mdn",
    )
    result = train(request)
    assert result.difficulty is None and math.isfinite(result.final_loss)
    rows = json.loads(test_json.read_text())["images"][:5]
    pool = [PoolImage(row["id"], row["file_name"]) for row in rows]
    detector = PoolInference("small_ssd", result.checkpoint, CLASSES, "cpu", tmp_path)
    together, alone = (list(detector.run_with_features(pool, size)) for size in (5, 1))
    for found, again in zip(together, alone, strict=True):
        sure = int((found.detections.scores >= 0.5).sum())
        assert found.features["mdn"].shape == (WIDTH,) and found.features["mdn"][0] == sure
        np.testing.assert_allclose(found.features["mdn"], again.features["mdn"], rtol=1e-2, atol=1e-4)
        assert found.detections.softmax and found.detections.class_probs is not None


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn", "dino"])
def test_other_detectors_are_refused(name: str) -> None:
    with pytest.raises(DetectorError, match=r"expected a detector with an SSDHead .* for mdn, got .*choose ssd_tiny"):
        MDN().change(shrunk(name))


def test_a_head_with_stacked_convolutions_is_refused() -> None:
    model = ssd()
    model["bbox_head"]["stacked_convs"] = 1
    with pytest.raises(DetectorError, match="without stacked convolutions"):
        MDN().change(model)
