"""Families of detection heads: what reads their training difficulty and traces their predictions, a file each.

A new family is a new file with a class that satisfies :class:`~ppal_backend.detector.heads.base.HeadFamily`, and its
line in ``_families`` below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ppal_backend.detector.heads.base import HeadFamily, Positives, Restore, Sink, override
from ppal_backend.errors import UnsupportedHead

__all__ = [
    "HeadFamily",
    "Positives",
    "Restore",
    "Sink",
    "covered_families",
    "detection_head",
    "inference_family",
    "read_training",
    "training_family",
]


def _families() -> tuple[HeadFamily, ...]:
    from ppal_backend.detector.heads.anchor import AnchorFamily
    from ppal_backend.detector.heads.atss import ATSSFamily, DDODFamily
    from ppal_backend.detector.heads.detr import DETRFamily
    from ppal_backend.detector.heads.fcos import FCOSFamily
    from ppal_backend.detector.heads.gfl import GFLFamily
    from ppal_backend.detector.heads.grounding import GroundingFamily
    from ppal_backend.detector.heads.roi import RoIFamily
    from ppal_backend.detector.heads.rtmdet import RTMDetFamily
    from ppal_backend.detector.heads.yolox import YOLOXFamily

    return (
        AnchorFamily(),
        ATSSFamily(),
        DDODFamily(),
        FCOSFamily(),
        GFLFamily(),
        RTMDetFamily(),
        YOLOXFamily(),
        DETRFamily(),
        GroundingFamily(),
        RoIFamily(),
    )


def covered_families() -> tuple[str, ...]:
    """Names of the families whose training difficulty is read."""
    return tuple(family.name for family in _families())


def read_training(detector: torch.nn.Module, sink: Sink) -> Restore:
    """Report the positives of every training step of a detector to ``sink``; the returned function detaches again.

    Of a student and its teacher, the student's positives on labelled images are reported.

    Raises:
        UnsupportedHead: The detector has no head, or no family covers it.
    """
    inner = getattr(detector, "module", detector)
    head = detection_head(inner)
    family = training_family(head)
    if hasattr(inner, "student"):
        return _on_labelled_images(inner, sink, lambda gated: family.read_training(head, gated))
    return family.read_training(head, sink)


def detection_head(detector: torch.nn.Module) -> torch.nn.Module:
    """The head whose predictions are a detector's answer: the dense head, or the last RoI box head.

    Of a student and its teacher it is the student's, which trains.

    Raises:
        UnsupportedHead: The detector has neither.
    """
    inner = getattr(detector, "module", detector)
    inner = getattr(inner, "student", inner)
    owner = getattr(inner, "roi_head", inner)
    head = getattr(owner, "bbox_head", None)
    if isinstance(head, torch.nn.ModuleList):
        head = head[-1]
    if not isinstance(head, torch.nn.Module):
        raise UnsupportedHead(f"expected a detector with a bbox_head, got {type(inner).__name__}; {_advice()}")
    return head


def training_family(head: torch.nn.Module) -> HeadFamily:
    """The family that reads the training of a head.

    Args:
        head: Detection head of a built detector, see :func:`detection_head`.

    Raises:
        UnsupportedHead: None does; the message names the covered families.
    """
    for family in _families():
        if family.covers_training(head):
            return family
    raise UnsupportedHead(f"no head family reads the training difficulty of {type(head).__name__}; {_advice()}")


def inference_family(detector: torch.nn.Module) -> HeadFamily:
    """The family that traces the predictions of a detector.

    Args:
        detector: Built detector.

    Raises:
        UnsupportedHead: None does; the message names the covered families.
    """
    from ppal_backend.detector.heads.dense import OtherDenseFamily

    families = (*_families(), OtherDenseFamily())
    for family in families:
        if family.covers_inference(detector):
            return family
    names = ", ".join(family.name for family in families)
    raise UnsupportedHead(f"no one-pass inference covers {type(detector).__name__}; covered families are {names}")


def _on_labelled_images(detector: Any, sink: Sink, attach: Callable[[Sink], Restore]) -> Restore:
    """Report the positives of a student's head while the loss of labelled images is computed, and no others.

    Args:
        detector: mmdetection's semi-supervised detector, whose ``loss_by_gt_instances`` is that loss.
        sink: Takes the positives of labelled images. Pseudo boxes never reach it.
        attach: Reads the training of the student's head into the sink it is given.
    """
    loss = detector.loss_by_gt_instances
    labelled = False

    def on_labelled(*args: Any, **kwargs: Any) -> Any:
        nonlocal labelled
        labelled = True
        try:
            return loss(*args, **kwargs)
        finally:
            labelled = False

    def pass_on(positives: Positives) -> None:
        if labelled:
            sink(positives)

    detach = attach(pass_on)
    ungate = override(detector, loss_by_gt_instances=on_labelled)

    def restore() -> None:
        detach()
        ungate()

    return restore


def _advice() -> str:
    return (
        f"covered families are {', '.join(covered_families())}; choose such a detector or train without difficulty "
        f"(difficulty: false in the project's extra parameters, or PPAL_DIFFICULTY=false; --no-difficulty of ppal "
        f"simulate; every class then weighs 1)"
    )
