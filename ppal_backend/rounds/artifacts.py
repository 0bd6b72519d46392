"""The folder of one round: a mark per finished step, and the files the steps leave for each other."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ppal_backend.files import read_json, write_json

log = logging.getLogger(__name__)


class RoundFolder:
    """Artifacts of one round. A step is done when its mark is on disk; marks are written last.

    Layout: ``spec.json``, ``steps/<step>.json`` (mark: seconds and facts), then what the steps write:
    ``export/``, ``dataset/``, ``train/``, ``metrics.json``, ``detections/``, ``candidates.json``,
    ``query_set.json``, ``publish.json``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def is_done(self, step: str) -> bool:
        """Whether a step has left its mark."""
        return self._mark(step).is_file()

    def mark_done(self, step: str, seconds: float, facts: dict[str, Any]) -> None:
        """Leave the mark of a step: everything it wrote must be on disk by now."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self._mark(step), {"seconds": round(seconds, 3), "finished_at": stamp, "facts": facts})

    def facts(self, step: str) -> dict[str, Any]:
        """What a finished step noted."""
        return dict(read_json(self._mark(step))["facts"])

    def seconds(self) -> dict[str, float]:
        """Seconds of every finished step, oldest first."""
        marks = sorted((self.path / "steps").glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
        return {p.stem: float(read_json(p)["seconds"]) for p in marks}

    def read(self, name: str) -> Any:
        """A JSON artifact."""
        return read_json(self.path / name)

    def write(self, name: str, value: Any) -> None:
        """Write a JSON artifact, atomically."""
        write_json(self.path / name, value)

    def _mark(self, step: str) -> Path:
        return self.path / "steps" / f"{step}.json"


def claim_project_folder(folder: Path, key: str) -> None:
    """Make ``folder`` the one of the project with this key; rounds of another project with the same id
    (Label Studio was set up afresh) are moved aside, not mixed in and not deleted."""
    owner = folder / "project.json"
    if owner.is_file() and read_json(owner)["key"] != key:
        aside = folder.with_name(f"{folder.name}.replaced-{int(time.time())}")
        folder.rename(aside)
        log.warning("project folder %s belonged to another project; moved to %s", folder, aside)
    if not owner.is_file():
        write_json(owner, {"key": key})
