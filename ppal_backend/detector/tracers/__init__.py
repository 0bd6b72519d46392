"""Tracers make a head's own prediction carry, through its suppression, what acquisition needs beside the boxes.

A traced prediction holds three more fields a detection: ``ppal_boxes`` (pixels of the network input),
``ppal_levels`` (pyramid level) and ``ppal_probs`` (class probabilities). Where the detector itself describes a
detection by a vector, as DETR's queries do, a fourth field ``ppal_embeddings`` holds it. A new family is a new file
with a class that satisfies :class:`~ppal_backend.detector.tracers.base.Tracer`, and its name in ``_tracers`` below.
"""

from __future__ import annotations

import torch

from ppal_backend.detector.tracers.base import Tracer
from ppal_backend.errors import UnsupportedHead

__all__ = ["Tracer", "find_tracer"]


def _tracers(count: bool) -> tuple[Tracer, ...]:
    from ppal_backend.detector.tracers.dense import DenseTracer
    from ppal_backend.detector.tracers.detr import DETRTracer
    from ppal_backend.detector.tracers.roi import RoITracer
    from ppal_backend.detector.tracers.yolox import YOLOXTracer

    return (RoITracer(), DenseTracer(count), YOLOXTracer(count), DETRTracer())


def find_tracer(detector: torch.nn.Module, count: bool = False) -> Tracer:
    """Choose the tracer of a detector.

    Args:
        detector: Built detector.
        count: Whether to count the boxes before suppression that each detection stands for, in a fourth field
            ``ppal_counts``; dense heads and YOLOX only.

    Raises:
        UnsupportedHead: No tracer covers it; the message names the covered families.
    """
    tracers = _tracers(count)
    for tracer in tracers:
        if tracer.covers(detector):
            return tracer
    families = ", ".join(tracer.family for tracer in tracers)
    raise UnsupportedHead(f"no one-pass inference covers {type(detector).__name__}; covered families are {families}")
