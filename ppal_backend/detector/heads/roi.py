"""RoI box heads: Faster R-CNN, and the last stage of Cascade R-CNN."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.layers import multiclass_nms
from mmdet.structures.bbox import get_box_tensor, scale_boxes

from ppal_backend.detector.heads.base import (
    EXTRA_FIELDS,
    Positives,
    Restore,
    Sink,
    aligned_iou,
    class_probability,
    override,
    provider,
)


class RoIFamily:
    """``BBoxHead``: softmax over C + 1 classes and the refined box of the assigned class."""

    name = "RoI heads (Faster R-CNN, Cascade R-CNN)"

    def covers_training(self, head: torch.nn.Module) -> bool:
        """Box heads with ``BBoxHead``'s own targets and loss and an ordinary softmax."""
        own = {provider(head, name) for name in ("loss_and_target", "get_targets", "_get_targets_single", "loss")}
        return own == {"BBoxHead"} and not getattr(head, "custom_activation", False)

    def read_training(self, head: Any, sink: Sink) -> Restore:
        """Report after the loss of the box head."""
        loss_and_target = head.loss_and_target

        def reporting(
            cls_score: Any, bbox_pred: Any, rois: Any, sampling_results: Any, *args: Any, **kwargs: Any
        ) -> Any:
            answer = loss_and_target(cls_score, bbox_pred, rois, sampling_results, *args, **kwargs)
            with torch.no_grad():
                sink(_positives(head, cls_score.detach(), bbox_pred.detach(), rois, sampling_results))
            return answer

        return override(head, loss_and_target=reporting)

    def covers_inference(self, detector: Any) -> bool:
        """Detectors whose last box head predicts as mmdet's ``BBoxHead`` does."""
        return hasattr(detector, "roi_head") and (
            provider(last_box_head(detector), "_predict_by_feat_single") == "BBoxHead"
        )

    def is_softmax(self, detector: Any) -> bool:
        """RoI heads give a softmax over C + 1 classes."""
        del detector
        return True

    def trace_inference(self, detector: Any, count: bool = False) -> Restore:
        """Wrap the per-image prediction of the last box head; nothing is counted."""
        del count
        head = last_box_head(detector)
        extractors = detector.roi_head.bbox_roi_extractor
        extractor = extractors[-1] if hasattr(extractors, "__len__") else extractors
        predict = head._predict_by_feat_single

        def predicting(
            roi: Any, cls_score: Any, bbox_pred: Any, img_meta: Any, rescale: bool = False, rcnn_test_cfg: Any = None
        ) -> Any:
            if rcnn_test_cfg is None:
                return predict(roi, cls_score, bbox_pred, img_meta, rescale=rescale)
            if not len(roi):
                results = predict(roi, cls_score, bbox_pred, img_meta, rescale, rcnn_test_cfg)
                values: tuple[Any, ...] = (
                    results.bboxes.clone(), results.labels.clone(), roi.new_zeros(0, head.num_classes + 1),
                )  # fmt: skip
            else:
                raw = predict(roi, cls_score, bbox_pred, img_meta, rescale=rescale)
                boxes, labels, kept = multiclass_nms(
                    raw.bboxes, raw.scores, rcnn_test_cfg.score_thr, rcnn_test_cfg.nms,
                    rcnn_test_cfg.max_per_img, return_inds=True,
                )  # fmt: skip
                results = raw.__class__(bboxes=boxes[:, :4], scores=boxes[:, -1], labels=labels)
                rows = kept // head.num_classes
                scaled = scale_boxes(results.bboxes, img_meta["scale_factor"]) if rescale else results.bboxes.clone()
                levels = extractor.map_roi_levels(roi, extractor.num_inputs)[rows]
                values = (scaled, levels, raw.scores[rows])
            for name, value in zip(EXTRA_FIELDS, values, strict=True):
                results.set_field(value, name)
            return results

        return override(head, _predict_by_feat_single=predicting)


def last_box_head(detector: Any) -> Any:
    """The box head of a two-stage detector whose boxes are its answer; None where there is none."""
    head = getattr(detector.roi_head, "bbox_head", None)
    return head[-1] if isinstance(head, torch.nn.ModuleList) else head


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
