"""Whether there is room on the disk, and whether an error means that there is none."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from ppal_backend.errors import OutOfSpace

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TORCH_COULD_NOT_WRITE = "PytorchStreamWriter failed writing"
GIB = 1024**3


def need_space(folder: Path, min_free_gib: float) -> None:
    """Make sure of some free space where ``folder`` lies.

    Raises:
        OutOfSpace: there is less.
    """
    free_gib = shutil.disk_usage(folder).free / GIB
    if free_gib < min_free_gib:
        raise OutOfSpace(
            f"expected at least {min_free_gib:g} GiB free for {folder}, got {free_gib:.2f}; free some (ppal prune "
            "removes old versions) or set PPAL_MIN_FREE_GIB. The round waits and goes on by itself"
        )


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, was a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if isinstance(error, RuntimeError) and _TORCH_COULD_NOT_WRITE in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
