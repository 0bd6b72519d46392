"""Probes read training difficulty from what a head has just computed; one file per family of heads.

A new family is a new file with a class that satisfies :class:`~ppal_backend.detector.probes.base.Probe`, and its
name in ``_probes`` below.
"""

from __future__ import annotations

import torch

from ppal_backend.detector.probes.base import Positives, Probe, Restore, Sink
from ppal_backend.errors import UnsupportedHead

__all__ = [
    "Positives",
    "Probe",
    "Restore",
    "Sink",
    "attach_probe",
    "covered_families",
    "detection_head",
    "find_probe",
]


def _probes() -> tuple[Probe, ...]:
    from ppal_backend.detector.probes.anchor import AnchorProbe
    from ppal_backend.detector.probes.atss import ATSSProbe, DDODProbe
    from ppal_backend.detector.probes.detr import DETRProbe
    from ppal_backend.detector.probes.fcos import FCOSProbe
    from ppal_backend.detector.probes.gfl import GFLProbe
    from ppal_backend.detector.probes.roi import RoIProbe
    from ppal_backend.detector.probes.rtmdet import RTMDetProbe
    from ppal_backend.detector.probes.yolox import YOLOXProbe

    return (
        AnchorProbe(),
        ATSSProbe(),
        DDODProbe(),
        FCOSProbe(),
        GFLProbe(),
        RTMDetProbe(),
        YOLOXProbe(),
        DETRProbe(),
        RoIProbe(),
    )


def covered_families() -> tuple[str, ...]:
    """Names of the families of heads that have a probe."""
    return tuple(probe.family for probe in _probes())


def attach_probe(detector: torch.nn.Module, sink: Sink) -> Restore:
    """Report the positives of every training step of a detector to ``sink``; the returned function detaches again.

    Of a student and its teacher, the student's positives on labelled images are reported.

    Raises:
        UnsupportedHead: The detector has no head, or no probe covers it.
    """
    from ppal_backend.detector.probes.semi import on_labelled_images

    inner = getattr(detector, "module", detector)
    head = detection_head(inner)
    probe = find_probe(head)
    if hasattr(inner, "student"):
        return on_labelled_images(inner, sink, lambda gated: probe.attach(head, gated))
    return probe.attach(head, sink)


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


def find_probe(head: torch.nn.Module) -> Probe:
    """Choose the probe of a head.

    Args:
        head: Detection head of a built detector, see :func:`detection_head`.

    Raises:
        UnsupportedHead: No probe covers it; the message names the covered families.
    """
    for probe in _probes():
        if probe.covers(head):
            return probe
    raise UnsupportedHead(f"no difficulty probe covers the head {type(head).__name__}; {_advice()}")


def _advice() -> str:
    return (
        f"covered families are {', '.join(covered_families())}; choose such a detector or train without difficulty "
        f"(difficulty: false in the project's extra parameters, or PPAL_DIFFICULTY=false; every class then weighs 1)"
    )
