"""Two-stage detectors: Faster R-CNN and Cascade R-CNN."""

from __future__ import annotations

from typing import Any

from mmdet.models.layers import multiclass_nms
from mmdet.structures.bbox import scale_boxes

from ppal_backend.detector.probes import detection_head
from ppal_backend.detector.probes.base import Restore, override, provider
from ppal_backend.detector.tracers.base import EXTRA_FIELDS


class RoITracer:
    """Repeats the box head's own suppression, keeping the index of every surviving proposal."""

    family = "RoI heads (Faster R-CNN, Cascade R-CNN)"

    def covers(self, detector: Any) -> bool:
        """Detectors whose last box head predicts as mmdet's ``BBoxHead`` does."""
        return hasattr(detector, "roi_head") and (
            provider(detection_head(detector), "_predict_by_feat_single") == "BBoxHead"
        )

    def is_softmax(self, detector: Any) -> bool:
        """RoI heads give a softmax over C + 1 classes."""
        del detector
        return True

    def attach(self, detector: Any) -> Restore:
        """Wrap the per-image prediction of the last box head."""
        head: Any = detection_head(detector)
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

        return override(head, "_predict_by_feat_single", predicting)
