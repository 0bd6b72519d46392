"""What published weights say in their own classes, told in the labels of a project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmcv.ops import batched_nms

_PROBABILITIES = "ppal_probs"
_USUAL_IOU = 0.65


@dataclass(frozen=True)
class Relabelling:
    """From the classes of the weights to labels.

    A class's boxes bear the first label that is known from it; boxes of other classes are left out. The same object
    found under two classes of one label is suppressed once more: the detector suppresses each class alone.

    Args:
        targets: Label index by class index of the weights, -1 for none.
        labels: Number of labels.
    """

    targets: tuple[int, ...]
    labels: int

    @classmethod
    def of(cls, classes: Sequence[str], labels: Sequence[str], known: Mapping[str, Sequence[str]]) -> Relabelling:
        """Build it from names.

        Args:
            classes: Classes of the weights in the order of the class indices.
            labels: Labels of the project, likewise.
            known: Label -> classes it is known from, the labels that boxes are to bear first.
        """
        targets = [-1] * len(classes)
        for label, names in known.items():
            for name in names:
                index = list(classes).index(name)
                if targets[index] < 0:
                    targets[index] = list(labels).index(label)
        return cls(tuple(targets), len(labels))

    @property
    def merged(self) -> frozenset[int]:
        """Labels that several classes become."""
        return frozenset(label for label in self.targets if label >= 0 and self.targets.count(label) > 1)

    def apply(self, instances: Any, iou_threshold: float | None = None) -> Any:
        """Predictions of one image with label indices in place of the weights' class indices.

        Args:
            instances: mmdet's ``pred_instances``.
            iou_threshold: At which the detector suppresses; None for the usual one.
        """
        targets = torch.tensor(self.targets, device=instances.labels.device)
        wanted = targets[instances.labels]
        kept = instances[wanted >= 0]
        kept.labels = wanted[wanted >= 0]
        if _PROBABILITIES in kept:
            kept[_PROBABILITIES] = self._probabilities(kept[_PROBABILITIES])
        if self.merged and len(kept.labels):
            kept = kept[self._unsuppressed(kept, _USUAL_IOU if iou_threshold is None else iou_threshold)]
        return kept

    def _probabilities(self, given: torch.Tensor) -> torch.Tensor:
        """``[n, labels]`` sigmoid probabilities, the largest of a label's classes; of a softmax (which has a background
        in the last place) ``[n, labels + 1]``, where classes without a label count as background."""
        softmax = given.shape[1] == len(self.targets) + 1
        found = given.new_zeros(len(given), self.labels + softmax)
        for index, label in enumerate(self.targets):
            if label < 0:
                continue
            column = given[:, index]
            found[:, label] = found[:, label] + column if softmax else torch.maximum(found[:, label], column)
        if softmax:
            found[:, -1] = (1 - found[:, :-1].sum(1)).clamp(min=0)
        return found

    def _unsuppressed(self, kept: Any, iou_threshold: float) -> torch.Tensor:
        """Places of the boxes that stay, in their order: labels of one class have been suppressed before."""
        merged = torch.isin(kept.labels, torch.tensor(sorted(self.merged), device=kept.labels.device))
        stays = ~merged
        places = merged.nonzero()[:, 0]
        if len(places):
            boxes, scores = kept.bboxes[places].float(), kept.scores[places].float()
            _, chosen = batched_nms(boxes, scores, kept.labels[places], {"type": "nms", "iou_threshold": iou_threshold})
            stays[places[chosen]] = True
        return stays.nonzero()[:, 0]


def iou_threshold_of(model: Any) -> float | None:
    """At which overlap a detector suppresses, None where it does not say."""
    found = model.test_cfg or {}
    found = found.get("rcnn", found)
    nms = found.get("nms") if found else None
    threshold = nms.get("iou_threshold") if nms else None
    return None if threshold is None else float(threshold)
