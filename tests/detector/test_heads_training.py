"""Each head family against a slow reference that works from the head's raw outputs, one positive at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ppal_backend.acquisition.difficulty import DifficultyEMA
from ppal_backend.detector.heads import Positives, covered_families, detection_head, training_family
from ppal_backend.detector.heads.base import aligned_iou
from ppal_backend.detector.train.hooks import DifficultyHook
from ppal_backend.errors import UnsupportedHead
from tests.detector.families import CLASSES, DETR_LIKE, FILES, REFUSED, TWO_STAGE, batch, build

Row = tuple[int, float, float]
XI = 0.6
ELSEWHERE = ("ddod", "rtmdet", "yolox", *DETR_LIKE)  # they match by a cost and have tests of their own


# --- the slow reference -------------------------------------------------------------------------------


def q_of(probability: float, overlap: float) -> float:
    """Eq. 1, written out."""
    return 1.0 - probability**XI * overlap ** (1.0 - XI)


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def softmax(values: Sequence[float], index: int) -> float:
    top = max(values)
    return math.exp(values[index] - top) / sum(math.exp(value - top) for value in values)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def decode(prior: Sequence[float], deltas: Sequence[float], stds: Sequence[float]) -> list[float]:
    """Boxes from (dx, dy, dw, dh) around a prior."""
    width, height = prior[2] - prior[0], prior[3] - prior[1]
    x, y = (prior[0] + prior[2]) / 2, (prior[1] + prior[3]) / 2
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas, stds, strict=True))
    limit = abs(math.log(16 / 1000))
    x, y = x + dx * width, y + dy * height
    width *= math.exp(min(max(dw, -limit), limit))
    height *= math.exp(min(max(dh, -limit), limit))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def priors_of(head: Any, maps: Sequence[torch.Tensor]) -> list[list[list[float]]]:
    """Anchors (or points) of each level, in the order rows, columns, anchors."""
    return [
        level.tolist() for level in head.prior_generator.grid_priors([item.shape[-2:] for item in maps], device="cpu")
    ]


def cells(maps: Sequence[torch.Tensor], image: int, level: int, width: int) -> list[list[float]]:
    """Channels of every anchor of a level, in the order rows, columns, anchors."""
    _, channels, rows, columns = maps[level].shape
    found = []
    for row in range(rows):
        for column in range(columns):
            values = maps[level][image, :, row, column].tolist()
            found += [values[start : start + width] for start in range(0, channels, width)]
    return found


def flat(maps: Sequence[torch.Tensor], image: int, width: int) -> list[list[float]]:
    return [item for level in range(len(maps)) for item in cells(maps, image, level, width)]


def truths(sample: Any) -> list[tuple[int, list[float]]]:
    boxes, labels = sample.gt_instances.bboxes, sample.gt_instances.labels.tolist()
    boxes = boxes.tensor if hasattr(boxes, "tensor") else boxes
    return list(zip(labels, boxes.tolist(), strict=True))


def assign_max_iou(priors: list[list[float]], gts: list[tuple[int, list[float]]], all_best: bool) -> dict[int, int]:
    """Prior -> instance: best overlap from 0.5, and for each instance its own best priors (or the first)."""
    overlaps = np.array([[iou(prior, box) for _, box in gts] for prior in priors], dtype=np.float32)
    chosen = {}
    for prior in range(len(priors)):
        if overlaps[prior].max() >= np.float32(0.5):
            chosen[prior] = int(overlaps[prior].argmax())
    for gt in range(len(gts)):
        best = overlaps[:, gt].max()
        same = np.flatnonzero(np.isclose(overlaps[:, gt], best, rtol=1e-6)) if all_best else [overlaps[:, gt].argmax()]
        for prior in same:
            chosen[int(prior)] = gt
    return chosen


def assign_atss(levels: list[list[list[float]]], gts: list[tuple[int, list[float]]]) -> dict[int, int]:
    """Nearest nine priors of each level, kept above mean + deviation of their overlaps and inside the instance."""
    priors = [prior for level in levels for prior in level]
    best: dict[int, tuple[float, int]] = {}
    for gt, (_, box) in enumerate(gts):
        centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        candidates, start = [], 0
        for level in levels:
            distance = [math.hypot((p[0] + p[2]) / 2 - centre[0], (p[1] + p[3]) / 2 - centre[1]) for p in level]
            candidates += [start + i for i in sorted(range(len(level)), key=lambda i: distance[i])[:9]]
            start += len(level)
        overlaps = [iou(priors[i], box) for i in candidates]
        threshold = float(np.mean(overlaps) + np.std(overlaps, ddof=1))
        for i, overlap in zip(candidates, overlaps, strict=True):
            x, y = (priors[i][0] + priors[i][2]) / 2, (priors[i][1] + priors[i][3]) / 2
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= threshold and inside and overlap > best.get(i, (-1.0, 0))[0]:
                best[i] = (overlap, gt)
    return {prior: gt for prior, (_, gt) in best.items()}


def anchor_reference(head: Any, outs: Any, samples: Sequence[Any], all_best: bool, soft: bool) -> Iterator[Row]:
    scores, deltas = outs
    priors = [prior for level in priors_of(head, scores) for prior in level]
    stds = head.bbox_coder.stds
    for image, sample in enumerate(samples):
        gts = truths(sample)
        if not gts:
            continue
        own_scores, own_deltas = flat(scores, image, head.cls_out_channels), flat(deltas, image, 4)
        for prior, gt in assign_max_iou(priors, gts, all_best).items():
            label, box = gts[gt]
            logits = own_scores[prior]
            probability = softmax(logits, label) if soft else sigmoid(logits[label])
            yield label, probability, iou(decode(priors[prior], own_deltas[prior], stds), box)


def atss_reference(head: Any, outs: Any, samples: Sequence[Any]) -> Iterator[Row]:
    scores, deltas = outs[:2]
    levels = priors_of(head, scores)
    priors = [prior for level in levels for prior in level]
    for image, sample in enumerate(samples):
        gts = truths(sample)
        own_scores, own_deltas = flat(scores, image, CLASSES), flat(deltas, image, 4)
        for prior, gt in (assign_atss(levels, gts) if gts else {}).items():
            label, box = gts[gt]
            predicted = decode(priors[prior], own_deltas[prior], (0.1, 0.1, 0.2, 0.2))
            yield label, sigmoid(own_scores[prior][label]), iou(predicted, box)


def gfl_reference(head: Any, outs: Any, samples: Sequence[Any]) -> Iterator[Row]:
    scores, distributions = outs
    levels = priors_of(head, scores)
    strides = [stride[0] for stride, level in zip(head.prior_generator.strides, levels, strict=True) for _ in level]
    priors = [prior for level in levels for prior in level]
    for image, sample in enumerate(samples):
        gts = truths(sample)
        own_scores, own = flat(scores, image, CLASSES), flat(distributions, image, 4 * 17)
        for prior, gt in (assign_atss(levels, gts) if gts else {}).items():
            label, box = gts[gt]
            distance = []
            for side in range(4):
                bins = own[prior][17 * side : 17 * side + 17]
                distance.append(strides[prior] * sum(i * softmax(bins, i) for i in range(17)))
            x, y = (priors[prior][0] + priors[prior][2]) / 2, (priors[prior][1] + priors[prior][3]) / 2
            predicted = [x - distance[0], y - distance[1], x + distance[2], y + distance[3]]
            yield label, sigmoid(own_scores[prior][label]), iou(predicted, box)


def fcos_reference(head: Any, outs: Any, samples: Sequence[Any]) -> Iterator[Row]:
    scores, distances = outs[:2]
    levels = priors_of(head, scores)
    for image, sample in enumerate(samples):
        gts = truths(sample)
        for level, points in enumerate(levels):
            low, high = head.regress_ranges[level]
            unit = head.strides[level] if head.norm_on_bbox else 1
            own_scores, own = cells(scores, image, level, CLASSES), cells(distances, image, level, 4)
            for index, (x, y) in enumerate(points):
                fits = []
                for gt, (_, box) in enumerate(gts):
                    sides = (x - box[0], y - box[1], box[2] - x, box[3] - y)
                    if min(sides) > 0 and low <= max(sides) <= high:
                        fits.append(((box[2] - box[0]) * (box[3] - box[1]), gt))
                if fits:
                    label, box = gts[min(fits)[1]]
                    left, top, right, bottom = (value * unit for value in own[index])
                    predicted = (x - left, y - top, x + right, y + bottom)
                    yield label, sigmoid(own_scores[index][label]), iou(predicted, box)


def roi_reference(head: Any, calls: Sequence[dict[str, Any]]) -> Iterator[Row]:
    for call in calls:
        row = 0
        for sampled in call["sampling_results"]:
            for index, label in enumerate(sampled.pos_gt_labels.tolist()):
                values = call["bbox_pred"][row + index].tolist()
                deltas = values if head.reg_class_agnostic else values[4 * label : 4 * label + 4]
                predicted = decode(call["rois"][row + index, 1:].tolist(), deltas, head.bbox_coder.stds)
                probability = softmax(call["cls_score"][row + index].tolist(), label)
                yield label, probability, iou(predicted, sampled.pos_gt_bboxes[index].tolist())
            row += len(sampled.pos_priors) + len(sampled.neg_priors)


# --- the tests ----------------------------------------------------------------------------------------


def loss_step(model: Any, data: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(1)
    prepared = model.data_preprocessor(data, True)
    return model.loss(prepared["inputs"], prepared["data_samples"])  # type: ignore[no-any-return]


def observed(name: str) -> tuple[Any, list[Positives], Any, Any]:
    """Run one loss while its difficulty is read: head, what it reported, raw outputs, samples."""
    model, data, seen = build(name), batch(), list[Positives]()
    head = detection_head(model)
    raw: list[Any] = []
    handle = head.register_forward_hook(lambda module, inputs, output: raw.append(output))
    calls: list[dict[str, Any]] = []
    if name in TWO_STAGE:
        original = head.loss_and_target

        def remember(*args: Any, **kwargs: Any) -> Any:
            names = ("cls_score", "bbox_pred", "rois", "sampling_results")
            calls.append({**dict(zip(names, args, strict=False)), **kwargs})
            return original(*args, **kwargs)

        head.loss_and_target = remember
    restore = training_family(head).read_training(head, seen.append)
    loss_step(model, data)
    restore()
    handle.remove()
    return head, seen, calls or raw[0], data["data_samples"]


def reference(name: str, head: Any, outs: Any, samples: Any) -> list[Row]:
    if name in TWO_STAGE:
        return list(roi_reference(head, outs))
    if name.startswith("fcos"):
        return list(fcos_reference(head, outs, samples))
    if name == "gfl":
        return list(gfl_reference(head, outs, samples))
    if name == "atss":
        return list(atss_reference(head, outs, samples))
    return list(anchor_reference(head, outs, samples, all_best=name != "ssd", soft=name == "ssd"))


@pytest.mark.parametrize("name", [name for name in FILES if name not in ELSEWHERE])
def test_difficulty_equals_brute_force_from_raw_outputs(name: str) -> None:
    head, seen, outs, samples = observed(name)
    assert len(seen) == 1
    expected = sorted((label, q_of(p, overlap), p) for label, p, overlap in reference(name, head, outs, samples))
    got = sorted(
        (int(label), q_of(float(p), float(overlap)), float(p))
        for label, p, overlap in zip(seen[0].class_indices, seen[0].probabilities, seen[0].ious, strict=True)
    )
    assert len(expected) >= 8
    assert [row[0] for row in got] == [row[0] for row in expected]
    np.testing.assert_allclose([row[1:] for row in got], [row[1:] for row in expected], atol=1e-5)


def watched_step(model: Any, data: Any, targets_method: str, seen: list[Positives]) -> tuple[list[Any], list[Any]]:
    """What a head's target method and the head itself return in a step whose positives are read into ``seen``."""
    head, kept, raw = detection_head(model), list[Any](), list[Any]()
    original = getattr(head, targets_method)

    def remember(*args: Any, **kwargs: Any) -> Any:
        kept.append(original(*args, **kwargs))
        return kept[-1]

    setattr(head, targets_method, remember)
    head.register_forward_hook(lambda module, inputs, output: raw.append(output))
    training_family(head).read_training(head, seen.append)
    loss_step(model, data)
    return kept, raw


def test_ddod_counts_the_classification_assigner() -> None:
    """Its assigners weigh predictions, so targets are asked of the head; everything after is written out."""
    model, data, seen = build("ddod"), batch(), list[Positives]()
    head = detection_head(model)
    kept, raw = watched_step(model, data, "get_cls_targets", seen)
    scores, deltas = raw[0][:2]
    priors = [prior for level in priors_of(head, scores) for prior in level]
    expected = []
    for image, sample in enumerate(data["data_samples"]):
        labels = [label for level in kept[0][1] for label in level[image].tolist()]
        targets = [target for level in kept[0][3] for target in level[image].tolist()]
        own_scores, own_deltas = flat(scores, image, CLASSES), flat(deltas, image, 4)
        for index, label in enumerate(labels):
            if label < CLASSES:
                stds = (0.1, 0.1, 0.2, 0.2)
                box = decode(priors[index], targets[index], stds)
                assert any(np.allclose(box, other, atol=1e-2) for _, other in truths(sample))
                predicted = decode(priors[index], own_deltas[index], stds)
                expected.append((label, q_of(sigmoid(own_scores[index][label]), iou(predicted, box))))
    got = [
        (int(label), q_of(float(p), float(overlap)))
        for label, p, overlap in zip(seen[0].class_indices, seen[0].probabilities, seen[0].ious, strict=True)
    ]
    assert len(got) >= 8
    np.testing.assert_allclose(sorted(got), sorted(expected), atol=1e-5)


def test_rtmdet_reads_the_boxes_it_assigned() -> None:
    """Its assigner is dynamic, so targets are asked of the head; boxes are decoded by hand from raw distances."""
    model, data, seen = build("rtmdet"), batch(), list[Positives]()
    head = detection_head(model)
    kept, raw = watched_step(model, data, "get_targets", seen)
    scores, distances = raw[0]
    points = priors_of(head, scores)
    expected = []
    for image in range(len(data["data_samples"])):
        for level, labels in enumerate(kept[0][1]):
            own_scores, own = cells(scores, image, level, CLASSES), cells(distances, image, level, 4)
            for index, label in enumerate(labels[image].tolist()):
                if label < CLASSES:
                    (x, y), (left, top, right, bottom) = points[level][index], own[index]
                    predicted = (x - left, y - top, x + right, y + bottom)
                    target = kept[0][3][level][image, index].tolist()
                    expected.append((label, q_of(sigmoid(own_scores[index][label]), iou(predicted, target))))
    got = [
        (int(label), q_of(float(p), float(overlap)))
        for label, p, overlap in zip(seen[0].class_indices, seen[0].probabilities, seen[0].ious, strict=True)
    ]
    assert len(got) >= 6
    np.testing.assert_allclose(sorted(got), sorted(expected), atol=1e-5)


@pytest.mark.parametrize("name", list(FILES))
def test_losses_and_gradients_are_bitwise_the_same_while_difficulty_is_read(name: str) -> None:
    outcomes = []
    for attached in (False, True):
        model = build(name)
        head = detection_head(model)
        restore = training_family(head).read_training(head, lambda positives: None) if attached else lambda: None
        losses = loss_step(model, batch())
        total, _ = model.parse_losses(losses)
        total.backward()
        restore()
        gradients = [item.grad for item in model.parameters() if item.grad is not None]
        outcomes.append((total.detach(), gradients))
        assert torch.equal(outcomes[0][0], outcomes[-1][0])
    assert len(outcomes[0][1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(outcomes[0][1], outcomes[1][1], strict=True))


@pytest.mark.parametrize("name", list(FILES))
def test_detaching_leaves_the_head_as_it_was(name: str) -> None:
    model = build(name)
    head = detection_head(model)
    before = dict(head.__dict__)
    seen: list[Positives] = []
    restore = training_family(head).read_training(head, seen.append)
    assert head.__dict__ != before
    restore()
    assert head.__dict__ == before
    loss_step(model, batch())
    assert seen == []


@pytest.mark.parametrize(
    "name", ["retinanet", "ssd", "fcos", "atss", "gfl", "rtmdet", "yolox", "dino", "grounding", "faster_rcnn"]
)
def test_a_batch_without_instances_reports_none(name: str) -> None:
    model, seen = build(name), list[Positives]()
    head = detection_head(model)
    training_family(head).read_training(head, seen.append)
    loss_step(model, batch(images=1))
    assert [len(item.ious) for item in seen] == [0]


@pytest.mark.parametrize("name", ["retinanet", "ssd", "fcos", "atss", "gfl"])
def test_mixed_precision_says_nearly_the_same(name: str) -> None:
    """The families without mmcv's operators, whose positives do not depend on what is predicted."""
    hooks = []
    for half in (False, True):
        model = build(name)
        hook = DifficultyHook(DifficultyEMA(CLASSES, momentum=0.5), XI)
        hook.before_train(SimpleNamespace(model=model))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss_step(model, batch())
        hook.after_train_iter(None, 0)
        hooks.append(hook)
    full, mixed = (hook.ema.difficulty for hook in hooks)
    assert torch.equal(hooks[0].ema.momentum, hooks[1].ema.momentum) and not torch.equal(full, mixed)
    assert torch.allclose(full, mixed, atol=0.01)


@pytest.mark.parametrize("name", list(REFUSED))
def test_heads_that_differ_are_refused_by_name(name: str) -> None:
    head = detection_head(build(name))
    with pytest.raises(UnsupportedHead, match=type(head).__name__) as caught:
        training_family(head)
    assert all(family in str(caught.value) for family in covered_families())


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedHead, match="Linear"):
        detection_head(torch.nn.Linear(1, 1))


def test_overlap_in_pairs() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 1, 1], [1, 1, 1, 1]])
    others = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 6, 6], [1, 1, 1, 1]])
    assert aligned_iou(boxes, others).tolist() == pytest.approx([1.0, 1 / 7, 0.0, 0.0])


def test_positives_must_agree_in_length() -> None:
    with pytest.raises(ValueError, match="one shape"):
        Positives(torch.zeros(2).long(), torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("name", ["retinanet", "fcos", "gfl", "rtmdet", "yolox", "ssd"])
def test_losses_are_computed_in_full_precision_of_a_network_in_half(name: str) -> None:
    model = build(name).train()
    head, kinds = model.bbox_head, []
    losses = head.loss_by_feat

    def watched(*results: Any, **more: Any) -> Any:
        kinds.extend(item.dtype for level in results if isinstance(level, list | tuple) for item in level
                     if isinstance(item, torch.Tensor))  # fmt: skip
        return losses(*results, **more)

    head.loss_by_feat = watched
    with torch.autocast("cpu", torch.bfloat16):
        data = model.data_preprocessor(batch(), training=True)
        features = model.extract_feat(data["inputs"])
        model.bbox_head.loss(features, data["data_samples"])
    assert features[0].dtype == torch.bfloat16
    assert set(kinds) == {torch.float32}
