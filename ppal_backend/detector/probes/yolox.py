"""YOLOX: positives are picked image by image (SimOTA), so targets are kept image by image too."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.structures.bbox import get_box_tensor

from ppal_backend.detector.probes.base import (
    Kept,
    Positives,
    Restore,
    Sink,
    aligned_iou,
    class_probability,
    concatenate,
    keep_targets_until_after_loss,
    provider,
)


class YOLOXProbe:
    """Reads ``YOLOXHead``. The class probability counts, without objectness, which is trained on every cell."""

    family = "YOLOX"

    def covers(self, head: torch.nn.Module) -> bool:
        """Heads with YOLOX's own targets and loss."""
        return {provider(head, name) for name in ("_get_targets_single", "loss_by_feat")} == {"YOLOXHead"}

    def attach(self, head: Any, sink: Sink) -> Restore:
        """Keep what the targets of each image are computed from, and report after the loss."""

        def report(kept: Kept, cls_scores: Any, *_rest: Any) -> None:
            sink(concatenate([_positives(*item) for item in kept], cls_scores[0].device))

        return keep_targets_until_after_loss(head, "_get_targets_single", report)


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
