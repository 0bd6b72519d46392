"""YOLOX: positives are picked image by image (SimOTA), and boxes of all levels at once by a threshold."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.structures.bbox import get_box_tensor

from ppal_backend.detector.heads.base import (
    Kept,
    Positives,
    Restore,
    Sink,
    aligned_iou,
    class_probability,
    concatenate,
    keep_targets_until_after_loss,
    override,
    provider,
    require_same_selection,
    traced_suppression,
)


class YOLOXFamily:
    """``YOLOXHead``.

    In training the class probability counts, without objectness, which is trained on every cell. A score of a
    prediction is that probability times objectness.
    """

    name = "YOLOX"

    def covers_training(self, head: torch.nn.Module) -> bool:
        """Heads with YOLOX's own targets and loss."""
        return {provider(head, name) for name in ("_get_targets_single", "loss_by_feat")} == {"YOLOXHead"}

    def read_training(self, head: Any, sink: Sink) -> Restore:
        """Keep what the targets of each image are computed from, and report after the loss."""

        def report(kept: Kept, cls_scores: Any, *_rest: Any) -> None:
            sink(concatenate([_positives(*item) for item in kept], cls_scores[0].device))

        return keep_targets_until_after_loss(head, "_get_targets_single", report)

    def covers_inference(self, detector: Any) -> bool:
        """Detectors whose dense head predicts as ``YOLOXHead`` does."""
        head = getattr(detector, "bbox_head", None)
        return {provider(head, name) for name in ("predict_by_feat", "_bbox_post_process")} == {"YOLOXHead"}

    def is_softmax(self, detector: Any) -> bool:
        """YOLOX gives independent sigmoid probabilities."""
        del detector
        return False

    def trace_inference(self, detector: Any, count: bool = False) -> Restore:
        """Wrap the head's prediction of a batch and its post-processing of each image."""
        head = detector.bbox_head
        predict, post_process = head.predict_by_feat, head._bbox_post_process
        pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def predicting(cls_scores: Any, bbox_preds: Any, objectnesses: Any, *args: Any, **kwargs: Any) -> Any:
            cfg = args[1] if len(args) > 1 else kwargs.get("cfg")
            threshold = (head.test_cfg if cfg is None else cfg).score_thr
            pending[:] = _select(head.cls_out_channels, cls_scores, objectnesses, threshold)
            return predict(cls_scores, bbox_preds, objectnesses, *args, **kwargs)

        def post_processing(results: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
            scores, levels, probabilities = pending.pop(0)
            require_same_selection(head, results.scores, scores)
            values = (results.bboxes.clone(), levels, probabilities)
            return traced_suppression(results, values, cfg, lambda: post_process(results, cfg, *args, **kwargs), count)

        return override(head, predict_by_feat=predicting, _bbox_post_process=post_processing)


def _positives(args: tuple[Any, ...], targets: Any) -> Positives:
    _, logits, decoded, _, instances = args[:5]
    mask, class_targets, _, box_targets = targets[:4]
    weight, labels = class_targets.max(1) if len(class_targets) else (box_targets.new_zeros(0), mask.new_zeros(0))
    labels = labels.long()
    unclear = weight <= 0  # the class is coded as its overlap, which may be none
    if unclear.any():
        truths = get_box_tensor(instances.bboxes).to(box_targets)
        same = (box_targets[unclear][:, None] == truths[None]).all(-1)
        labels[unclear] = instances.labels[same.int().argmax(1)]
    probabilities = class_probability(logits[mask], labels, sigmoid=True)
    return Positives(labels, probabilities, aligned_iou(decoded[mask], box_targets))


def _select(
    channels: int, cls_scores: Any, objectnesses: Any, threshold: float
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Scores, levels and probabilities of what passes the threshold, image by image."""
    images = len(cls_scores[0])
    logits = [level.permute(0, 2, 3, 1).reshape(images, -1, channels) for level in cls_scores]
    levels = torch.cat([torch.full_like(item[0, :, 0], i, dtype=torch.long) for i, item in enumerate(logits)])
    probabilities = torch.cat(logits, dim=1).sigmoid()
    flat = [level.permute(0, 2, 3, 1).reshape(images, -1) for level in objectnesses]
    objectness = torch.cat(flat, dim=1).sigmoid()
    selected = []
    for image in range(images):
        best = probabilities[image].max(1).values
        passing = objectness[image] * best >= threshold
        scores = best[passing] * objectness[image][passing]
        selected.append((scores, levels[passing], probabilities[image][passing]))
    return selected
