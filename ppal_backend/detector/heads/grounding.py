"""Grounding DINO: DETR's matching and queries, with a class's probability from those of the words of its prompt."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.dense_heads.atss_vlfusion_head import convert_grounding_to_cls_scores
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy

from ppal_backend.detector.heads.base import Positives, aligned_iou, concatenate, provider
from ppal_backend.detector.heads.detr import DETRFamily


class GroundingFamily(DETRFamily):
    """``GroundingDINOHead``: it scores words, and a class by the mean of its prompt's words."""

    name = "Grounding DINO"

    def covers_training(self, head: torch.nn.Module) -> bool:
        """Heads whose targets are words, and whose loss calls come in DINO's order."""
        words = {provider(head, name) for name in ("_get_targets_single", "loss_by_feat_single")}
        known = provider(head, "get_targets") == "DETRHead" and provider(head, "loss_by_feat") == "DINOHead"
        return words == {"GroundingDINOHead"} and known

    def positives(self, head: Any, args: tuple[Any, ...], targets: Any) -> Positives:
        """Matched queries: those whose boxes have a weight. Their target words are those of one instance's class."""
        del head
        parts = []
        for logits, boxes, instances, words, wanted, weights in zip(*args[:3], targets[0], *targets[2:4], strict=True):
            matched = weights[:, 0] > 0
            own, share = words[matched], logits.detach()[matched].sigmoid()
            same = (own[:, None] == instances.positive_maps[None]).all(-1)
            labels = instances.labels[same.int().argmax(1)] if len(own) else instances.labels[:0]
            probabilities = (share * own).sum(1) / own.sum(1).clamp(min=1)
            found, truths = bbox_cxcywh_to_xyxy(boxes.detach()[matched]), bbox_cxcywh_to_xyxy(wanted[matched])
            parts.append(Positives(labels, probabilities, aligned_iou(found, truths)))
        return concatenate(parts, args[0][0].device)

    def covers_inference(self, detector: Any) -> bool:
        """Detectors whose head predicts image by image as ``GroundingDINOHead`` does."""
        head = getattr(detector, "bbox_head", None)
        return {provider(head, name) for name in ("_predict_by_feat_single", "forward")} == {"GroundingDINOHead"}

    def select(
        self, head: Any, cls_score: torch.Tensor, rest: tuple[Any, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Class probabilities as mmdetection makes them of words."""
        words = rest[0]  # class, counted from 1 -> places of its words
        probabilities = convert_grounding_to_cls_scores(logits=cls_score.sigmoid()[None], positive_maps=[words])[0]
        scores, indices = probabilities.view(-1).topk(head.test_cfg.get("max_per_img", len(cls_score)))
        return indices // len(words), probabilities, scores
