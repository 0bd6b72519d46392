"""Heads that match predictions to instances by a cost: the whole matching is done again by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from ppal_backend.detector.heads import Positives, covered_families, detection_head, training_family
from tests.detector.families import CLASSES, DETR_LIKE, TOKENS, WORDS, batch, build
from tests.detector.test_heads_training import (
    Row,
    flat,
    iou,
    loss_step,
    observed,
    priors_of,
    q_of,
    sigmoid,
    softmax,
    truths,
)

# --- the slow reference -------------------------------------------------------------------------------


def corners(box: Sequence[float]) -> list[float]:
    x, y, width, height = box
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def generalised_iou(a: Sequence[float], b: Sequence[float]) -> float:
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    overlap = iou(a, b)
    union = areas / (1 + overlap)
    return overlap - (hull - union) / hull


def class_cost(name: str, logits: Sequence[float], label: int) -> float:
    if name == "detr":
        return -softmax(logits, label)
    p = [sigmoid(value) for value in (logits[:TOKENS] if name == "grounding" else logits)]
    yes = [-math.log(value + 1e-12) * 0.25 * (1 - value) ** 2 for value in p]
    no = [-math.log(1 - value + 1e-12) * 0.75 * value**2 for value in p]
    if name == "grounding":  # every word of the text counts: those of the class, and those that are not
        return 2.0 * sum(yes[i] if i in WORDS[label] else no[i] for i in range(TOKENS))
    return 2.0 * (yes[label] - no[label])


def class_probability(name: str, logits: Sequence[float], label: int) -> float:
    if name == "grounding":
        return sum(sigmoid(logits[word]) for word in WORDS[label]) / len(WORDS[label])
    return softmax(logits, label) if name == "detr" else sigmoid(logits[label])


def detr_reference(outs: Any, samples: Sequence[Any], name: str) -> Iterator[Row]:
    """The cheapest one-to-one matching of the last decoder layer's queries (the last 30: DINO puts noise first)."""
    scores, boxes = outs[0][-1][:, -30:], outs[1][-1][:, -30:]
    for image, sample in enumerate(samples):
        height, width = sample.metainfo["img_shape"]
        size = (width, height, width, height)
        gts = truths(sample)
        queries = list(zip(scores[image].tolist(), boxes[image].tolist(), strict=True))
        cost = np.zeros((len(queries), len(gts)))
        for row, (logits, box) in enumerate(queries):
            for column, (label, gt) in enumerate(gts):
                share = [value / side for value, side in zip(gt, size, strict=True)]
                middle = [
                    (share[0] + share[2]) / 2,
                    (share[1] + share[3]) / 2,
                    share[2] - share[0],
                    share[3] - share[1],
                ]
                apart = sum(abs(a - b) for a, b in zip(box, middle, strict=True))
                pixels = [value * side for value, side in zip(corners(box), size, strict=True)]
                cost[row, column] = class_cost(name, logits, label) + 5 * apart - 2 * generalised_iou(pixels, gt)
        for row, column in zip(*linear_sum_assignment(cost), strict=True):
            logits, box = queries[row]
            label, gt = gts[column]
            pixels = [value * side for value, side in zip(corners(box), size, strict=True)]
            yield label, class_probability(name, logits, label), iou(pixels, gt)


def yolox_reference(head: Any, outs: Any, samples: Sequence[Any]) -> Iterator[Row]:
    """SimOTA: each instance takes its cheapest cells, as many as its ten best overlaps add up to."""
    scores, distances, objectness = outs
    strides = [
        stride[0]
        for stride, level in zip(head.prior_generator.strides, priors_of(head, scores), strict=True)
        for _ in level
    ]
    points = [point for level in priors_of(head, scores) for point in level]
    for image, sample in enumerate(samples):
        gts = truths(sample)
        own, deltas, obj = flat(scores, image, CLASSES), flat(distances, image, 4), flat(objectness, image, 1)
        boxes = []
        for (x, y), (dx, dy, dw, dh), stride in zip(points, deltas, strides, strict=True):
            boxes.append(corners((x + dx * stride, y + dy * stride, math.exp(dw) * stride, math.exp(dh) * stride)))
        for cell, gt in assign_simota(points, strides, boxes, own, obj, gts).items():
            label, box = gts[gt]
            yield label, sigmoid(own[cell][label]), iou(boxes[cell], box)


def assign_simota(points: Any, strides: Any, boxes: Any, own: Any, obj: Any, gts: Any) -> dict[int, int]:
    costs: list[dict[int, float]] = [{} for _ in gts]
    overlaps: list[dict[int, float]] = [{} for _ in gts]
    for cell, ((x, y), stride) in enumerate(zip(points, strides, strict=True)):
        x, y = x + stride / 2, y + stride / 2
        inside = [min(x - b[0], y - b[1], b[2] - x, b[3] - y) > 0 for _, b in gts]
        near = [max(abs(x - (b[0] + b[2]) / 2), abs(y - (b[1] + b[3]) / 2)) < 2.5 * stride for _, b in gts]
        if not any(inside) and not any(near):
            continue
        score = [math.sqrt(sigmoid(value) * sigmoid(obj[cell][0])) for value in own[cell]]
        for gt, (label, box) in enumerate(gts):
            overlap = iou(boxes[cell], box)
            wrong = -sum(math.log(value if k == label else 1 - value) for k, value in enumerate(score))
            costs[gt][cell] = wrong - 3 * math.log(overlap + 1e-7) + (0 if inside[gt] and near[gt] else 1e5)
            overlaps[gt][cell] = overlap
    chosen: dict[int, list[int]] = {}
    for gt in range(len(gts)):
        count = max(1, int(sum(sorted(overlaps[gt].values(), reverse=True)[:10])))
        for cell in sorted(costs[gt], key=costs[gt].__getitem__)[:count]:
            chosen.setdefault(cell, []).append(gt)
    everyone = range(len(gts))
    return {
        cell: owners[0] if len(owners) == 1 else min(everyone, key=lambda gt: costs[gt][cell])
        for cell, owners in chosen.items()
    }


# --- the tests ----------------------------------------------------------------------------------------


def rows(seen: Positives) -> list[tuple[int, float, float]]:
    triples = zip(seen.class_indices.tolist(), seen.probabilities.tolist(), seen.ious.tolist(), strict=True)
    return sorted((label, q_of(p, overlap), p) for label, p, overlap in triples)


@pytest.mark.parametrize("name", ["yolox", *DETR_LIKE])
def test_difficulty_equals_a_matching_done_by_hand(name: str) -> None:
    head, seen, outs, samples = observed(name)
    found = yolox_reference(head, outs, samples) if name == "yolox" else detr_reference(outs, samples, name)
    expected = sorted((label, q_of(p, overlap), p) for label, p, overlap in found)
    assert len(seen) == 1
    got = rows(seen[0])
    assert len(expected) >= 6
    assert [row[0] for row in got] == [row[0] for row in expected]
    np.testing.assert_allclose([row[1:] for row in got], [row[1:] for row in expected], atol=1e-5)


def test_every_covered_family_is_among_those_compared() -> None:
    names = ("retinanet", "atss", "ddod", "fcos", "gfl", "rtmdet", "yolox", "dino", "grounding", "faster_rcnn")
    assert [training_family(detection_head(build(name))).name for name in names] == list(covered_families())


@pytest.mark.parametrize("name", ["dino", "grounding"])
def test_every_instance_counts_once_in_dino_although_noise_queries_match_too(name: str) -> None:
    _, seen, outs, samples = observed(name)
    assert outs[0].shape[2] > 30  # denoising queries were there
    assert sorted(seen[0].class_indices.tolist()) == sorted(label for s in samples for label, _ in truths(s))


def test_a_positive_without_overlap_keeps_its_class() -> None:
    """YOLOX codes the class as a one-hot vector times the overlap, which is zero where boxes do not meet."""
    model, data, seen = build("yolox"), batch(), list[Positives]()
    head = detection_head(model)
    for layer in head.multi_level_conv_reg:
        layer.bias.data[:2] = 200.0  # all boxes lie far outside
    for sample in data["data_samples"]:
        sample.gt_instances.labels[:] = 2
    training_family(head).read_training(head, seen.append)
    loss_step(model, data)
    assert seen[0].ious.max() == 0
    assert set(seen[0].class_indices.tolist()) == {2}
