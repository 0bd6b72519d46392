"""YOLOX selects boxes of all levels at once by its threshold, so its tracer repeats that selection."""

from __future__ import annotations

from typing import Any

import torch

from ppal_backend.detector.probes.base import Restore, override, provider
from ppal_backend.detector.tracers.base import traced_suppression
from ppal_backend.errors import DetectorError


class YOLOXTracer:
    """Repeats the threshold of ``YOLOXHead``. A score is the class probability times objectness."""

    family = "YOLOX"

    def __init__(self, count: bool = False) -> None:
        self._count = count

    def covers(self, detector: Any) -> bool:
        """Detectors whose dense head predicts as ``YOLOXHead`` does."""
        head = getattr(detector, "bbox_head", None)
        return {provider(head, name) for name in ("predict_by_feat", "_bbox_post_process")} == {"YOLOXHead"}

    def is_softmax(self, detector: Any) -> bool:
        """YOLOX gives independent sigmoid probabilities."""
        del detector
        return False

    def attach(self, detector: Any) -> Restore:
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
            if not torch.equal(results.scores, scores):
                raise DetectorError(
                    f"the selection of {type(head).__name__} differs from mmdet's usual one; "
                    f"it cannot be traced in one pass"
                )
            values = (results.bboxes.clone(), levels, probabilities)
            return traced_suppression(
                results, values, cfg, lambda: post_process(results, cfg, *args, **kwargs), self._count
            )

        undo = (override(head, "predict_by_feat", predicting), override(head, "_bbox_post_process", post_processing))

        def restore() -> None:
            for step in undo:
                step()

        return restore


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
