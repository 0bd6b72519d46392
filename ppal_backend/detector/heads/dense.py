"""Heads that predict level by level: what RetinaNet, SSD, FCOS, ATSS, GFL and RTMDet have in common."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.utils import filter_scores_and_topk

from ppal_backend.detector.heads.base import (
    Cells,
    Kept,
    Positives,
    Restore,
    Sink,
    aligned_iou,
    class_probability,
    concatenate,
    keep_targets_until_after_loss,
    override,
    positive_cells,
    provider,
    require_same_selection,
    traced_suppression,
)

_KNOWN_SELECTION = ("BaseDenseHead", "GFLHead")


class DenseFamily:
    """The training loop over levels, and the deterministic selection per level repeated with full probabilities.

    A family says which heads are its own and how boxes of a level are decoded.
    """

    name = ""
    targets_method = "get_targets"
    labels_at = 1
    """Where the labels of all levels stand in what the target method returns."""
    head_class = ""
    """The class of mmdetection that a head's targets and loss have to come from."""
    own_methods: tuple[str, ...] = ("get_targets", "_get_targets_single", "loss_by_feat", "loss_by_feat_single")
    """The methods that give them."""

    def covers_training(self, head: torch.nn.Module) -> bool:
        """Heads with the class's own targets and loss; others that derive from it and differ are refused."""
        return {provider(head, method) for method in self.own_methods} == {self.head_class}

    def boxes(
        self, head: Any, level: int, cells: Cells, bbox_pred: torch.Tensor, args: tuple[Any, ...], targets: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted and true boxes of a level's positives, ``[n, 4]`` each in one frame.

        Args:
            head: The head.
            level: Index of the level.
            cells: Where the positives are.
            bbox_pred: Box predictions of the level, ``[N, channels, H, W]``.
            args: What the target method was called with.
            targets: What it returned.
        """
        raise NotImplementedError

    def read_training(self, head: Any, sink: Sink) -> Restore:
        """Keep the targets that the loss computes, and report after the loss."""

        def report(kept: Kept, cls_scores: Any, bbox_preds: Any, *_rest: Any) -> None:
            for args, targets in kept:
                sink(self._positives(head, cls_scores, bbox_preds, args, targets))

        return keep_targets_until_after_loss(head, self.targets_method, report)

    def _positives(self, head: Any, cls_scores: Any, bbox_preds: Any, args: tuple[Any, ...], targets: Any) -> Positives:
        parts = []
        for level, labels in enumerate(targets[self.labels_at]):
            cells = positive_cells(labels, cls_scores[level], head.num_classes)
            if not len(cells.flat):
                continue
            boxes, truths = self.boxes(head, level, cells, bbox_preds[level], args, targets)
            logits = cells.gather(cls_scores[level], head.cls_out_channels)
            probabilities = class_probability(logits, cells.labels, head.use_sigmoid_cls)
            parts.append(Positives(cells.labels, probabilities, aligned_iou(boxes, truths)))
        return concatenate(parts, cls_scores[0].device)

    def covers_inference(self, detector: Any) -> bool:
        """Detectors with a head of this family whose selection per level is mmdet's usual one."""
        return selects_by_level(detector) and self.covers_training(detector.bbox_head)

    def is_softmax(self, detector: Any) -> bool:
        """Sigmoid or softmax, as the head says."""
        return not detector.bbox_head.use_sigmoid_cls

    def trace_inference(self, detector: Any, count: bool = False) -> Restore:
        """Wrap the head's per-image prediction and its post-processing."""
        head = detector.bbox_head
        predict, post_process = head._predict_by_feat_single, head._bbox_post_process
        pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def predicting(cls_score_list: Any, *args: Any, **kwargs: Any) -> Any:
            cfg = kwargs.get("cfg")
            pending.append(_select(head, cls_score_list, head.test_cfg if cfg is None else cfg))
            return predict(cls_score_list, *args, **kwargs)

        def post_processing(results: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
            scores, levels, probabilities = pending.pop()
            require_same_selection(head, results.scores, scores)
            values = (results.bboxes.clone(), levels, probabilities)
            return traced_suppression(results, values, cfg, lambda: post_process(results, cfg, *args, **kwargs), count)

        return override(head, _predict_by_feat_single=predicting, _bbox_post_process=post_processing)


class OtherDenseFamily(DenseFamily):
    """Dense heads of any other training, such as FreeAnchor's: only their predictions are traced."""

    name = "other dense heads"

    def covers_training(self, head: torch.nn.Module) -> bool:
        """None: the targets of an unknown head may mean anything."""
        del head
        return False

    def covers_inference(self, detector: Any) -> bool:
        """Detectors with a dense head whose selection per level is mmdet's usual one."""
        return selects_by_level(detector)


def selects_by_level(detector: Any) -> bool:
    """Whether a detector has a dense head that selects its boxes level by level as mmdet usually does."""
    head = getattr(detector, "bbox_head", None)
    return (
        not hasattr(detector, "roi_head")
        and provider(head, "_predict_by_feat_single") in _KNOWN_SELECTION
        and provider(head, "_bbox_post_process") == "BaseDenseHead"
    )


def _select(head: Any, maps: Any, cfg: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
