"""The folder of a simulation, and its results, whole or partial, as tables of seeds by rounds.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ppal_backend.errors import StateError
from ppal_backend.files import read_json, write_json
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.simulation.cost import SLOW_DRAWING, AnnotationTime, drawn_from_nothing
from ppal_backend.simulation.data import FACTS
from ppal_backend.simulation.plan import Plan

PLAN, RESULT, LABELLED, START = "simulation.json", "result.json", "labelled.json", "start.json"
QUERY_STEPS = ("candidates", "query", "publish")
_NOT_ADOPTED = ("candidates.json", "query_set.json", "publish.json", "spec.json", "progress.json")
_LARGE = ("detections", "labelled_detections", "dataset", "export", "candidates.json", "publish.json")
_LARGE_OF_START = ("detections", "labelled_detections")
_SMALL_OF_TRAINING = ("model.json", "train.log")
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

    def reopen(self) -> None:
        """Make a finished round, the last one so far, choose images for a further one; what it trained stays, unless
        its checkpoint was dropped: then it is trained again, to the same."""
        kept = ("export", "train", "evaluate") if self._checkpoints() else ()
        for mark in (self.path / "steps").glob("*.json"):
            if mark.stem not in kept:
                mark.unlink()
        (self.path / RESULT).unlink(missing_ok=True)

    def slim(self) -> None:
        """Drop what only a running round needs: checkpoints, detections and copies of the data."""
        for name in _LARGE:
            _remove(self.path / name)
        for path in self._checkpoints():
            _remove(path)

    def _checkpoints(self) -> list[Path]:
        """What a training left, less what tells its story."""
        return [path for path in (self.path / "train").glob("*") if path.name not in _SMALL_OF_TRAINING]


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


def forget_detections(path: Path) -> None:
    """Drop the detections of a round, such as a shared first model's; its checkpoint stays, so that they can be made
    again."""
    folder = RoundFolder(path)
    for step in ("infer", *QUERY_STEPS):
        (folder / "steps" / f"{step}.json").unlink(missing_ok=True)
    for name in _LARGE_OF_START:
        _remove(path / name)


def look_again(folder: RoundFolder) -> None:
    """Undo a look at the pool that missed images, and what was chosen after it. All are looked at again: strategies
    that draw depend on the order of the images."""
    if folder.is_done("infer") and folder.facts("infer")["unreadable_images"]:
        forget_detections(folder.path)


def need_whole_look(folder: RoundFolder) -> None:
    """Hold a look at the pool against its size.

    Raises:
        StateError: Images could not be read; :func:`look_again` goes on from there.
    """
    unreadable = folder.facts("infer")["unreadable_images"]
    if unreadable:
        raise StateError(
            f"expected every image of the pool to be readable, got {unreadable} that are not (the log names them); put "
            "them back and give the same command again"
        )


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


Round = Mapping[str, Any]
SECONDS = {"labelled_seconds": AnnotationTime(), "labelled_seconds_slow": SLOW_DRAWING}
"""Figures of a round that are computed from what people do: the seconds of all labels, with two times for drawing."""


def _with_seconds(rounds: Sequence[Round]) -> Iterator[Round]:
    """Rounds with the modelled seconds of all their labels; None from where it was not counted what people do."""
    if not rounds:
        return
    work: Mapping[str, int] | None = drawn_from_nothing(rounds[0]["labelled_images"], rounds[0]["labelled_boxes"])
    seconds: dict[str, float | None] = dict.fromkeys(SECONDS, 0.0)
    for found in rounds:
        for name, taken in SECONDS.items():
            before = seconds[name]
            seconds[name] = None if before is None or work is None else before + taken.seconds(work)
        yield {**found, **seconds}
        work = found.get("work")


@dataclass(frozen=True)
class Results:
    """What is there.

    Args:
        root: Folder of the simulation.
        plan: Its plan.
        facts: Facts about the data.
        rounds: Finished rounds from 0 on without a gap, by variant name and seed.
    """

    root: Path
    plan: Plan
    facts: Mapping[str, Any]
    rounds: Mapping[tuple[str, int], tuple[Round, ...]]

    @classmethod
    def read(cls, root: Path) -> Results:
        """Read a simulation's folder.

        Raises:
            StateError: It holds no simulation, or no round is finished.
        """
        root = Path(root)
        if not (root / PLAN).is_file() or not (root / "data" / FACTS).is_file():
            raise StateError(f"expected the folder of a simulation, got {root} without {PLAN}; run ppal simulate first")
        plan = Plan.from_dict(read_json(root / PLAN))
        rounds: dict[tuple[str, int], tuple[Round, ...]] = {}
        for variant in plan.variants:
            for seed in plan.seeds:
                found = []
                for number in range(plan.rounds + 1):
                    result = round_place(root, seed, variant.folder, number).result()
                    if result is None:
                        break
                    found.append(result)
                rounds[variant.name, seed] = tuple(_with_seconds(found))
        if not any(rounds.values()):
            raise StateError(f"expected at least one finished round in {root}, got none; run ppal simulate again")
        return cls(root, plan, read_json(root / "data" / FACTS), rounds)

    @property
    def names(self) -> tuple[str, ...]:
        """Variants with at least one finished round, in the order of the plan."""
        return tuple(v.name for v in self.plan.variants if any(self.rounds[v.name, s] for s in self.plan.seeds))

    @property
    def complete(self) -> bool:
        """Whether every round of the plan is there."""
        return all(len(found) == self.plan.rounds + 1 for found in self.rounds.values())

    def complete_seeds(self, *names: str) -> list[int]:
        """Seeds for which all rounds of all these variants are there."""
        wanted = self.plan.rounds + 1
        return [s for s in self.plan.seeds if all(len(self.rounds[name, s]) == wanted for name in names)]

    def table(self, name: str, value: str | Callable[[Round], float | None]) -> np.ndarray:
        """``[seeds, rounds + 1]`` of one figure of a variant, NaN where it is missing."""
        get = value if callable(value) else lambda found: found[value]
        out = np.full((len(self.plan.seeds), self.plan.rounds + 1), np.nan)
        for row, seed in enumerate(self.plan.seeds):
            for column, found in enumerate(self.rounds[name, seed]):
                figure = get(found)
                out[row, column] = np.nan if figure is None else figure
        return out

    def curve(self, name: str, seed: int, x: str) -> tuple[np.ndarray, np.ndarray]:
        """One seed's ``x`` and mAP, round by round."""
        found = self.rounds[name, seed]
        heights = [0.0 if r["map"] is None else float(r["map"]) for r in found]
        return np.array([float(r[x]) for r in found]), np.array(heights)

    def class_groups(self) -> dict[str, tuple[str, ...]]:
        """The rarest and the most frequent third of the classes of the pool (``tail``, ``head``)."""
        labels, counts = self.facts["labels"], self.facts["class_counts"]
        present = sorted((c, label) for label, c in zip(labels, counts, strict=True) if c > 0)
        size = -(-len(present) // 3)
        return {
            "tail": tuple(label for _, label in present[:size]),
            "head": tuple(label for _, label in sorted(present, key=lambda pair: (-pair[0], pair[1]))[:size]),
        }

    def group_map(self, labels: tuple[str, ...]) -> Callable[[Round], float | None]:
        """Mean AP of some classes, over those that the test set has."""

        def get(found: Round) -> float | None:
            values = [found["per_class"][label] for label in labels if label in found["per_class"]]
            return float(np.mean(values)) if values else None

        return get

    def labelled_after(self, name: str, seed: int, number: int) -> list[int]:
        """Images labelled when round ``number`` began."""
        return round_place(self.root, seed, self.plan.variant(name).folder, number).labelled()

    def near_duplicates(self, name: str) -> dict[str, np.ndarray]:
        """Near-duplicates of each query, ``[seeds, rounds]``, where the data name groups.

        ``inside`` counts picks whose group the query holds already; ``labelled`` those whose group was labelled
        before. Empty without groups.
        """
        groups = {int(image): int(group) for image, group in self.facts["groups"]}
        if not groups:
            return {}
        inside = np.full((len(self.plan.seeds), self.plan.rounds), np.nan)
        before = inside.copy()
        for row, seed in enumerate(self.plan.seeds):
            for found in self.rounds[name, seed][: self.plan.rounds]:
                number = int(found["round"])
                known = {groups[i] for i in self.labelled_after(name, seed, number) if i in groups}
                picked = [groups[i] for i in found["picks"] if i in groups]
                inside[row, number] = len(picked) - len(set(picked))
                before[row, number] = sum(group in known for group in picked)
        return {"inside": inside, "labelled": before}
