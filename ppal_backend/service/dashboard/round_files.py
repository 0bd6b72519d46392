"""What a round's folder tells a page. Files of a round appear whole and do not change, so they are read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from ppal_backend.errors import StateError
from ppal_backend.files import read_json

LOG = "train/train.log"
LOG_BYTES = 16_384


@dataclass(frozen=True)
class Mark:
    """A finished step: how long it took, when it ended (UTC, without a zone), and what it noted."""

    seconds: float
    finished_at: datetime
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Query:
    """A round's ``query_set.json``: ids in labeling order, utilities and explanations by image id."""

    strategy: str
    image_ids: tuple[int, ...]
    candidate_ids: tuple[int, ...]
    queue: tuple[int, ...]
    utilities: Mapping[int, float] = field(default_factory=dict)
    explanations: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class PoolImage:
    """An image of the pool: where its file lies, and its size in pixels."""

    path: str
    width: int
    height: int


class RoundFiles:
    """The folder of one round, for reading; everything may be missing.

    Every method raises:
        StateError: the file is there and damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def marks(self) -> dict[str, Mark]:
        """The finished steps."""
        return {path.stem: _mark(path) for path in sorted((self.folder / "steps").glob("*.json"))}

    def query(self) -> Query | None:
        """The query set; None before there is one."""
        path = self.folder / "query_set.json"
        return _query(*_identity(path)) if path.is_file() else None

    def pool(self) -> Mapping[int, PoolImage]:
        """The pool's images by task id; empty once the round's files were removed."""
        path = self.folder / "dataset" / "pool.json"
        return _pool(*_identity(path)) if path.is_file() else {}

    def map(self) -> Mapping[str, Any] | None:
        """The map of the pool; None where the round had no features of images to draw it by."""
        path = self.folder / "map.json"
        return _map(*_identity(path)) if path.is_file() else None

    def drawn_labelled(self) -> Mapping[int, PoolImage]:
        """The labelled images on the map, by task id."""
        rows = (self.map() or {}).get("labelled", ())
        return {e["image_id"]: PoolImage(e["path"], e["width"], e["height"]) for e in rows}

    def review(self) -> Mapping[str, Any] | None:
        """What the detector disputes of the annotations; None where the round did not compare them."""
        path = self.folder / "dataset" / "quality.json"
        return dict(_read(path)) if path.is_file() else None

    def has_images(self) -> bool:
        """Whether the round still knows its pool's images."""
        return (self.folder / "dataset" / "pool.json").is_file()

    def log_lines(self, count: int = 12) -> list[str]:
        """The last lines of the training's log; none before it has one."""
        path = self.folder / LOG
        if not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()[-count:]


def _identity(path: Path) -> tuple[Path, int, int]:
    stat = path.stat()
    return path, stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=6)
def _query(path: Path, _changed: int, _size: int) -> Query:
    stored = _read(path)
    return Query(
        strategy=stored["strategy"],
        image_ids=tuple(stored["image_ids"]),
        candidate_ids=tuple(stored["candidate_ids"]),
        queue=tuple(stored["queue"]),
        utilities={int(i): float(u) for i, u in stored["utilities"]},
        explanations={int(i): e for i, e in stored["explanations"].items()},
    )


@lru_cache(maxsize=3)
def _pool(path: Path, _changed: int, _size: int) -> dict[int, PoolImage]:
    return {int(e["image_id"]): PoolImage(e["path"], e["width"], e["height"]) for e in _read(path)}


@lru_cache(maxsize=3)
def _map(path: Path, _changed: int, _size: int) -> Mapping[str, Any]:
    return dict(_read(path))


def _mark(path: Path) -> Mark:
    stored = _read(path)
    finished = datetime.fromisoformat(stored["finished_at"]).astimezone(UTC).replace(tzinfo=None)
    return Mark(float(stored["seconds"]), finished, stored["facts"])


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise StateError(f"expected JSON in {path}, got a damaged file ({error}); run another round") from None
