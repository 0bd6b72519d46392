"""DETR and its relatives: no suppression and no level; the embedding of a box is its query's."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.structures.bbox import scale_boxes

from ppal_backend.detector.probes.base import Restore, override, provider
from ppal_backend.detector.tracers.base import EMBEDDING_FIELD, EXTRA_FIELDS, NO_LEVEL
from ppal_backend.errors import DetectorError


class DETRTracer:
    """Repeats the head's choice of its best queries, and takes what the decoder's last layer says of them."""

    family = "DETR (DETR, Deformable DETR, DINO)"

    def covers(self, detector: Any) -> bool:
        """Detectors whose head predicts image by image as ``DETRHead`` does."""
        head = getattr(detector, "bbox_head", None)
        return provider(head, "_predict_by_feat_single") == "DETRHead" and provider(head, "forward") in (
            "DETRHead",
            "DeformableDETRHead",
        )

    def is_softmax(self, detector: Any) -> bool:
        """DETR has a softmax over C + 1 classes; the others give sigmoid probabilities."""
        return not detector.bbox_head.loss_cls.use_sigmoid

    def attach(self, detector: Any) -> Restore:
        """Wrap the head's forward pass, to keep the queries, and its per-image prediction."""
        head = detector.bbox_head
        forward, predict = head.forward, head._predict_by_feat_single
        pending: list[torch.Tensor] = []

        def forwarding(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            pending[:] = list(hidden_states[-1])
            return forward(hidden_states, *args, **kwargs)

        def predicting(cls_score: Any, bbox_pred: Any, img_meta: Any, rescale: bool = True) -> Any:
            queries = pending.pop(0)
            results = predict(cls_score, bbox_pred, img_meta, rescale)
            rows, probabilities, scores = _select(head, cls_score)
            if not torch.equal(results.scores, scores):
                raise DetectorError(
                    f"the selection of {type(head).__name__} differs from mmdet's usual one; "
                    f"it cannot be traced in one pass"
                )
            boxes = scale_boxes(results.bboxes, img_meta["scale_factor"]) if rescale else results.bboxes.clone()
            values = (boxes, torch.full_like(rows, NO_LEVEL), probabilities[rows], queries[rows])
            for name, value in zip((*EXTRA_FIELDS, EMBEDDING_FIELD), values, strict=True):
                results.set_field(value, name)
            return results

        undo = (override(head, "forward", forwarding), override(head, "_predict_by_feat_single", predicting))

        def restore() -> None:
            for step in undo:
                step()

        return restore


def _select(head: Any, cls_score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query of each prediction, probabilities of all queries, and the score of each prediction."""
    wanted = head.test_cfg.get("max_per_img", len(cls_score))
    if head.loss_cls.use_sigmoid:
        probabilities = cls_score.sigmoid()
        scores, indices = probabilities.view(-1).topk(wanted)
        return indices // head.num_classes, probabilities, scores
    probabilities = cls_score.softmax(-1)
    scores, rows = probabilities[..., :-1].max(-1).values.topk(wanted)
    return rows, probabilities, scores
