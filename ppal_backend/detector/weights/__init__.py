"""Weights: read a checkpoint safely, put it into a model, and keep those of a training.

Files are unpickled with ``weights_only=True`` and nothing else: a checkpoint that needs more than tensors and
plain containers is refused, since unpickling could run whatever its author wanted. Of checkpoints of other software,
which hold their training's log beside the weights, the tensors are taken without running any of what comes along: what
is not needed to rebuild tensors, lists, dictionaries, numbers and text becomes an inert stand-in.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ppal_backend.errors import CheckpointError
from ppal_backend.files import atomic_file

logger = logging.getLogger(__name__)

_ROUNDING = 2e-3  # a variance of 1 less epsilon, a scale of sqrt(1 + epsilon)
_BACKBONE = "backbone."
_STATE_DICTS = ("state_dict", "model_state_dict", "model")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
_SAVE_AGAIN = "save it again as a state dict: torch.save({'state_dict': model.state_dict()}, path)"
_STUDENT, _TEACHER = "student.", "teacher."


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without ever running code from it.

    Args:
        path: File written by ``torch.save``.

    Returns:
        The dictionary in the file, tensors on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, not a dictionary, or needs unsafe unpickling.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"expected a checkpoint at {path}, found none") from error
    except Exception as error:  # torch raises half a dozen kinds for damaged or unsafe files
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {path} is damaged or holds more than plain weights ({first_line}); it is not loaded. "
            f"{_SAVE_AGAIN[0].upper()}{_SAVE_AGAIN[1:]}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"expected a dictionary in checkpoint {path}, got {type(content).__name__}")
    return content


def state_dict_of(checkpoint: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """Take the weights out of a checkpoint dictionary, as float32.

    Accepts a state dict bare or under the names that it usually has, and drops the prefixes of what wraps a model
    (``module.``, ``_orig_mod.``). Of a student and its teacher, the teacher's weights are taken: it is the one that
    predicts.

    Raises:
        CheckpointError: There are no tensors in it, or numbers that are none (of a training that diverged).
    """
    inner = next((checkpoint[name] for name in _STATE_DICTS if checkpoint.get(name) is not None), checkpoint)
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"expected weights in checkpoint {path}, got {_kind_of_object(inner)}; {_SAVE_AGAIN}")
    tensors = {
        _WRAPPERS.sub("", str(name)): value.float() if value.is_floating_point() else value
        for name, value in inner.items()
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise CheckpointError(f"expected weights in checkpoint {path}, found no tensor; {_SAVE_AGAIN}")
    if broken := [name for name, value in tensors.items() if bool(torch.isnan(value).any())]:
        raise CheckpointError(
            f"expected numbers in checkpoint {path}, got nan in {len(broken)} of {len(tensors)} tensors ({broken[0]}), "
            f"as of a training that diverged; choose another checkpoint"
        )
    if all(name.startswith((_STUDENT, _TEACHER)) for name in tensors):
        return {name.removeprefix(_TEACHER): value for name, value in tensors.items() if name.startswith(_TEACHER)}
    return tensors


def _kind_of_object(value: Any) -> str:
    return "a pickled object of other software" if isinstance(value, _Inert) else type(value).__name__


def classes_of(checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that a checkpoint names; () for none.

    This project and mmdetection 2 (in capitals) name them in ``meta``, mmdetection 3 in ``meta.dataset_meta`` (its
    release candidates in capitals).
    """
    meta = checkpoint.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    dataset = meta.get("dataset_meta")
    dataset = dataset if isinstance(dataset, Mapping) else {}
    for found in (meta.get("classes"), dataset.get("classes"), dataset.get("CLASSES"), meta.get("CLASSES")):
        if isinstance(found, list | tuple) and found and all(isinstance(label, str) for label in found):
            return tuple(found)
    return ()


def kind_of(tensors: Mapping[str, torch.Tensor], model: torch.nn.Module) -> str:
    """``detector`` for weights that hold anything of this detector beyond its backbone, else ``backbone``.

    Names alone do not tell: a classifier's checkpoint has ``backbone.`` in front of its backbone's names too.

    Args:
        tensors: Weights by name.
        model: Detector that they are for.
    """
    beyond = (name for name in model.state_dict() if not name.startswith(_BACKBONE))
    return "backbone" if tensors.keys().isdisjoint(beyond) else "detector"


def backbone_of(tensors: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those of the weights that this detector's backbone has a place for, with or without ``backbone.`` in front."""
    own = {name for name in model.state_dict() if name.startswith(_BACKBONE)}
    return {name: value for name, value in tensors.items() if name in own or _BACKBONE + name in own}


def apply_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], kind: str, origin: Path) -> int:
    """Copy weights into a model where name and shape agree.

    Parts that depend on the classes (the last layer of a head) differ in shape between data sets and keep
    their fresh values.

    Args:
        model: Detector to fill.
        tensors: Weights by name; names as in the detector, or as in the bare backbone too for ``backbone``.
        kind: ``detector`` or ``backbone``.
        origin: File they came from, for messages.

    Returns:
        Number of tensors copied.

    Raises:
        CheckpointError: Fewer than half of the tensors of the detector (or backbone) are covered: the file
            belongs to another architecture.
    """
    own = model.state_dict()
    prefix = _BACKBONE if kind == "backbone" else ""
    if prefix and any(name.startswith(prefix) for name in tensors):
        prefix = ""
    wanted = {name for name in own if kind == "detector" or name.startswith(_BACKBONE)}
    fitting = {
        prefix + name: value
        for name, value in tensors.items()
        if prefix + name in wanted and own[prefix + name].shape == value.shape
    }
    if not fitting or 2 * len(fitting) < len(wanted):
        raise CheckpointError(
            f"expected weights of the same architecture in {origin}: only {len(fitting)} of {len(wanted)} tensors of "
            f"the {kind} agree in name and shape; choose the checkpoint of this detector or of its backbone"
        )
    model.load_state_dict(fitting, strict=False)
    logger.info("took %d of %d tensors from %s", len(fitting), len(wanted), origin)
    return len(fitting)


def complete_weights(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], what: str, path: Path, advice: str
) -> dict[str, torch.Tensor]:
    """Everything that a model needs, out of weights that may hold more; what is left out is counted in the log.

    Args:
        model: Detector to fill.
        tensors: Weights by name.
        what: What is expected, for messages.
        path: File they came from, for messages.
        advice: What to do where something lacks, for messages.

    Returns:
        Weights by name, as many as the model has. Counters of batch norms are the model's own where older software
        kept none.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
    """
    own = model.state_dict()
    counted = {name: own[name] for name in own if name.endswith(".num_batches_tracked")}
    found = {**counted, **tensors}
    differing = [name for name, value in own.items() if name not in found or found[name].shape != value.shape]
    if differing:
        raise CheckpointError(
            f"expected weights of {what} in {path}, got {len(differing)} of {len(own)} tensors missing or of another "
            f"shape ({differing[0]}); {advice}"
        )
    if more := sorted(found.keys() - own.keys()):
        logger.warning("left out %d tensors of %s that %s has no place for, such as %s", len(more), path, what, more[0])
    return {name: found[name] for name in own}


_NEEDED_FOR_TENSORS = frozenset(
    {("collections", "OrderedDict"), ("torch", "Size"), ("torch._utils", "_rebuild_tensor_v2"),
     ("torch._utils", "_rebuild_parameter")}
)  # fmt: skip


def has_folded_statistics(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether every batch norm was folded away: scale 1, mean 0 and variance 1, and shifts that are not 0.

    The last tells such weights from random ones, whose shifts are 0 too.
    """
    norms = [name.removesuffix("running_mean") for name in tensors if name.endswith(".running_mean")]
    if not norms or not all(f"{norm}{part}" in tensors for norm in norms for part in ("running_var", "weight", "bias")):
        return False

    def is_all(value: float, part: str) -> bool:
        wanted = torch.tensor(value)
        return all(torch.allclose(tensors[norm + part], wanted, atol=_ROUNDING) for norm in norms)

    folded = is_all(0.0, "running_mean") and is_all(1.0, "running_var") and is_all(1.0, "weight")
    return folded and any(bool(tensors[f"{norm}bias"].any()) for norm in norms)


def load_any(path: Path) -> dict[str, Any]:
    """Read a checkpoint of plain weights, or the tensors of one that holds more.

    Raises:
        CheckpointError: The file is missing, damaged or not a dictionary.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"expected a checkpoint at {path}, found none; check the path")
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        logger.info("%s; taking its tensors alone", error)
        return load_tensors(path)


def load_tensors(path: Path) -> dict[str, Any]:
    """Read a checkpoint that holds more than plain weights without running any of it.

    Raises:
        CheckpointError: The file is missing, damaged or not a dictionary.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_restricted_pickle())
    except Exception as error:  # torch raises half a dozen kinds for damaged files
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({type(error).__name__}): it is damaged, or no file of torch.save; "
            f"{_SAVE_AGAIN}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"expected a dictionary in checkpoint {path}, got {_kind_of_object(content)}; {_SAVE_AGAIN}"
        )
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
