"""A detector as it is before its first training: good for nothing but describing whole images."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from pathlib import Path

from ppal_backend.detector.checkpoints import save_final
from ppal_backend.detector.config import build_config
from ppal_backend.detector.fetch import weights_file, weights_target
from ppal_backend.detector.initial import InitialWeights, initialiser
from ppal_backend.detector.models import build_model
from ppal_backend.detector.runtime import isolated, pick_device
from ppal_backend.detector.zoo import find_entry

logger = logging.getLogger(__name__)


def save_untrained(
    detector: str,
    classes: Sequence[str],
    path: Path,
    device: str = "auto",
    zoo_root: Path | None = None,
    weights_dir: Path | None = None,
) -> bool:
    """Write a checkpoint of the zoo's initial weights, where they are at hand and looking at a pool is affordable.

    Nothing is downloaded for this, and a detector that takes one image at a time on a CPU (``batch_cpu`` of the zoo)
    would need seconds for each: it waits for a GPU.

    Args:
        detector: Name in the zoo.
        classes: Labels in the order of the class indices.
        path: Where to write; loads like a trained detector's.
        device: Where the pool will be looked at: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        zoo_root: Folder of the zoo; None for the packaged one.
        weights_dir: Folder for downloaded weights; None for the default cache.

    Returns:
        Whether it was written; the log says why not.

    Raises:
        UnknownDetector: The zoo has no such detector.
        WeightsUnavailable: The weights on disk have the wrong checksum.
        CheckpointError: They are damaged, unsafe or of another architecture.
    """
    entry = find_entry(detector, zoo_root)
    if entry.weights is None or not weights_target(entry, weights_dir).is_file():
        logger.info("no initial weights of %s at hand: the pool is not looked at before the first training", detector)
        return False
    if pick_device(device).type == "cpu" and entry.batch_cpu == 1:
        logger.info("%s is too slow on a CPU to look at the pool before the first training", detector)
        return False
    weights = InitialWeights(weights_file(entry, weights_dir), entry.weights.kind)
    with isolated(f"ppal-{uuid.uuid4().hex}"):
        config = build_config(entry, classes)
        model = build_model(config)
        initialiser(weights, config, classes)(model)
        meta = {"detector": detector, "classes": list(classes), "difficulty": None}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_final(path, model.state_dict(), meta)
    return True
