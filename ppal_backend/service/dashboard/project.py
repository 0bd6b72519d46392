"""One project and its rounds' folders, as the pages see them: read when they are asked for.

Files of a round appear whole and do not change, so they are read once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ppal_backend.errors import StateError
from ppal_backend.files import collector_paused, read_json
from ppal_backend.label_studio.schema import LabelSchema, parse_label_config
from ppal_backend.logs import Redacting
from ppal_backend.operations.control import annotations_missing, corrections, portion
from ppal_backend.operations.detectors import DetectorInForce, in_force
from ppal_backend.rounds.folder import Rounds
from ppal_backend.service.runtime import Runtime
from ppal_backend.settings import ProjectOptions
from ppal_backend.store import ModelVersion, ProjectRecord, RoundRecord
from ppal_backend.structures.steering import Steering

LOG = "train/train.log"
LOG_BYTES = 16_384


@dataclass(frozen=True)
class StepMark:
    """A finished step: how long it took, when it ended (UTC, without a zone), and what it noted."""

    seconds: float
    finished_at: datetime
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Query:
    """A round's ``query_set.json``: ids in labeling order, utilities and explanations by image id. ``to_evaluate`` are
    those of the query set that measure the detector, ``reserve`` all tasks of the pool that are kept for it."""

    strategy: str
    image_ids: tuple[int, ...]
    candidate_ids: tuple[int, ...]
    queue: tuple[int, ...]
    utilities: Mapping[int, float] = field(default_factory=dict)
    explanations: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    to_evaluate: frozenset[int] = frozenset()
    reserve: frozenset[int] = frozenset()
    older: frozenset[int] = frozenset()
    """Tasks that the model did not get to look at: they keep their last place."""
    first: frozenset[int] = frozenset()
    last: frozenset[int] = frozenset()
    """Tasks that people had put in front of the queue, and at its end."""
    quotas: tuple[Mapping[str, Any], ...] = ()
    without_quotas: Mapping[str, Any] = field(default_factory=dict)
    """How the query set holds its quotas, and how far it is from the one without (``rounds.run``)."""
    options: Mapping[str, Any] | None = None
    """The strategy's; None where the round did not note them."""


class PoolImage(NamedTuple):
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

    def marks(self) -> dict[str, StepMark]:
        """The finished steps."""
        return {path.stem: _mark(path) for path in sorted((self.folder / "steps").glob("*.json"))}

    def query(self) -> Query | None:
        """The query set; None before there is one."""
        path = self.folder / "query_set.json"
        return _query(*identity(path)) if path.is_file() else None

    def pool(self) -> Mapping[int, PoolImage]:
        """The pool's images by task id; empty once the round's files were removed."""
        path = self.folder / "dataset" / "pool.json"
        return _pool(*identity(path)) if path.is_file() else {}

    def map(self) -> Mapping[str, Any] | None:
        """The map of the pool; None where the round had no features of images to draw it by."""
        path = self.folder / "map.json"
        return _map(*identity(path)) if path.is_file() else None

    def drawn_labelled(self) -> Mapping[int, PoolImage]:
        """The labelled images on the map, by task id."""
        rows = (self.map() or {}).get("labelled", ())
        return {e["image_id"]: PoolImage(e["path"], e["width"], e["height"]) for e in rows}

    def evaluated(self) -> Mapping[int, PoolImage]:
        """The images of the evaluation set by task id; empty once the round's files were removed."""
        path = self.folder / "dataset" / "val.json"
        return _evaluated(*identity(path)) if path.is_file() else {}

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


def identity(path: Path) -> tuple[Path, int, int]:
    """What tells a file from an earlier one of the same name."""
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
        to_evaluate=frozenset(stored.get("to_evaluate", ())),
        reserve=frozenset(stored.get("reserve", ())),
        older=frozenset(stored.get("older", ())),
        first=frozenset(stored.get("first", ())),
        last=frozenset(stored.get("last", ())),
        quotas=tuple(stored.get("quotas", ())),
        without_quotas=stored.get("without_quotas", {}),
        options=stored.get("options"),
    )


@lru_cache(maxsize=3)
def _pool(path: Path, _changed: int, _size: int) -> dict[int, PoolImage]:
    with collector_paused():
        return {int(e["image_id"]): PoolImage(e["path"], e["width"], e["height"]) for e in _read(path)}


@lru_cache(maxsize=3)
def _map(path: Path, _changed: int, _size: int) -> Mapping[str, Any]:
    return dict(_read(path))


@lru_cache(maxsize=3)
def _evaluated(path: Path, _changed: int, _size: int) -> dict[int, PoolImage]:
    return {int(e["id"]): PoolImage(e["file_name"], e["width"], e["height"]) for e in _read(path)["images"]}


def _mark(path: Path) -> StepMark:
    stored = _read(path)
    finished = datetime.fromisoformat(stored["finished_at"]).astimezone(UTC).replace(tzinfo=None)
    return StepMark(float(stored["seconds"]), finished, stored["facts"])


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise StateError(f"expected JSON in {path}, got a damaged file ({error}); run another round") from None


IMAGE_TYPES = {".jpg": "image/jpeg", ".png": "image/png"}


class Project:
    """A connected project.

    Args:
        runtime: what the service works with.
        record: the project as stored.
    """

    def __init__(self, runtime: Runtime, record: ProjectRecord) -> None:
        self.runtime, self.record, self.id = runtime, record, record.id
        runtime.fetched.settle(record)

    @cached_property
    def options(self) -> ProjectOptions:
        """The options in force."""
        return self.runtime.settings.project_options(self.record.options)

    @cached_property
    def detector(self) -> DetectorInForce:
        """What its next training trains."""
        return in_force(self.runtime.settings, self.record)

    @cached_property
    def rounds(self) -> list[RoundRecord]:
        """All rounds, oldest first."""
        return self.runtime.store.rounds.of_project(self.id)

    @cached_property
    def opened(self) -> list[RoundRecord]:
        """The rounds that run or wait, the running one first."""
        return sorted((r for r in self.rounds if r.finished_at is None), key=lambda r: r.state != "running")

    @cached_property
    def versions(self) -> list[ModelVersion]:
        """All versions, oldest first."""
        return self.runtime.store.versions.of_project(self.id)

    @cached_property
    def active(self) -> ModelVersion | None:
        """The version in force."""
        return next((v for v in self.versions if v.active), None)

    @cached_property
    def trained(self) -> ModelVersion | None:
        """The version whose training made the model in force: it has the measurements. None before any training."""
        model = self.runtime.store.versions.active(self.id, with_model=True)
        if model is None or not model.is_trained:
            return None
        return next(v for v in self.versions if v.checkpoint == model.checkpoint)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Labels of the labeling config."""
        return self._schema.labels

    def shown_from(self, class_names: Sequence[str]) -> list[float]:
        """The score from which annotators are shown a box, by class of a version; infinite for one without a label."""
        return self._schema.shown_from(class_names, self.options.score_threshold)

    @property
    def _schema(self) -> LabelSchema:
        return parse_label_config(self.record.label_config, self.options.from_name)

    @cached_property
    def steering(self) -> Steering:
        """What people ask of the queue now."""
        return self.runtime.store.steering.of_project(self.id)

    @cached_property
    def new_annotations(self) -> int:
        """Annotations that no training has used yet."""
        return self.runtime.store.ledger.new_count(self.id)

    @cached_property
    def portion(self) -> int:
        """How many new annotations start a training by themselves."""
        return portion(self.runtime.store, self.id, self.options.budget)

    @cached_property
    def corrections(self) -> int:
        """Annotations that were corrected since a training with them failed: each counts as much as a whole budget."""
        return corrections(self.runtime.store, self.id)

    @cached_property
    def missing(self) -> int:
        """How many of these are not there yet."""
        return max(0, annotations_missing(self.runtime.store, self.id, self.options.budget))

    @cached_property
    def labelled_tasks(self) -> int:
        """Tasks with a usable annotation."""
        return self.runtime.store.ledger.task_count(self.id)

    @cached_property
    def snapshot(self) -> tuple[int, Mapping[str, Any]] | None:
        """The newest round that has read the annotations, and what it noted; None before there is one."""
        for record in reversed(self.rounds):
            mark = self.files(record.number).marks().get("dataset")
            if mark is not None:
                return record.number, mark.facts
        return None

    def labelled_since(self, number: int) -> frozenset[int]:
        """Tasks with an annotation that came after a round had read them."""
        return frozenset(self.runtime.store.ledger.tasks_after(self.id, number))

    @property
    def name(self) -> str:
        """What Label Studio calls the project."""
        return self.record.title or f"Project {self.id}"

    @property
    def label_link(self) -> str:
        """Where Label Studio begins to serve the queue, as its button Label All Tasks does."""
        return f"{self.label_studio}/projects/{self.id}/data?labeling=1"

    @property
    def label_studio(self) -> str:
        """Label Studio's address for links, without credentials."""
        settings = self.runtime.settings
        parts = urlsplit(settings.label_studio_public_url or settings.label_studio_url or self.record.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")

    def task_link(self, task_id: int) -> str:
        """Where Label Studio opens a task of the project."""
        return f"{self.label_studio}/projects/{self.id}/data?task={task_id}"

    def files(self, number: int) -> RoundFiles:
        """The folder of a round."""
        folder = Rounds(self.runtime.settings).show(self.record.key, self.id, number)
        if self.active is not None:
            self.runtime.fetched.prune(self.id, self.active.version)
        return RoundFiles(folder)

    def image_file(self, number: int, task_id: int) -> Path:
        """An image of a round's pool, its evaluation set, or its map; only files of the image cache are ever named.

        Raises:
            StateError: the round has no such task, or its file is not in the cache any more.
        """
        files = self.files(number)
        known = (files.pool, files.evaluated, files.drawn_labelled)
        image = next((found for images in known if (found := images().get(task_id)) is not None), None)
        path = self.cached(image) if image is not None else None
        if path is None:
            raise StateError(f"round {number} of project {self.id} has no image of task {task_id}")
        return path

    def cached(self, image: PoolImage) -> Path | None:
        """The file of an image; None where the cache does not have it (any more)."""
        cache = self.runtime.settings.image_folder.resolve()
        path = Path(image.path).resolve()
        return path if path.is_relative_to(cache) and path.suffix in IMAGE_TYPES and path.is_file() else None

    def log_lines(self, number: int) -> list[str]:
        """The last lines of a round's training log, without secrets."""
        hide = Redacting(logging.Formatter(), self.runtime.settings.secrets)
        lines = self.files(number).log_lines()
        return [hide.format(logging.LogRecord("", logging.INFO, "", 0, line, None, None)) for line in lines]
