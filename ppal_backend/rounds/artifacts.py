"""The folder of one round: a mark per finished step, and the files the steps leave for each other.

A mark holds the SHA-256 of every file that its step left. A round that is taken up again checks them: what is
damaged is taken away, and its step and those after it are done again.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ppal_backend.errors import StateError
from ppal_backend.files import read_json, sha256_of, write_json

log = logging.getLogger(__name__)

OUTPUTS: dict[str, tuple[str, ...]] = {
    "export": ("export/*",),
    "dataset": ("dataset/*",),
    "train": ("train/*.json", "train/*.pth"),
    "evaluate": ("metrics.json",),
    "infer": ("detections/*.npz", "labelled_detections/*.npz"),
    "candidates": ("candidates.json",),
    "query": ("query_set.json", "map.json"),
    "publish": ("publish.json",),
}
"""What each step leaves, in the order of the steps."""

STATES = ("spec.json", "publish.json")
"""Small files that are written between steps, and that a round cannot be resumed well without."""

NEEDED_AFTER_PUBLISHING = ("train", "evaluate", "query")


class Copy(Protocol):
    """Who keeps a copy of a round's folder elsewhere; what it raises ends the attempt at the round."""

    def step_done(self, step: str) -> None:
        """A step's files and mark are on disk."""

    def state_written(self, name: str) -> None:
        """One of ``STATES`` is on disk."""


class RoundFolder:
    """Artifacts of one round. A step is done when its mark is on disk; marks are written last.

    Layout: ``spec.json``, ``steps/<step>.json`` (mark: seconds and facts), then what the steps write:
    ``export/``, ``dataset/``, ``train/``, ``metrics.json``, ``detections/``, ``candidates.json``,
    ``query_set.json``, ``publish.json``.
    """

    def __init__(self, path: Path, copy: Copy | None = None) -> None:
        self.path, self._copy = path, copy
        path.mkdir(parents=True, exist_ok=True)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def is_done(self, step: str) -> bool:
        """Whether a step has left its mark."""
        return self._mark(step).is_file()

    def mark_done(self, step: str, seconds: float, facts: dict[str, Any]) -> None:
        """Leave the mark of a step: everything it wrote must be on disk by now."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        sums = {str(path.relative_to(self.path)): sha256_of(path) for path in outputs_of(self.path, step)}
        mark = {"seconds": round(seconds, 3), "finished_at": stamp, "facts": facts, "sha256": sums}
        write_json(self._mark(step), mark)
        if self._copy is not None:
            self._copy.step_done(step)

    def repair(self) -> list[str]:
        """Check what earlier attempts left, before a round is taken up again.

        Returns:
            The steps whose marks were taken away: they are done again. A training that is done again starts from
            nothing, an inference keeps its undamaged shards.
        """
        for name in STATES:
            if (self.path / name).is_file() and not _is_json(self.path / name):
                log.warning("%s is damaged and left out", self.path / name)
                (self.path / name).unlink()
        done = [step for step in OUTPUTS if self.is_done(step)]
        checked = [s for s in done if s in NEEDED_AFTER_PUBLISHING] if "publish" in done else done
        for step in checked:
            damaged = self._damaged(step)
            if damaged is not None:
                later = list(OUTPUTS)[list(OUTPUTS).index(step) :]
                return self._undo_damaged(later, damaged)
        return []

    def _damaged(self, step: str) -> list[Path] | None:
        """Files of a finished step that are not as it left them; [] when its mark is damaged, None when all is well.

        Marks from before there were checksums tell nothing."""
        if not _is_json(self._mark(step)):
            return []
        sums = read_json(self._mark(step)).get("sha256", {})
        damaged = [self.path / n for n, wanted in sums.items() if not _has(self.path / n, wanted)]
        return damaged or None

    def undo(self, steps: Sequence[str]) -> None:
        """Take away steps, finished or half done, with what they left; what publishing has come to stays."""
        for step in reversed(steps):
            self._mark(step).unlink(missing_ok=True)
            for path in [] if step == "publish" else outputs_of(self.path, step):
                path.unlink(missing_ok=True)
            if step == "train":
                shutil.rmtree(self.path / "train", ignore_errors=True)

    def _undo_damaged(self, steps: list[str], damaged: list[Path]) -> list[str]:
        """Take away a damaged step and what came of it: half-done steps too, or their files would pass for results of
        what the step leaves when it is done again."""
        finished = [step for step in steps if self.is_done(step)]
        names = ", ".join(str(path.relative_to(self.path)) for path in damaged) or f"steps/{steps[0]}.json"
        log.error("%s: %s damaged; done again: %s", self.path, names, ", ".join(finished))
        for step in reversed(steps):
            self._mark(step).unlink(missing_ok=True)
            kept = step == "publish" or (step == "infer" and step == steps[0])
            for path in damaged if kept else outputs_of(self.path, step):
                path.unlink(missing_ok=True)
            if step == "train":
                shutil.rmtree(self.path / "train", ignore_errors=True)
        return finished

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
        if self._copy is not None and name in STATES:
            self._copy.state_written(name)

    def checkpoint(self, stored: str) -> str:
        """A checkpoint of this round that was stored with its path, here: the path may be another machine's."""
        here = self.path / "train" / Path(stored).name
        return str(here) if not Path(stored).is_file() and here.is_file() else stored

    def _mark(self, step: str) -> Path:
        return self.path / "steps" / f"{step}.json"


def outputs_of(folder: Path, step: str) -> list[Path]:
    """What a step has left in a round's folder."""
    found = [path for pattern in OUTPUTS.get(step, ()) for path in sorted(folder.glob(pattern))]
    return [path for path in found if path.is_file() and not path.name.startswith(".")]


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


def need_intact(checkpoint: Path, version: str) -> None:
    """Make sure that a version's checkpoint is there, and as its training left it.

    Raises:
        StateError: it is gone or damaged.
    """
    advice = "train again (ppal round PROJECT) or go back to another version (ppal versions PROJECT)"
    if not checkpoint.is_file():
        raise StateError(f"expected the checkpoint of version {version} at {checkpoint}, got no file; {advice}")
    for folder in checkpoint.parents:
        mark = folder / "steps" / "train.json"
        if mark.is_file() and _is_json(mark):
            wanted = read_json(mark).get("sha256", {}).get(str(checkpoint.relative_to(folder)))
            if wanted is not None and sha256_of(checkpoint) != wanted:
                raise StateError(
                    f"expected the checkpoint of version {version} as it was trained (SHA-256 {wanted[:12]}…), got "
                    f"other content in {checkpoint}: the file is damaged; {advice}"
                )
            return


def _has(path: Path, wanted: str) -> bool:
    return path.is_file() and sha256_of(path) == wanted


def _is_json(path: Path) -> bool:
    try:
        read_json(path)
    except ValueError:
        return False
    return True
