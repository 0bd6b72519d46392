"""What a training is to do, and what it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppal_backend.detector.data import digest_of_names
from ppal_backend.detector.train.runner import TRACKERS
from ppal_backend.files import sha256_of


@dataclass(frozen=True)
class TrainRequest:
    """Everything that decides the outcome of a training.

    Args:
        detector: Name in the zoo.
        classes: Labels in the order of the class indices.
        train_json: COCO file with absolute ``file_name``; images without boxes count as true negatives.
        val_json: COCO file of held-out images. The weights that do best on them are kept; None, or no boxes in it,
            keeps the last ones.
        work_dir: Folder of this training alone. A training that was cut off resumes from it.
        seed: Seed of initialisation, order and augmentation.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        init_weights: Checkpoint to start from; None for the zoo's own weights (none, for a detector
            that the zoo says trains from scratch); ``"random"`` for none at all. A checkpoint of this package
            brings its classes along: rows of the head go over by label.
        max_iterations: Cap on the optimiser steps; None follows the schedule.
        difficulty: Whether to follow class difficulty (Eq. 1 to 3).
        xi: Share of classification in Eq. 1.
        momentum: m0 of Eq. 2 and 3.
        absent: ``keep`` (Eq. 2) or ``drift`` for classes absent from a step.
        zoo_root: Folder of the zoo; None for the packaged one.
        weights_dir: Folder for downloaded weights; None for the default cache.
        workers: Data loader processes; None chooses none on a CPU and up to 4 on a GPU.
        unlabelled: Files of unlabelled images, for detectors that learn from them too; others leave them alone.
            Without any, such a detector learns from the labelled images alone.
        patience: Evaluations on ``val_json`` without a better mAP after which training ends; None never ends early.
        processes: Processes that share every batch, each with a GPU of its own (or all on the CPU).
        deterministic: Whether a GPU must give the same bits on every run, at some cost in speed.
        mixed_precision: Whether training may use half precision, on devices that are faster so and with detectors that
            bear it.
        tracking: ``tensorboard`` or ``mlflow`` to write curves below ``work_dir``; None for neither.
        slices: Whether to learn from tiles of the images too, and to look through them later: ``off``, ``auto`` (by
            the size of the boxes) or the side of a tile in pixels of the image.
        known: Label -> classes of the zoo's weights whose rows of the head it starts from.
        rival: A method that changes the detector (see :mod:`~ppal_backend.detector.rivals`), in simulations; None for
            the detector as it is.
    """

    detector: str
    classes: tuple[str, ...]
    train_json: Path
    val_json: Path | None
    work_dir: Path
    seed: int = 0
    device: str = "auto"
    init_weights: Path | str | None = None
    max_iterations: int | None = None
    difficulty: bool = True
    xi: float = 0.6
    momentum: float = 0.99
    absent: str = "keep"
    zoo_root: Path | None = None
    weights_dir: Path | None = None
    workers: int | None = None
    unlabelled: tuple[Path | str, ...] = ()
    patience: int | None = None
    processes: int = 1
    deterministic: bool = False
    mixed_precision: bool = True
    tracking: str | None = None
    slices: int | str = "off"
    known: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rival: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "unlabelled", tuple(self.unlabelled))
        if not self.classes:
            raise ValueError("expected at least one class; take them from the labeling config")
        for name in ("max_iterations", "patience", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} >= 1 or None, got {value}")
        if self.tracking is not None and self.tracking not in TRACKERS:
            raise ValueError(f"expected tracking to be one of {sorted(TRACKERS)} or None, got {self.tracking!r}")

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed training must have in common with the one that was cut off."""
        return {
            "detector": self.detector,
            "classes": list(self.classes),
            "train_sha256": sha256_of(self.train_json),
            "seed": self.seed,
            "init_weights": None if self.init_weights is None else str(self.init_weights),
            "max_iterations": self.max_iterations,
            "difficulty": [self.xi, self.momentum, self.absent] if self.difficulty else None,
            **({"slices": self.slices} if self.slices != "off" else {}),
            **({"known": {label: list(names) for label, names in self.known.items()}} if self.known else {}),
            **({"rival": self.rival} if self.rival else {}),
            **({"unlabelled_sha256": digest_of_names(self.unlabelled)} if self.unlabelled else {}),
            **({"val_sha256": sha256_of(self.val_json), "patience": self.patience} if self.val_json else {}),
        }


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Args:
        checkpoint: ``{"state_dict", "meta"}`` file, loadable with ``weights_only=True``.
        difficulty: ``[C]`` class difficulties in [0, 1], or None when they were not followed.
        iterations: Optimiser steps.
        final_loss: Mean loss of the last 20 steps.
        seconds: Wall time of the last stretch of training (a resumed training counts from its resumption).
        best_step: Step whose weights are in ``checkpoint``, chosen on held-out images; None when none were looked at.
        best_map: COCO mAP of those weights on the held-out images, in [0, 1]; None likewise.
        slices: Side in pixels of the tiles that it learned from; None for whole images alone.
        why_slices: Why so, for people; empty where ``slices`` was ``off``.
    """

    checkpoint: Path
    difficulty: tuple[float, ...] | None
    iterations: int
    final_loss: float
    seconds: float
    best_step: int | None = None
    best_map: float | None = None
    slices: int | None = None
    why_slices: str = ""
