"""Checkpoints of a training: the newest one that can be loaded, and the final small file."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppal_backend.detector.weights import load_checkpoint
from ppal_backend.errors import CheckpointError
from ppal_backend.files import atomic_file

logger = logging.getLogger(__name__)

FINAL_NAME = "final.pth"
_STEP = re.compile(r"iter_(\d+)\.pth")
_NEEDED = ("state_dict", "optimizer", "meta", "message_hub")


@dataclass(frozen=True)
class FinalCheckpoint:
    """What a finished training leaves: weights, and what they were trained for."""

    state_dict: dict[str, torch.Tensor]
    detector: str
    classes: tuple[str, ...]
    difficulty: tuple[float, ...] | None
    meta: dict[str, Any]


def training_checkpoints(work_dir: Path) -> list[Path]:
    """Step checkpoints in a folder, newest first; empty when there are none."""
    found = [(int(match[1]), path) for path in work_dir.glob("iter_*.pth") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_loadable(work_dir: Path) -> Path | None:
    """The newest step checkpoint that loads; damaged ones are deleted with a warning.

    A process that is killed while saving leaves a truncated file; the one before it is used then.

    Returns:
        None when there is none to resume from.
    """
    for path in training_checkpoints(work_dir):
        try:
            missing = [key for key in _NEEDED if key not in load_checkpoint(path)]
            if missing:
                raise CheckpointError(f"checkpoint {path} lacks {missing}")
            return path
        except CheckpointError as error:
            logger.warning("not resuming from %s: %s", path.name, error)
            path.unlink()
    return None


def remove_training_checkpoints(work_dir: Path) -> None:
    """Delete the step checkpoints of a finished training; they hold optimiser state and are large."""
    for path in training_checkpoints(work_dir):
        path.unlink()
    (work_dir / "last_checkpoint").unlink(missing_ok=True)


def save_final(path: Path, state_dict: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Write the final checkpoint atomically; ``meta`` holds plain values only."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    with atomic_file(path) as stream:
        torch.save({"state_dict": tensors, "meta": meta}, stream)


def load_final(path: Path, detector: str, classes: Sequence[str]) -> FinalCheckpoint:
    """Read a final checkpoint and check that it is the one that is meant.

    Args:
        path: File written by :func:`save_final`.
        detector: Expected name in the zoo.
        classes: Expected labels in the order of the class indices.

    Raises:
        CheckpointError: It is damaged, or belongs to another detector or other classes.
    """
    content = load_checkpoint(Path(os.fspath(path)))
    meta = content.get("meta")
    if not isinstance(meta, dict) or "classes" not in meta or "state_dict" not in content:
        raise CheckpointError(f"expected a detector checkpoint with its classes in {path}; train the detector again")
    if meta.get("detector") != detector:
        raise CheckpointError(f"expected a checkpoint of {detector} in {path}, got one of {meta.get('detector')}")
    if tuple(meta["classes"]) != tuple(classes):
        raise CheckpointError(
            f"expected a checkpoint for the classes {list(classes)} in {path}, got one for {list(meta['classes'])}; "
            f"the order counts"
        )
    difficulty = meta.get("difficulty")
    return FinalCheckpoint(
        state_dict=content["state_dict"],
        detector=detector,
        classes=tuple(meta["classes"]),
        difficulty=None if difficulty is None else tuple(difficulty),
        meta=meta,
    )
