"""A student and its teacher: the head runs several times a step, and only labelled images count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ppal_backend.detector.probes.base import Positives, Restore, Sink, override


def on_labelled_images(detector: Any, sink: Sink, attach: Callable[[Sink], Restore]) -> Restore:
    """Attach a probe to a student's head so that it reports while the loss of labelled images is computed.

    Args:
        detector: mmdetection's semi-supervised detector, whose ``loss_by_gt_instances`` is that loss.
        sink: Takes the positives of labelled images. Pseudo boxes never reach it.
        attach: Attaches the probe of the student's head to the sink it is given.
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

    undo = (attach(pass_on), override(detector, "loss_by_gt_instances", on_labelled))

    def restore() -> None:
        for step in undo:
            step()

    return restore
