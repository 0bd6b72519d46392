"""Traced predictions of every covered family equal plain ones, and carry the right levels and probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mmdet.structures.bbox import bbox_overlaps

from ppal_backend.detector.heads import base, detection_head, inference_family
from ppal_backend.errors import DetectorError, UnsupportedHead
from tests.detector.families import CLASSES, DETR_LIKE, FILES, REFUSED, TWO_STAGE, batch, build


def ready(name: str) -> Any:
    """A detector in evaluation mode whose random predictions differ from place to place."""
    model = build(name).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for item in detection_head(model).parameters():
            item.add_(torch.randn_like(item) * 0.15)
        for layer in getattr(detection_head(model), "rtm_reg", ()):
            layer.bias.add_(2.0)  # distances to the sides that give boxes an area
        for name_of in ("multi_level_conv_obj", "multi_level_conv_cls"):
            for layer in getattr(detection_head(model), name_of, ()):
                layer.bias.add_(4.0)
    config = model.roi_head.test_cfg if name in TWO_STAGE else model.bbox_head.test_cfg
    config.score_thr = 0.005 if name == "rtmdet" else 0.02
    return model


def predict(model: Any, seed: int = 0) -> list[Any]:
    data = batch(seed=seed)
    with torch.no_grad():
        return list(model.test_step({"inputs": data["inputs"], "data_samples": data["data_samples"]}))


def plain_attributes(model: Any) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", list(FILES))
def test_boxes_scores_and_labels_are_the_plain_ones(name: str) -> None:
    model = ready(name)
    family = inference_family(model)
    before = plain_attributes(model)
    restore = family.trace_inference(model)
    traced = predict(model)
    restore()
    assert plain_attributes(model) == before
    plain = predict(model)
    assert sum(len(sample.pred_instances.scores) for sample in plain) >= 5
    for ours, theirs in zip(traced, plain, strict=True):
        assert torch.equal(ours.pred_instances.bboxes, theirs.pred_instances.bboxes)
        assert torch.equal(ours.pred_instances.scores, theirs.pred_instances.scores)
        assert torch.equal(ours.pred_instances.labels, theirs.pred_instances.labels)


HALVES = [(name, torch.float16) for name in FILES]
HALVES += [(name, torch.bfloat16) for name in FILES if name not in TWO_STAGE]  # RoIAlign has none


@pytest.mark.parametrize(("name", "half"), HALVES)
def test_traced_predictions_are_the_plain_ones_in_half_precision_too(name: str, half: torch.dtype) -> None:
    model = ready(name)
    with torch.autocast("cpu", half):
        plain = predict(model)
        inference_family(model).trace_inference(model)
        traced = predict(model)
    assert sum(len(sample.pred_instances.scores) for sample in plain) >= 5
    for ours, theirs in zip(traced, plain, strict=True):
        assert ours.pred_instances.bboxes.dtype == ours.pred_instances.scores.dtype == torch.float32
        assert torch.equal(ours.pred_instances.bboxes, theirs.pred_instances.bboxes)
        assert torch.equal(ours.pred_instances.scores, theirs.pred_instances.scores)


@pytest.mark.parametrize("name", list(FILES))
def test_every_detection_carries_its_own_probabilities_and_network_box(name: str) -> None:
    model = ready(name)
    family = inference_family(model)
    family.trace_inference(model)
    for sample in predict(model):
        found = sample.pred_instances
        own = found.ppal_probs[torch.arange(len(found.scores)), found.labels]
        if family.is_softmax(model):
            assert found.ppal_probs.shape[1] == CLASSES + 1
            np.testing.assert_allclose(found.ppal_probs.sum(1), 1.0, atol=1e-5)
        else:
            assert found.ppal_probs.shape[1] == CLASSES
        if name.startswith("fcos") or name in ("atss", "ddod", "yolox"):
            assert bool((found.scores <= own + 1e-6).all())  # the score is the probability times centre-ness
        else:
            np.testing.assert_allclose(own, found.scores, atol=1e-6)
        np.testing.assert_allclose(found.ppal_boxes, found.bboxes * 0.5, atol=1e-3)


@pytest.mark.parametrize("name", ["retinanet", "ssd", "fcos", "atss", "gfl", "ddod", "rtmdet", "yolox"])
def test_levels_tell_which_map_a_detection_came_from(name: str) -> None:
    """With the scores of all levels but one pushed down, every detection names that level."""
    for wanted in (0, 1):
        model = ready(name)
        head = model.bbox_head
        original = head.forward

        def only(features: Any, original: Any = original, wanted: int = wanted, soft: bool = name == "ssd") -> Any:
            scores, *rest = original(features)
            for level, item in enumerate(scores):
                if level != wanted:
                    item[:, : item.shape[1]] = -30.0
                    if soft:
                        item[:, CLASSES :: CLASSES + 1] = 30.0
            return (scores, *rest)

        head.forward = only
        inference_family(model).trace_inference(model)
        levels = torch.cat([sample.pred_instances.ppal_levels for sample in predict(model)])
        assert len(levels) >= 5
        assert levels.unique().tolist() == [wanted]


def test_each_box_of_yolox_names_its_own_level() -> None:
    """With the box layers silenced, a box is as large as the stride of its level."""
    model = ready("yolox")
    with torch.no_grad():
        for layer in model.bbox_head.multi_level_conv_reg:
            layer.weight.zero_()
            layer.bias.zero_()
    inference_family(model).trace_inference(model)
    seen = set()
    for sample in predict(model):
        found = sample.pred_instances
        widths = (found.ppal_boxes[:, 2] - found.ppal_boxes[:, 0]).tolist()
        assert widths == pytest.approx([8 * 2**level for level in found.ppal_levels.tolist()], rel=1e-4)
        seen |= set(found.ppal_levels.tolist())
    assert len(seen) >= 2


def test_levels_of_proposals_follow_their_size() -> None:
    model = ready("faster_rcnn")
    rois: list[torch.Tensor] = []
    head = detection_head(model)
    original = head._predict_by_feat_single

    def remember(roi: Any, *args: Any, **kwargs: Any) -> Any:
        rois.append(roi)
        return original(roi, *args, **kwargs)

    head._predict_by_feat_single = remember
    inference_family(model).trace_inference(model)
    samples = predict(model)
    seen = set()
    for roi, sample in zip(rois[: len(samples)], samples, strict=True):
        sides = ((roi[:, 3] - roi[:, 1]) * (roi[:, 4] - roi[:, 2])).sqrt()
        possible = {int(np.clip(np.floor(np.log2(side / 6 + 1e-6)), 0, 3)) for side in sides.tolist()}
        found = sample.pred_instances
        nearest = bbox_overlaps(found.ppal_boxes, roi[:, 1:]).argmax(1)
        assert set(found.ppal_levels.tolist()) <= possible
        seen |= set(found.ppal_levels.tolist())
        assert len(nearest) == len(found.scores)
    assert len(seen) >= 2


@pytest.mark.parametrize("name", [name for name in DETR_LIKE if name != "grounding"])
def test_embeddings_of_queries_give_the_probabilities_back(name: str) -> None:
    """The head's last classifier, applied to the embedding of a detection, must say what the detection says."""
    model = ready(name)
    head = model.bbox_head
    inference_family(model).trace_inference(model)
    classifier = head.fc_cls if name == "detr" else head.cls_branches[model.decoder.num_layers - 1]
    for sample in predict(model):
        found = sample.pred_instances
        assert found.ppal_embeddings.shape == (25, 32)
        with torch.no_grad():
            logits = classifier(found.ppal_embeddings)
        expected = logits.softmax(-1) if name == "detr" else logits.sigmoid()
        np.testing.assert_allclose(found.ppal_probs, expected, atol=1e-5)
        assert set(found.ppal_levels.tolist()) == {-1}
    assert len({tuple(s.pred_instances.ppal_embeddings[0].tolist()) for s in predict(model)}) > 1


@pytest.mark.parametrize("name", list(FILES))
def test_the_order_in_a_batch_changes_nothing(name: str) -> None:
    model = ready(name)
    inference_family(model).trace_inference(model)
    data = batch()
    order = [2, 0, 1]
    with torch.no_grad():
        straight = model.test_step({key: list(value) for key, value in data.items()})
        mixed = model.test_step({key: [value[i] for i in order] for key, value in batch().items()})
    for place, original in enumerate(order):
        ours, theirs = mixed[place].pred_instances, straight[original].pred_instances
        np.testing.assert_allclose(ours.ppal_probs, theirs.ppal_probs, atol=1e-5)
        np.testing.assert_allclose(ours.bboxes, theirs.bboxes, atol=1e-3)


def overlap(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height) if areas > 0 else 0.0


@pytest.mark.parametrize("name", ["retinanet", "ssd", "fcos", "yolox"])
def test_boxes_that_suppression_joined_are_counted(name: str) -> None:
    """Counted once more in plain loops, from what the head handed to its own suppression."""
    model = ready(name)
    head = model.bbox_head
    original, before = head._bbox_post_process, []

    def remember(results: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        before.append((results.bboxes.tolist(), results.labels.tolist(), cfg.nms.iou_threshold))
        return original(results, cfg, *args, **kwargs)

    head._bbox_post_process = remember
    for layer in getattr(head, "multi_level_conv_reg", ()):
        with torch.no_grad():
            layer.bias.add_(2.0)  # boxes so large that neighbours overlap
    inference_family(model).trace_inference(model, count=True)
    samples = predict(model)
    counted = []
    for sample, (boxes, labels, threshold) in zip(samples, before, strict=True):
        found = sample.pred_instances[::5]
        for box, label, count in zip(found.ppal_boxes.tolist(), found.labels, found.ppal_counts, strict=True):
            near = [overlap(box, other) for other, own in zip(boxes, labels, strict=True) if own == label]
            assert sum(value > threshold + 1e-4 for value in near) <= count
            assert count <= max(1, sum(value > threshold - 1e-4 for value in near))
            counted.append(int(count))
    assert min(counted) >= 1 and max(counted) >= 2


def test_counting_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 9, 9], [50, 50, 60, 60], [0, 0, 10, 10.0]])
    labels = torch.tensor([0, 0, 0, 0, 1])
    whole = base.count_supporters(boxes, labels, boxes, labels, 0.85)
    assert whole.tolist() == [2, 3, 2, 1, 1]  # overlaps 0.9, 0.81 and 0.9 of the first three
    monkeypatch.setattr(base, "_ROWS_AT_ONCE", 2)
    assert base.count_supporters(boxes, labels, boxes, labels, 0.85).tolist() == whole.tolist()
    assert base.count_supporters(boxes[:0], labels[:0], boxes, labels, 0.85).shape == (0,)


def test_images_without_detections_carry_empty_fields() -> None:
    for name in ("retinanet", "yolox", "faster_rcnn"):
        model = ready(name)
        config = model.roi_head.test_cfg if name in TWO_STAGE else model.bbox_head.test_cfg
        config.score_thr = 2.0
        inference_family(model).trace_inference(model)
        for sample in predict(model):
            assert len(sample.pred_instances.scores) == 0
            assert sample.pred_instances.ppal_probs.shape == (0, CLASSES + (name in TWO_STAGE))


def test_a_selection_that_differs_is_noticed() -> None:
    """Were a head to select otherwise than it is repeated, probabilities would go to the wrong boxes."""
    model = ready("retinanet")
    head = model.bbox_head
    original = head._bbox_post_process

    def reordered(results: Any, *args: Any, **kwargs: Any) -> Any:
        return original(results, *args, **kwargs)

    inference_family(model).trace_inference(model)
    traced = head._bbox_post_process

    def tampered(results: Any, *args: Any, **kwargs: Any) -> Any:
        results.scores = results.scores.flip(0)
        return traced(results, *args, **kwargs)

    head._bbox_post_process = tampered
    with pytest.raises(DetectorError, match="cannot be traced"):
        predict(model)


def test_a_family_without_a_tracer_is_refused() -> None:
    class Other(torch.nn.Module):
        bbox_head = torch.nn.Linear(1, 1)

    with pytest.raises(UnsupportedHead, match="RetinaNet"):
        inference_family(Other())
    assert inference_family(build("free_anchor")).name  # predicts as RetinaNet does, though it trains otherwise
    assert set(REFUSED) >= {"free_anchor"}
