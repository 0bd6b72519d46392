"""Checkpoints that were trained elsewhere, made usable here: our own, or any mmdetection detector with its config."""

from __future__ import annotations

import io
import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ppal_backend.errors import CheckpointError, UnknownDetector
from ppal_backend.structures.round import ModelRef

log = logging.getLogger(__name__)

FOREIGN = "foreign"
_NEEDED_FOR_TENSORS = frozenset(
    {("collections", "OrderedDict"), ("torch", "Size"), ("torch._utils", "_rebuild_tensor_v2"),
     ("torch._utils", "_rebuild_parameter")}
)  # fmt: skip


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
    from ppal_backend.detector.checkpoints import save_final
    from ppal_backend.detector.weights import state_dict_of
    from ppal_backend.detector.zoo import find_entry

    checkpoint = Path(checkpoint).resolve()
    content = _load(checkpoint)
    meta: dict[str, Any] = content["meta"] if isinstance(content.get("meta"), dict) else {}
    labels = tuple(classes or _classes(meta))
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
    facts = {"detector": detector, "classes": list(labels), "difficulty": None}
    save_final(adopted, state_dict_of(content, checkpoint), facts)
    return ModelRef(detector, str(adopted), labels), zoo_root


def _load(path: Path) -> dict[str, Any]:
    from ppal_backend.detector.weights import load_checkpoint

    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        log.info("%s; taking its tensors alone", error)
        return load_tensors(path)


def load_tensors(path: Path) -> dict[str, Any]:
    """Read a checkpoint that holds more than plain weights, such as a training's of mmdetection, without running any
    of it: what is not needed to rebuild tensors, lists, dictionaries, numbers and text becomes an inert stand-in.

    Raises:
        CheckpointError: The file is missing, damaged or not a dictionary.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_restricted_pickle())
    except Exception as error:  # torch raises half a dozen kinds for damaged files
        raise CheckpointError(f"checkpoint {path} cannot be read ({type(error).__name__}); save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"expected a dictionary in checkpoint {path}, got {type(content).__name__}")
    return content


class _Inert:
    """Stands in for anything a checkpoint should not bring along; it takes every call and does nothing."""

    def __new__(cls, *_arguments: Any, **_options: Any) -> _Inert:
        return super().__new__(cls)

    def __call__(self, *_arguments: Any, **_options: Any) -> _Inert:
        return self

    def __setstate__(self, _state: Any) -> None:
        """Forget it."""

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """Forget it."""

    def append(self, _item: Any) -> None:
        """Forget it."""

    def extend(self, _items: Any) -> None:
        """Forget them."""


class _Restricted(pickle.Unpickler):
    """Finds what tensors need, and an inert stand-in for everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NEEDED_FOR_TENSORS:
            return super().find_class(module, name)
        return _Inert


def _restricted_pickle() -> Any:
    """What torch expects of a pickle module."""

    def load(file: Any, **options: Any) -> Any:
        return _Restricted(file, **options).load()

    def loads(data: bytes, **options: Any) -> Any:
        return load(io.BytesIO(data), **options)

    return SimpleNamespace(
        __name__="restricted", Unpickler=_Restricted, load=load, loads=loads, UnpicklingError=pickle.UnpicklingError
    )


def _classes(meta: dict[str, Any]) -> tuple[str, ...]:
    """Classes as this project, mmdetection 3 and mmdetection 2 write them."""
    dataset = meta.get("dataset_meta")
    inner = dataset.get("classes") if isinstance(dataset, Mapping) else None
    for found in (meta.get("classes"), inner, meta.get("CLASSES")):
        if isinstance(found, list | tuple) and found and all(isinstance(label, str) for label in found):
            return tuple(found)
    return ()


def _zoo_of(config: Path, folder: Path) -> Path:
    """A zoo of one detector around somebody's config; its schedule is never used."""
    if not config.is_file():
        raise UnknownDetector(f"expected an mmdetection config at {config}, got none; check the path")
    lines = [
        f"[{FOREIGN}]",
        'title = "a detector of yours"',
        'paper = ""',
        f"config = {json.dumps(str(config))}",
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
