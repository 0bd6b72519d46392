"""Files that are either whole or not there: write to a neighbour, flush to disk, rename."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TORCH_COULD_NOT_WRITE = "PytorchStreamWriter failed writing"


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file handle whose content appears under ``path`` only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp's files are for their owner alone
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, compact: bool = False) -> None:
    """Write ``value`` as JSON, atomically; ``compact`` in one line, many times faster."""
    with atomic_file(path, "w") as file:
        if compact:
            file.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
        else:
            json.dump(value, file, ensure_ascii=False, indent=1)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keeps Python's collector of reference cycles from running in the block, which makes many objects and no cycle.

    It looks at all of them again and again while they grow: more than half of the time of reading a large file.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_json(path: Path) -> Any:
    """The JSON value in ``path``."""
    text = path.read_text(encoding="utf-8")
    with collector_paused():
        return json.loads(text)


def numbered_before(folder: Path) -> list[Path]:
    """The folders beside one whose names are smaller numbers, the largest first; none where its own is no number."""
    if not folder.name.isdigit():
        return []
    numbers = (int(path.name) for path in folder.parent.glob("*") if path.name.isdigit())
    return [folder.parent / str(number) for number in sorted(numbers, reverse=True) if number < int(folder.name)]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, was a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if isinstance(error, RuntimeError) and _TORCH_COULD_NOT_WRITE in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
