"""Dense heads: RetinaNet, SSD, FCOS, ATSS, GFL, RTMDet and others that predict level by level."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.utils import filter_scores_and_topk

from ppal_backend.detector.probes.base import Restore, override, provider
from ppal_backend.detector.tracers.base import traced_suppression
from ppal_backend.errors import DetectorError

_KNOWN_SELECTION = ("BaseDenseHead", "GFLHead")


class DenseTracer:
    """Repeats the head's deterministic selection level by level, with the full probabilities."""

    family = "dense heads (RetinaNet, SSD, FCOS, ATSS, GFL, RTMDet)"

    def __init__(self, count: bool = False) -> None:
        self._count = count

    def covers(self, detector: Any) -> bool:
        """Detectors with a dense head whose selection per level is mmdet's usual one."""
        head = getattr(detector, "bbox_head", None)
        return (
            not hasattr(detector, "roi_head")
            and provider(head, "_predict_by_feat_single") in _KNOWN_SELECTION
            and provider(head, "_bbox_post_process") == "BaseDenseHead"
        )

    def is_softmax(self, detector: Any) -> bool:
        """Sigmoid or softmax, as the head says."""
        return not detector.bbox_head.use_sigmoid_cls

    def attach(self, detector: Any) -> Restore:
        """Wrap the head's per-image prediction and its post-processing."""
        head = detector.bbox_head
        predict, post_process = head._predict_by_feat_single, head._bbox_post_process
        pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def predicting(cls_score_list: Any, *args: Any, **kwargs: Any) -> Any:
            cfg = kwargs.get("cfg")
            pending.append(self._select(head, cls_score_list, head.test_cfg if cfg is None else cfg))
            return predict(cls_score_list, *args, **kwargs)

        def post_processing(results: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
            scores, levels, probabilities = pending.pop()
            if not torch.equal(results.scores, scores):
                raise DetectorError(
                    f"the selection of {type(head).__name__} differs from mmdet's usual one; "
                    f"it cannot be traced in one pass"
                )
            values = (results.bboxes.clone(), levels, probabilities)
            return traced_suppression(
                results, values, cfg, lambda: post_process(results, cfg, *args, **kwargs), self._count
            )

        undo = [
            override(head, "_predict_by_feat_single", predicting),
            override(head, "_bbox_post_process", post_processing),
        ]

        def restore() -> None:
            for step in undo:
                step()

        return restore

    def _select(self, head: Any, maps: Any, cfg: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores_of, levels_of, probabilities_of = [], [], []
        for level, cls_score in enumerate(maps):
            logits = cls_score.permute(1, 2, 0).reshape(-1, head.cls_out_channels)
            probabilities = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)
            foreground = probabilities if head.use_sigmoid_cls else probabilities[:, :-1]
            scores, _, _, kept = filter_scores_and_topk(
                foreground, cfg.get("score_thr", 0), cfg.get("nms_pre", -1), probabilities
            )
            scores_of.append(scores)
            levels_of.append(torch.full_like(scores, level, dtype=torch.long))
            probabilities_of.append(kept)
        return torch.cat(scores_of), torch.cat(levels_of), torch.cat(probabilities_of)
