"""Files of this machine on another: read in place where a folder is shared, fetched where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_BYTES_AT_ONCE = 32 * 2**20

ReadThere = Callable[[list[str]], list[bytes | None]]


@dataclass(frozen=True)
class FileStamp:
    """A file as the machine knows it that owns it; ``size`` is -1 where there is none."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str | Path) -> FileStamp:
        """Look at a file of this machine."""
        try:
            found = Path(path).stat()
        except OSError:
            return cls(str(path), -1, 0)
        return cls(str(path), found.st_size, found.st_mtime_ns)

    @property
    def is_here(self) -> bool:
        """Whether this machine has the same file under the same path."""
        return FileStamp.of(self.path) == self


def read_files(paths: Sequence[str]) -> list[bytes | None]:
    """Contents of files of this machine; None for one that cannot be read."""
    contents: list[bytes | None] = []
    for path in paths:
        try:
            contents.append(Path(path).read_bytes())
        except OSError:
            contents.append(None)
    return contents


def bring(stamps: Sequence[FileStamp], folder: Path, read_there: ReadThere) -> list[str]:
    """Paths under which this machine can read files of another.

    Args:
        stamps: The files.
        folder: Where to write those that are not here; exists.
        read_there: Gives contents of files of the other machine.

    Returns:
        One path a file: its own where it is here, or is nowhere; else that of a copy in ``folder``.
    """
    paths = [stamp.path for stamp in stamps]
    missing = [k for k, stamp in enumerate(stamps) if stamp.size >= 0 and not stamp.is_here]
    for group in _groups(missing, stamps):
        for k, content in zip(group, read_there([stamps[k].path for k in group]), strict=True):
            if content is not None:
                copy = folder / f"{k}{Path(stamps[k].path).suffix}"
                copy.write_bytes(content)
                paths[k] = str(copy)
    return paths


def _groups(wanted: Sequence[int], stamps: Sequence[FileStamp]) -> Iterator[list[int]]:
    """Files that travel together, of a bounded size in all (or one file)."""
    group: list[int] = []
    held = 0
    for k in wanted:
        if group and held + stamps[k].size > _BYTES_AT_ONCE:
            yield group
            group, held = [], 0
        group.append(k)
        held += stamps[k].size
    if group:
        yield group
