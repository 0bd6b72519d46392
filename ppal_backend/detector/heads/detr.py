"""DETR and its relatives: the last decoder layer's matching counts; a box has no level, its query describes it."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, scale_boxes

from ppal_backend.detector.heads.base import (
    EMBEDDING_FIELD,
    EXTRA_FIELDS,
    NO_LEVEL,
    Kept,
    Positives,
    Restore,
    Sink,
    aligned_iou,
    class_probability,
    keep_targets_until_after_loss,
    override,
    provider,
    require_same_selection,
)

_LOSSES = ("DETRHead", "DeformableDETRHead", "DINOHead")


class DETRFamily:
    """``DETRHead``, ``DeformableDETRHead`` and ``DINOHead``.

    In training the head asks for the targets of its matching queries once a decoder layer, in order, then perhaps
    once for the proposals of its encoder. The call that belongs to the last decoder layer counts; denoising queries
    do not.
    """

    name = "DETR (DETR, Deformable DETR, DINO)"

    def covers_training(self, head: torch.nn.Module) -> bool:
        """Heads with DETR's own matching and a loss whose calls come in the known order."""
        matching = {provider(head, name) for name in ("get_targets", "_get_targets_single", "loss_by_feat_single")}
        return matching == {"DETRHead"} and provider(head, "loss_by_feat") in _LOSSES

    def read_training(self, head: Any, sink: Sink) -> Restore:
        """Keep the targets of every decoder layer, and report those of the last one after the loss."""

        def report(kept: Kept, cls_scores: Any, *_rest: Any) -> None:
            sink(self.positives(head, *kept[len(cls_scores) - 1]))

        return keep_targets_until_after_loss(head, "get_targets", report)

    def positives(self, head: Any, args: tuple[Any, ...], targets: Any) -> Positives:
        """The matched queries of a decoder layer.

        Args:
            head: The head.
            args: What ``get_targets`` was called with: logits, boxes, instances and facts of each image.
            targets: What it returned.
        """
        logits, boxes = torch.cat(args[0]).detach(), torch.cat(args[1]).detach()
        labels, box_targets = torch.cat(targets[0]), torch.cat(targets[2])
        matched = (labels >= 0) & (labels < head.num_classes)
        labels = labels[matched]
        probabilities = class_probability(logits[matched], labels, head.loss_cls.use_sigmoid)
        # both are shares of the image's sides: overlap does not depend on the scale of the axes
        ious = aligned_iou(bbox_cxcywh_to_xyxy(boxes[matched]), bbox_cxcywh_to_xyxy(box_targets[matched]))
        return Positives(labels, probabilities, ious)

    def covers_inference(self, detector: Any) -> bool:
        """Detectors whose head predicts image by image as ``DETRHead`` does."""
        head = getattr(detector, "bbox_head", None)
        return provider(head, "_predict_by_feat_single") == "DETRHead" and provider(head, "forward") in (
            "DETRHead",
            "DeformableDETRHead",
        )

    def is_softmax(self, detector: Any) -> bool:
        """DETR has a softmax over C + 1 classes; the others give sigmoid probabilities."""
        return not detector.bbox_head.loss_cls.use_sigmoid

    def trace_inference(self, detector: Any, count: bool = False) -> Restore:
        """Wrap the head's forward pass, to keep the queries, and its per-image prediction; nothing is counted."""
        del count
        head = detector.bbox_head
        forward, predict = head.forward, head._predict_by_feat_single
        pending: list[torch.Tensor] = []

        def forwarding(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            pending[:] = list(hidden_states[-1])
            return forward(hidden_states, *args, **kwargs)

        def predicting(cls_score: Any, bbox_pred: Any, *rest: Any) -> Any:
            queries, (img_meta, rescale) = pending.pop(0), rest[-2:]
            results = predict(cls_score, bbox_pred, *rest)
            rows, probabilities, scores = self.select(head, cls_score, rest)
            require_same_selection(head, results.scores, scores)
            boxes = scale_boxes(results.bboxes, img_meta["scale_factor"]) if rescale else results.bboxes.clone()
            values = (boxes, torch.full_like(rows, NO_LEVEL), probabilities[rows], queries[rows])
            for name, value in zip((*EXTRA_FIELDS, EMBEDDING_FIELD), values, strict=True):
                results.set_field(value, name)
            return results

        return override(head, forward=forwarding, _predict_by_feat_single=predicting)

    def select(
        self, head: Any, cls_score: torch.Tensor, rest: tuple[Any, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query of each prediction, class probabilities of all queries, and the score of each prediction.

        Args:
            head: The head.
            cls_score: Its logits for an image.
            rest: What its per-image prediction is called with besides logits and boxes.
        """
        del rest
        wanted = head.test_cfg.get("max_per_img", len(cls_score))
        if head.loss_cls.use_sigmoid:
            probabilities = cls_score.sigmoid()
            scores, indices = probabilities.view(-1).topk(wanted)
            return indices // head.num_classes, probabilities, scores
        probabilities = cls_score.softmax(-1)
        scores, rows = probabilities[..., :-1].max(-1).values.topk(wanted)
        return rows, probabilities, scores
