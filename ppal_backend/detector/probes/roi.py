"""RoI box heads: Faster R-CNN, and the last stage of Cascade R-CNN."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.structures.bbox import get_box_tensor

from ppal_backend.detector.probes.base import (
    Positives,
    Restore,
    Sink,
    aligned_iou,
    class_probability,
    override,
    provider,
)


class RoIProbe:
    """Reads ``BBoxHead``: softmax over C + 1 classes and the refined box of the assigned class."""

    family = "RoI heads (Faster R-CNN, Cascade R-CNN)"

    def covers(self, head: torch.nn.Module) -> bool:
        """Box heads with ``BBoxHead``'s own targets and loss and an ordinary softmax."""
        own = {provider(head, name) for name in ("loss_and_target", "get_targets", "_get_targets_single", "loss")}
        return own == {"BBoxHead"} and not getattr(head, "custom_activation", False)

    def attach(self, head: Any, sink: Sink) -> Restore:
        """Report after the loss of the box head."""
        loss_and_target = head.loss_and_target

        def reporting(
            cls_score: Any, bbox_pred: Any, rois: Any, sampling_results: Any, *args: Any, **kwargs: Any
        ) -> Any:
            answer = loss_and_target(cls_score, bbox_pred, rois, sampling_results, *args, **kwargs)
            with torch.no_grad():
                sink(_positives(head, cls_score.detach(), bbox_pred.detach(), rois, sampling_results))
            return answer

        return override(head, "loss_and_target", reporting)


def _positives(head: Any, cls_score: Any, bbox_pred: Any, rois: Any, sampling_results: Any) -> Positives:
    rows, labels, truths, start = [], [], [], 0
    for sampled in sampling_results:
        count = len(sampled.pos_priors)
        rows.append(torch.arange(start, start + count, device=rois.device))
        labels.append(sampled.pos_gt_labels)
        truths.append(get_box_tensor(sampled.pos_gt_bboxes).reshape(-1, 4))
        start += count + len(sampled.neg_priors)
    row, label = torch.cat(rows), torch.cat(labels)
    deltas = bbox_pred[row]
    if not head.reg_class_agnostic:
        size = head.bbox_coder.encode_size
        deltas = deltas.view(len(row), deltas.shape[1] // size, size)[torch.arange(len(row), device=row.device), label]
    boxes = get_box_tensor(head.bbox_coder.decode(rois[row, 1:], deltas))
    probabilities = class_probability(cls_score[row], label, sigmoid=False)
    return Positives(label, probabilities, aligned_iou(boxes, torch.cat(truths).to(boxes)))
