"""Semi-supervised detectors: a student that trains, and a teacher that is its moving average and predicts.

mmdetection builds one plain detector twice (``SoftTeacher(detector=…)``). Training uses that pair. What a training
leaves behind, and with it evaluation and inference, is the teacher as the plain detector it is, so that nothing
after a training has to know of students.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ppal_backend.detector.recipe import average_momentum, plain_dict
from ppal_backend.detector.runtime import quiet_stdout
from ppal_backend.errors import DetectorError

with quiet_stdout():  # mmdetection tells which data sets it cannot import
    from mmdet.engine.hooks import MeanTeacherHook

logger = logging.getLogger(__name__)

SLOWEST = 0.001  # mmdetection's momentum, made for 180,000 steps
_PARTS = ("unlabelled_pipeline", "unlabelled_ratio")


def is_semi(model: Mapping[str, Any]) -> bool:
    """Whether a model configuration is of a student and a teacher."""
    return "detector" in model and "semi_train_cfg" in model


def plain_model(model: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the detector that predicts: the teacher's, or the whole when there is no teacher."""
    return dict(model["detector"]) if is_semi(model) else model


def semi_parts(base: Mapping[str, Any]) -> dict[str, Any]:
    """What a detector's config file says about unlabelled images; empty for a detector without a teacher.

    Returns:
        ``unlabelled_pipeline`` (steps) and ``unlabelled_ratio`` (unlabelled images for each labelled one).

    Raises:
        DetectorError: The detector has a teacher and there is no pipeline for unlabelled images.
    """
    if not is_semi(base["model"]):
        return {}
    if _PARTS[0] not in base:
        raise DetectorError("expected an 'unlabelled_pipeline' beside a model with a teacher, found none; add one")
    steps = [plain_dict(step) for step in base[_PARTS[0]]]
    return {_PARTS[0]: steps, _PARTS[1]: int(base.get(_PARTS[1], 1))}


def trained_part(model: Any) -> Any:
    """The part of a built detector that learns by gradients: the student, or the detector itself."""
    inner = model.module if is_model_wrapper(model) else model
    return inner.student if hasattr(inner, "student") else inner


def predicting_part(model: Any) -> Any:
    """The part of a built detector that predicts: the teacher, or the detector itself."""
    inner = model.module if is_model_wrapper(model) else model
    return inner.teacher if hasattr(inner, "teacher") else inner


def prepare_teacher(model: Any, total: int, unlabelled: bool) -> list[Hook]:
    """Make a built student and teacher ready for a training of ``total`` steps; does nothing to other detectors.

    Args:
        model: Detector, built.
        total: Optimiser steps.
        unlabelled: Whether there are unlabelled images. Without any, as at the end of a labeling project, the student
            learns from the labelled ones alone; the teacher is its moving average all the same.

    Returns:
        Hooks to register.
    """
    if not hasattr(model, "teacher"):
        return []
    if not unlabelled:
        logger.warning("no unlabelled images: %s learns from the labelled ones alone", type(model).__name__)
        _learn_from_labelled_only(model)
    return [TeacherHook(total)]


def _learn_from_labelled_only(model: Any) -> None:
    def loss(inputs: Mapping[str, Any], samples: Mapping[str, Any]) -> dict[str, Any]:
        losses: dict[str, Any] = model.loss_by_gt_instances(inputs["sup"], samples["sup"])
        return losses

    model.loss = loss


def teacher_momentum(total: int) -> float:
    """Weight of the student in the teacher's moving average, for a training of ``total`` steps."""
    return average_momentum(SLOWEST, total, horizons=20)


class TeacherHook(MeanTeacherHook):
    """Moves the teacher after every step, statistics of normalisation included, and keeps it in evaluation mode."""

    def __init__(self, total: int) -> None:
        super().__init__(momentum=teacher_momentum(total), skip_buffer=False)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """mmengine puts the whole model into training mode, where a teacher would follow batches, not its average."""
        del batch_idx, data_batch
        predicting_part(runner.model).eval()
