"""What runs on the nodes of a Ray cluster: one shard of a pool after another, or one step of a round.

Files of the round's own machine are read in place where a folder is shared, and fetched where it is not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppal_backend.engines.local import LocalEngine
from ppal_backend.errors import DetectorError, ImageError
from ppal_backend.rounds.ports import Inferred, PoolEntry
from ppal_backend.structures.round import ModelRef, Progress, RoundSpec

_ASK_EVERY_S = 0.5
_BYTES_AT_ONCE = 32 * 2**20

ReadThere = Callable[[list[str]], list[bytes | None]]


@dataclass(frozen=True)
class LocalOptions:
    """How to make the local engine on a node; see its arguments."""

    zoo_root: Path | None = None
    threads: int = 1
    processes: int = 1
    tracking: str | None = None
    weights_dir: Path | None = None

    def engine(self) -> LocalEngine:
        """The engine.

        Raises:
            DetectorError: The operator's own detectors are not on this machine.
        """
        if self.zoo_root is not None and not self.zoo_root.is_dir():
            raise DetectorError(
                f"expected the operator's detectors in {self.zoo_root} on every node of the Ray cluster, got a node "
                "without that folder; share it with the nodes"
            )
        return LocalEngine(self.zoo_root, self.threads, self.processes, self.tracking, self.weights_dir)


@dataclass(frozen=True)
class Shard:
    """Images of a pool in order, and their files as the machine knows them that owns them."""

    entries: tuple[PoolEntry, ...]
    files: tuple[FileStamp, ...]

    @classmethod
    def of(cls, entries: Sequence[PoolEntry]) -> Shard:
        """A shard of images of this machine."""
        return cls(tuple(entries), tuple(FileStamp.of(entry.path) for entry in entries))


@dataclass(frozen=True)
class ShardResult:
    """What the detector says of the images of a shard, and why it says nothing of the others."""

    inferred: tuple[Inferred, ...]
    unreadable: tuple[tuple[int, ImageError], ...] = ()


class ShardWorker:
    """One process of the cluster with a detector, loaded once.

    Args:
        options: How to make the local engine.
        spec: The round; its device is ``cuda`` or ``cpu``.
        model: The detector.
        checkpoint: Its file, as the machine knows it that owns it.
        read_there: Gives contents of files of that machine.
    """

    def __init__(
        self, options: LocalOptions, spec: RoundSpec, model: ModelRef, checkpoint: FileStamp, read_there: ReadThere
    ) -> None:
        self._options, self._spec, self._model = options, spec, model
        self._checkpoint, self._read_there = checkpoint, read_there
        self._detector: Any = None

    def load(self) -> None:
        """Load the detector.

        Raises:
            PPALError: It cannot be loaded.
        """
        from dataclasses import replace

        engine = self._options.engine()
        with tempfile.TemporaryDirectory(prefix="ppal-ray-") as folder:
            (path,) = bring([self._checkpoint], Path(folder), self._read_there)
            self._detector = engine.open(self._spec, replace(self._model, checkpoint=path))

    def work(self, shard: Shard) -> ShardResult:
        """Look at the images of a shard."""
        from ppal_backend.detector.infer.inference import PoolImage

        unreadable: list[tuple[int, ImageError]] = []
        with tempfile.TemporaryDirectory(prefix="ppal-ray-") as folder:
            paths = bring(shard.files, Path(folder), self._read_there)
            pool = [PoolImage(entry.image_id, path) for entry, path in zip(shard.entries, paths, strict=True)]
            found = self._detector.run_with_features(pool, on_error=lambda *what: unreadable.append(what))
            inferred = tuple(Inferred(result.detections, result.features) for result in found)
        return ShardResult(inferred, tuple(unreadable))


@dataclass
class Mailbox:
    """Between a step on a node and the round that waits for it: progress one way, the wish to stop the other."""

    letters: list[Progress] = field(default_factory=list)
    stop: bool = False

    def post(self, progress: Progress) -> None:
        """Keep progress until it is taken."""
        self.letters.append(progress)

    def take(self) -> list[Progress]:
        """What has been posted since the last call."""
        letters, self.letters = self.letters, []
        return letters

    def ask_to_stop(self) -> None:
        """The step is to end."""
        self.stop = True

    def is_stopped(self) -> bool:
        """Whether the step is to end."""
        return self.stop


class Line:
    """The node's end of a mailbox.

    Args:
        post: Delivers progress.
        is_stopped: Asks whether to stop, and waits for the answer.
    """

    def __init__(self, post: Callable[[Progress], object], is_stopped: Callable[[], bool]) -> None:
        self.post = post
        self._is_stopped, self._asked, self._answer = is_stopped, 0.0, False

    def should_stop(self) -> bool:
        """Whether to stop, as it was half a second ago at most: trainings ask after every step."""
        now = time.monotonic()
        if now - self._asked >= _ASK_EVERY_S:
            self._answer, self._asked = self._is_stopped(), now
        return self._answer


def run_step(options: LocalOptions, marker: str, name: str, arguments: Sequence[Any], line: Line | None) -> Any:
    """Call a method of the local engine on this node.

    Args:
        options: How to make the engine.
        marker: A file that only the round's folder has.
        name: The method.
        arguments: Its arguments, but for ``on_progress`` and ``should_stop``.
        line: Where these two lead, for a method that takes them.

    Raises:
        DetectorError: This node does not see the round's folder.
    """
    if not Path(marker).is_file():
        raise DetectorError(
            f"expected the folder {Path(marker).parent} on every node of the Ray cluster that trains, got a node "
            "without it; share MODEL_DIR under the same path"
        )
    more = () if line is None else (line.post, line.should_stop)
    return getattr(options.engine(), name)(*arguments, *more)


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
