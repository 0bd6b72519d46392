"""Training steps that do not fit into memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ppal_backend.errors import OutOfMemory

_SIGNS = ("out of memory", "defaultcpuallocator", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or numpy says that memory is short, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def memory_errors(detector: str, batch_size: int, device: torch.device) -> Iterator[None]:
    """Turn every way of being short of memory into one error that people can act upon.

    Args:
        detector: Name in the zoo, for the message.
        batch_size: Images a step, for the message.
        device: Where the training runs, for the message.

    Raises:
        OutOfMemory: In place of what torch raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"the memory of {device} does not hold a training step of {detector} with a batch size of {batch_size}; "
            f"close other programs that use it, choose a smaller detector (ppal zoo list), or lower the batch_size "
            f"of the detector's schedule in zoo.toml"
        ) from error


def free_memory() -> None:
    """Give back what a failed attempt held; call it when its error is out of scope."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
