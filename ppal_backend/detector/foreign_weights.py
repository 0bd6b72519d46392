"""Checkpoints of other software: their tensors, without running any of what comes along.

A training's checkpoint of mmdetection holds its log beside the weights, which ``weights_only=True`` refuses. Here what
is not needed to rebuild tensors, lists, dictionaries, numbers and text becomes an inert stand-in.
"""

from __future__ import annotations

import io
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ppal_backend.detector.weights import load_checkpoint
from ppal_backend.errors import CheckpointError

log = logging.getLogger(__name__)

_NEEDED_FOR_TENSORS = frozenset(
    {("collections", "OrderedDict"), ("torch", "Size"), ("torch._utils", "_rebuild_tensor_v2"),
     ("torch._utils", "_rebuild_parameter")}
)  # fmt: skip


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
        log.info("%s; taking its tensors alone", error)
        return load_tensors(path)


def load_tensors(path: Path) -> dict[str, Any]:
    """Read a checkpoint that holds more than plain weights without running any of it.

    Raises:
        CheckpointError: The file is missing, damaged or not a dictionary.
    """
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
