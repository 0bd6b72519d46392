"""The folder of a simulation.

simulation.json                     the plan
data/                               pool.json, test.json, facts.json
seed-0/start.json                   the images labelled at the start
seed-0/first-default/               round folder of the first model, shared by the strategies
seed-0/ppal/round-00/               round folder of one round of one strategy
                     labelled.json  the images labelled when the round began
                     result.json    written last: the round is over
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ppal_backend.errors import StateError
from ppal_backend.files import read_json, write_json
from ppal_backend.rounds.artifacts import RoundFolder

PLAN, RESULT, LABELLED, START = "simulation.json", "result.json", "labelled.json", "start.json"
QUERY_STEPS = ("candidates", "query", "publish")
_NOT_ADOPTED = ("candidates.json", "query_set.json", "publish.json", "spec.json", "progress.json")
_LARGE = ("detections", "labelled_detections", "dataset", "export", "candidates.json", "publish.json")
_LARGE_OF_START = ("detections", "labelled_detections")
_LOCK_POLL_S = 0.2


def seed_folder(root: Path, seed: int) -> Path:
    """Folder of one start."""
    return root / f"seed-{seed}"


def first_model_folder(root: Path, seed: int, first_model: str) -> Path:
    """Round folder of the first model of a start."""
    return seed_folder(root, seed) / f"first-{first_model}"


class RoundPlace:
    """The folder of one round of one strategy and the simulation's own files in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def labelled(self) -> list[int]:
        """Ids of the images labelled when the round began, in the order they were labelled."""
        return [int(i) for i in read_json(self.path / LABELLED)]

    def write_labelled(self, image_ids: Sequence[int]) -> None:
        """Note what is labelled; atomic."""
        write_json(self.path / LABELLED, list(image_ids))

    def result(self) -> dict[str, Any] | None:
        """What the finished round achieved; None while it is not over."""
        path = self.path / RESULT
        return dict(read_json(path)) if path.is_file() else None

    def write_result(self, result: dict[str, Any]) -> None:
        """Declare the round over; everything else must be on disk by now."""
        write_json(self.path / RESULT, result)

    def slim(self) -> None:
        """Drop what only a running round needs: checkpoints, detections and copies of the data."""
        for name in _LARGE:
            _remove(self.path / name)
        for path in (self.path / "train").glob("*"):
            if path.name not in ("model.json", "train.log"):
                _remove(path)


def round_place(root: Path, seed: int, variant_folder: str, number: int) -> RoundPlace:
    """Folder of a round."""
    return RoundPlace(seed_folder(root, seed) / variant_folder / f"round-{number:02d}")


def adopt_first_model(first: Path, place: RoundPlace, labelled: Sequence[int]) -> None:
    """Make the first round of a strategy from the shared first model: all steps before the query are done.

    Files are linked, not copied, where the file system can. The folder appears whole or not at all.
    """
    if place.path.is_dir():
        return
    part = place.path.with_name(f".{place.path.name}.part")
    _remove(part)
    for source in sorted(p for p in first.rglob("*") if p.is_file()):
        relative = source.relative_to(first)
        is_mark_of_query = relative.parts[0] == "steps" and source.stem in QUERY_STEPS
        is_weight = relative.parts[0] == "train" and source.name != "model.json"
        if relative.name in _NOT_ADOPTED or is_mark_of_query or is_weight or source.name.startswith("."):
            continue
        target = part / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
    RoundPlace(part).write_labelled(labelled)
    part.replace(place.path)


def slim_first_model(first: Path) -> None:
    """Drop the detections of a shared first model; its checkpoint stays, so that they can be made again."""
    folder = RoundFolder(first)
    for step in ("infer", *QUERY_STEPS):
        (folder / "steps" / f"{step}.json").unlink(missing_ok=True)
    for name in _LARGE_OF_START:
        _remove(first / name)


@contextmanager
def locked(path: Path, busy: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock that vanishes with the process.

    Raises:
        StateError: Another process holds it and has not let go within ``wait_s``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        _take(file, busy, wait_s)
        yield


def _take(file: IO[str], busy: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise StateError(busy) from None
            time.sleep(_LOCK_POLL_S)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
