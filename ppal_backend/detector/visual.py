"""Curves of a training for TensorBoard or MLflow, through mmengine's own visualisation backends."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ppal_backend.errors import DetectorError

FOLDER = "tracking"
TRACKERS: dict[str, dict[str, Any]] = {
    "tensorboard": {"type": "TensorboardVisBackend"},
    "mlflow": {
        "type": "MLflowVisBackend",
        "tracked_config_keys": ["optim_wrapper", "param_scheduler", "train_cfg", "train_dataloader"],
        "artifact_suffix": (".log",),
    },
}
"""Names of the trackers, which are also those of the packages they need, with mmengine's backends."""


def require_tracker(tracking: str | None) -> None:
    """Find out before anything is trained whether the tracker's package is there.

    Raises:
        DetectorError: It is not installed; the message says how to.
    """
    if tracking is not None and importlib.util.find_spec(tracking) is None:
        raise DetectorError(
            f"expected the package {tracking} for PPAL_TRACKING={tracking}, found none; "
            f"install it with: pip install {tracking}"
        )


def visualizer_config(tracking: str | None, work_dir: Path) -> dict[str, Any]:
    """Configuration of mmengine's visualiser.

    Args:
        tracking: Name of a tracker, or None for a visualiser that writes nothing.
        work_dir: Folder of the training; a tracker writes to ``tracking/`` in it.
    """
    if tracking is None:
        return {"type": "Visualizer", "vis_backends": []}
    return {
        "type": "Visualizer",
        "vis_backends": [dict(TRACKERS[tracking])],
        "save_dir": str(work_dir / FOLDER),
    }
