"""mmengine's process-wide state, kept from leaking out of a training or an inference."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmdet.utils import register_all_modules
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

from ppal_backend.errors import DetectorError

_STDOUT = threading.RLock()
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS asks for it where results are to be repeatable
_MANAGED = (MMLogger, MessageHub, DefaultScope, Visualizer)


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Swallow what libraries print. Standard output belongs to the process, hence one block at a time."""
    with _STDOUT, contextlib.redirect_stdout(io.StringIO()):
        yield


@contextmanager
def stdout_aside() -> Iterator[None]:
    """Send what others print (config files are programs) to standard error: standard output is for answers."""
    with _STDOUT, contextlib.redirect_stdout(sys.stderr):
        yield


@contextmanager
def isolated(name: str, log_file: Path | None = None) -> Iterator[None]:
    """Run mmengine code under its own names and forget them afterwards.

    Inside, the default scope is ``mmdet`` and mmengine's log goes to ``log_file`` (or nowhere), never to the
    terminal. Afterwards the loggers, message hubs, scopes and visualisers whose names start with ``name`` are
    gone and their files closed, so that any number of trainings can follow each other in one process.

    Args:
        name: Unique name of this run; a Runner inside must use it as ``experiment_name``.
        log_file: File that takes mmengine's log, appended to.
    """
    _register()
    torch.set_flush_denormal(True)  # denormal weights make CPU training many times slower
    mm_logger = MMLogger.get_instance(name, log_file=None if log_file is None else str(log_file), file_mode="a")
    mm_logger.handlers = [item for item in mm_logger.handlers if isinstance(item, logging.FileHandler)]
    mm_logger.addHandler(logging.NullHandler())
    DefaultScope.get_instance(name, scope_name="mmdet")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)  # it is the thread's state: others' arithmetic is as it was
        for managed in _MANAGED:
            for key in [key for key in managed._instance_dict if key.startswith(name)]:
                gone = managed._instance_dict.pop(key)
                for handler in getattr(gone, "handlers", ()):
                    handler.close()


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Make torch give the same bits on every run, and put its switches back afterwards.

    On a CPU trainings are repeatable anyway; on CUDA this costs speed, and some operations have no such form.

    Raises:
        DetectorError: The detector uses an operation that has no deterministic form on this device.
    """
    if not wanted:
        yield
        return
    cudnn, workspace = torch.backends.cudnn, os.environ.get(_WORKSPACE)
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    flags = (cudnn.deterministic, cudnn.benchmark)
    os.environ[_WORKSPACE] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise DetectorError(
            f"this detector cannot train deterministically here ({str(error).splitlines()[0]}); "
            f"set deterministic to false or train on a CPU"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = flags
        if workspace is None:
            del os.environ[_WORKSPACE]
        else:
            os.environ[_WORKSPACE] = workspace


@functools.cache
def _register() -> None:
    """Fill mmdet's registries; the modules it imports print remarks about optional parts, which are dropped."""
    with quiet_stdout(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        register_all_modules(init_default_scope=False)


def pick_device(device: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device; ``auto`` prefers CUDA.

    Raises:
        DetectorError: CUDA was asked for and there is none or no such one, or the name is unknown or of another kind.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = f"expected a device such as auto, cpu or cuda, got {device!r}; correct it"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise DetectorError(problem) from error
    if chosen.type not in ("cpu", "cuda"):  # mmcv's operations have no other form
        raise DetectorError(problem)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise DetectorError(f"expected a CUDA device for {device!r}, found none; use auto or cpu")
    count = torch.cuda.device_count() if chosen.type == "cuda" else 0
    if chosen.index is not None and count and chosen.index >= count:
        raise DetectorError(f"expected a CUDA device from cuda:0 to cuda:{count - 1}, got {device!r}; use one of them")
    return chosen
