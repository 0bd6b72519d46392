"""Which weights a training starts from, and how they get into the detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config

from ppal_backend.detector.config import set_class_count
from ppal_backend.detector.fetch import weights_file
from ppal_backend.detector.foreign_weights import load_any
from ppal_backend.detector.models import build_model
from ppal_backend.detector.request import TrainRequest
from ppal_backend.detector.runner import Initialise
from ppal_backend.detector.semi import trained_part
from ppal_backend.detector.warm_start import carry_classes
from ppal_backend.detector.weights import apply_weights, state_dict_of
from ppal_backend.detector.zoo import ZooEntry


@dataclass(frozen=True)
class InitialWeights:
    """A checkpoint on disk; ``kind`` is ``detector`` or ``backbone``."""

    path: Path
    kind: str


def starts_random(request: TrainRequest, entry: ZooEntry) -> bool:
    """Random weights are used where they were asked for, or where the zoo offers no others and says so."""
    nothing_else = request.init_weights is None and entry.weights is None
    return request.init_weights == "random" or (nothing_else and entry.from_scratch)


def find_weights(request: TrainRequest, entry: ZooEntry) -> InitialWeights | None:
    """Choose, fetch and check the initial weights, before anything is built; None for a random start.

    Raises:
        WeightsUnavailable: They cannot be had.
        CheckpointError: They are damaged or unsafe.
    """
    if starts_random(request, entry):
        return None
    if request.init_weights is None:
        path = weights_file(entry, request.weights_dir)
        kind = entry.weights.kind if entry.weights is not None else "detector"
    else:
        path, kind = Path(request.init_weights), "detector"
    tensors = state_dict_of(load_any(path), path)
    if kind == "detector" and not any(name.startswith("backbone.") for name in tensors):
        kind = "backbone"
    return InitialWeights(path, kind)


def initialiser(weights: InitialWeights | None, config: Config, classes: Sequence[str]) -> Initialise:
    """What puts the weights into a detector after its random initialisation; call it inside :func:`runtime.isolated`.

    Args:
        weights: Weights from :func:`find_weights`.
        config: Configuration of the training.
        classes: Labels in the order of the class indices.
    """
    if weights is None:
        return lambda model: None
    content = load_any(weights.path)
    tensors = state_dict_of(content, weights.path)
    meta = content.get("meta")
    # only this package writes "classes" there, and its rows are known to be in that order
    known = tuple(meta.get("classes", ())) if isinstance(meta, dict) else ()

    def initialise(model: torch.nn.Module) -> None:
        part = trained_part(model)
        fitting = tensors
        if known and known != tuple(classes):
            fitting = carry_classes(tensors, known, classes, part.state_dict(), _wider(config, len(classes) + 1))
        apply_weights(part, fitting, weights.kind, weights.path)

    return initialise


def _wider(config: Config, classes: int) -> dict[str, torch.Size]:
    """Shapes of the same detector for another number of classes."""
    wider = config.copy()
    set_class_count(wider.model, classes)
    with torch.random.fork_rng():
        part = trained_part(build_model(wider))
    return {name: value.shape for name, value in part.state_dict().items()}
