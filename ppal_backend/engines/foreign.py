"""Checkpoints that were trained elsewhere, made usable here: our own, or any mmdetection detector with its config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppal_backend.errors import CheckpointError, UnknownDetector
from ppal_backend.structures.round import ModelRef

FOREIGN = "foreign"


def adopt_checkpoint(
    checkpoint: Path,
    work: Path,
    *,
    detector: str | None = None,
    config: Path | None = None,
    classes: Sequence[str] | None = None,
    zoo_root: Path | None = None,
) -> tuple[ModelRef, Path | None]:
    """Make a checkpoint usable.

    A checkpoint of this project says itself which detector and classes it is for. Others need the detector's name in
    the zoo or their mmdetection config, and their classes unless the file names them (as mmdetection's do).

    Args:
        checkpoint: The file.
        work: Folder for what has to be written.
        detector: Name in the zoo, for checkpoints that do not say.
        config: mmdetection config of the detector; then ``detector`` is not needed.
        classes: Labels in the order of the class indices, for checkpoints that do not say.
        zoo_root: Folder of the zoo; None for the packaged one.

    Returns:
        The model and the folder of the zoo to use it with.

    Raises:
        CheckpointError: The file cannot be loaded safely, or says too little.
        UnknownDetector: The zoo has no such detector, or none was named.
    """
    from ppal_backend.detector.weights import classes_of, load_any, save_final, state_dict_of
    from ppal_backend.detector.zoo import find_entry

    checkpoint = Path(checkpoint).resolve()
    content = load_any(checkpoint)
    meta: dict[str, Any] = content["meta"] if isinstance(content.get("meta"), dict) else {}
    labels = tuple(classes or classes_of(content))
    if not labels:
        raise CheckpointError(f"expected {checkpoint} to name its classes, found none; pass them with --classes")
    if "detector" in meta and config is None and not classes:
        find_entry(str(meta["detector"]), zoo_root)
        difficulty = meta.get("difficulty")
        known = None if difficulty is None else tuple(float(d) for d in difficulty)
        return ModelRef(str(meta["detector"]), str(checkpoint), labels, known), zoo_root
    if config is not None:
        detector, zoo_root = FOREIGN, _zoo_of(Path(config).resolve(), Path(work) / "zoo")
    detector = detector or meta.get("detector")
    if not isinstance(detector, str):
        raise UnknownDetector(f"{checkpoint} does not say which detector it is of; pass --detector or --config")
    find_entry(detector, zoo_root)
    adopted = Path(work) / "checkpoint.pth"
    facts = {"detector": detector, "classes": list(labels), "difficulty": None, "origin": str(checkpoint)}
    save_final(adopted, state_dict_of(content, checkpoint), facts)
    return ModelRef(detector, str(adopted), labels), zoo_root


def _zoo_of(config: Path, folder: Path) -> Path:
    """A zoo of one detector around somebody's config; its schedule is never used."""
    from ppal_backend.detector.zoo import toml_value

    if not config.is_file():
        raise UnknownDetector(f"expected an mmdetection config at {config}, got none; check the path")
    lines = [
        f"[{FOREIGN}]",
        'title = "a detector of yours"',
        'paper = ""',
        f"config = {toml_value(str(config))}",
        'head_family = ""',
        "input_size = [1333, 800]",
        f"[{FOREIGN}.schedule]",
        "epochs = 1",
        "min_iterations = 1",
        "max_iterations = 1",
        "batch_size = 1",
        "lr = 0.001",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zoo.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
