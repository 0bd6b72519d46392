"""One project, as its pages see it: read from the store and from the folders of its rounds, when it is asked for."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from ppal_backend.errors import StateError
from ppal_backend.logs import Redacting
from ppal_backend.rounds.mirror import open_mirror
from ppal_backend.service.dashboard.round_files import PoolImage, RoundFiles
from ppal_backend.service.predicting import schema_of
from ppal_backend.service.runtime import Runtime
from ppal_backend.settings import ProjectOptions
from ppal_backend.store import ModelVersion, ProjectRecord, RoundRecord

IMAGE_TYPES = {".jpg": "image/jpeg", ".png": "image/png"}


class Project:
    """A connected project.

    Args:
        runtime: what the service works with.
        record: the project as stored.
    """

    def __init__(self, runtime: Runtime, record: ProjectRecord) -> None:
        self.runtime, self.record, self.id = runtime, record, record.id

    @cached_property
    def options(self) -> ProjectOptions:
        """The options in force."""
        return self.runtime.settings.project_options(self.record.options)

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
        """The version whose training made the model in force: it has the measurements."""
        model = self.runtime.store.versions.active(self.id, with_model=True)
        if model is None or not model.checkpoint:
            return None
        return next(v for v in self.versions if v.checkpoint == model.checkpoint)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Labels of the labeling config."""
        return schema_of(self.record.label_config, self.options.from_name).labels

    @cached_property
    def new_annotations(self) -> int:
        """Annotations that no training has used yet."""
        return self.runtime.store.ledger.new_count(self.id)

    def labelled_since(self, number: int) -> frozenset[int]:
        """Tasks with an annotation that came after a round had read them."""
        return frozenset(self.runtime.store.ledger.tasks_after(self.id, number))

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
        mirror = open_mirror(self.runtime.settings)
        if mirror is not None:
            mirror.show(self.record.key, self.id, number)
        return RoundFiles(self.runtime.settings.project_folder(self.id) / "rounds" / str(number))

    def image_file(self, number: int, task_id: int) -> Path:
        """An image of a round's pool, or of its map; only files of the image cache are ever named.

        Raises:
            StateError: the round has no such task, or its file is not in the cache any more.
        """
        files = self.files(number)
        image: PoolImage | None = files.pool().get(task_id) or files.drawn_labelled().get(task_id)
        cache = (self.runtime.settings.model_dir / "images").resolve()
        path = Path(image.path).resolve() if image is not None else cache
        if not path.is_relative_to(cache) or path.suffix not in IMAGE_TYPES or not path.is_file():
            raise StateError(f"round {number} of project {self.id} has no image of task {task_id}")
        return path

    def log_lines(self, number: int) -> list[str]:
        """The last lines of a round's training log, without secrets."""
        hide = Redacting(logging.Formatter(), self.runtime.settings.secrets)
        lines = self.files(number).log_lines()
        return [hide.format(logging.LogRecord("", logging.INFO, "", 0, line, None, None)) for line in lines]
