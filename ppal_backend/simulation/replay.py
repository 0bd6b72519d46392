"""One start and one strategy of a simulation, round by round; everything that is on disk already is taken as done."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.errors import StateError
from ppal_backend.files import read_json, write_json
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import Engine, Ports
from ppal_backend.rounds.run import RoundResult, run_round
from ppal_backend.simulation.cost import work_on
from ppal_backend.simulation.data import Benchmark
from ppal_backend.simulation.folder import (
    LABELLED,
    START,
    RoundPlace,
    adopt_first_model,
    first_model_folder,
    forget_detections,
    locked,
    look_again,
    need_whole_look,
    round_place,
    seed_folder,
)
from ppal_backend.simulation.oracle import (
    PROGRESS,
    Discard,
    Oracle,
    Recorder,
    Reporter,
    take_boxes,
    take_images,
    take_query,
)
from ppal_backend.simulation.plan import Plan
from ppal_backend.simulation.statistics import compare_retrieval
from ppal_backend.simulation.variants import Variant

log = logging.getLogger(__name__)

_START_STREAM = 0x57A27
ORPHAN_WAIT_S = 30.0


def random_start(image_ids: Iterable[int], count: int, seed: int) -> list[int]:
    """The first images of a seed: ``count`` of these, drawn whatever their order."""
    rng = np.random.default_rng([seed, _START_STREAM])
    return [int(i) for i in rng.choice(np.array(sorted(image_ids)), count, replace=False)]


class Replay:
    """Runs parts of a simulation.

    Args:
        root: Folder of the simulation.
        plan: What to do.
        benchmark: The data.
        engine: Where the detector runs.
        device: Of this process.
        keep: Whether to keep checkpoints and detections of finished rounds.
        stop: Asks for an early end; what is complete stays.
    """

    def __init__(
        self,
        root: Path,
        plan: Plan,
        benchmark: Benchmark,
        engine: Engine,
        device: str = "auto",
        keep: bool = False,
        stop: threading.Event | None = None,
    ) -> None:
        self._root, self._plan, self._benchmark, self._engine = root, plan, benchmark, engine
        self._device, self._keep, self._stop = device, keep, stop

    def start_ids(self, seed: int, start: str = "random") -> list[int]:
        """The images that every strategy of this seed (and kind of start) begins with, chosen once."""
        path = seed_folder(self._root, seed) / (START if start == "random" else f"start-{start}.json")
        if not path.is_file():
            if start == "random":
                chosen = random_start(self._benchmark.pool.image_ids, self._plan.start, seed)
            else:
                chosen = self._typical_start(seed)
            write_json(path, chosen)
        return [int(i) for i in read_json(path)]

    def _typical_start(self, seed: int) -> list[int]:
        """What a project without labels is asked for first, by the round that serves people."""
        path = seed_folder(self._root, seed) / "typical"
        with locked(path / ".lock", f"another process works in {path}; stop it first", ORPHAN_WAIT_S):
            folder = RoundFolder(path)
            look_again(folder)
            result = run_round(
                self._plan.start_spec(seed, self._device),
                folder,
                Ports(
                    Oracle(self._benchmark, []), self._engine, Discard(), self._reporter(path, seed, "first images", 0)
                ),
            )
            need_whole_look(folder)
            if folder.read("query_set.json")["strategy"] != "typiclust":
                raise StateError(
                    f"expected initial weights of {self._plan.detector} to choose typical first images, got none; "
                    f"fetch them with ppal zoo fetch, or start at random"
                )
            RoundPlace(path).slim()
        return list(result.queue[: self._plan.start])

    def first_model(self, seed: int, first_model: str) -> None:
        """Train the first model of a seed and look at the pool with it; shared by the seed's strategies."""
        users = [v for v in self._plan.variants if v.first_model == first_model]
        path = first_model_folder(self._root, seed, first_model)
        with locked(path / ".lock", f"another process works in {path}; stop it first", ORPHAN_WAIT_S):
            counting = next((v.strategy for v in users if v.reads_counts), "random")
            looked_by = users[0].strategy if users[0].changes_detector else counting
            plain = Variant(looked_by, {}, users[0].difficulty, inference=users[0].inference)
            spec = self._plan.spec(seed, 0, plain, self._device, any(v.looks_at_labelled for v in users))
            if _look(path) not in (None, (spec.strategy, spec.look_at_labelled)):
                forget_detections(path)  # a strategy came that wants more to be seen
            folder = RoundFolder(path)
            look_again(folder)
            run_round(
                spec,
                folder,
                Ports(
                    Oracle(self._benchmark, self.start_ids(seed, users[0].start)),
                    self._engine,
                    Discard(),
                    self._reporter(path, seed, "first model", 0),
                ),
            )
            need_whole_look(folder)

    def strategy(self, seed: int, variant: Variant) -> None:
        """All rounds of one strategy of one seed."""
        folder = seed_folder(self._root, seed) / variant.folder
        with locked(folder / ".lock", f"another process works in {folder}; stop it first", ORPHAN_WAIT_S):
            for number in range(self._plan.rounds + 1):
                place = round_place(self._root, seed, variant.folder, number)
                following = round_place(self._root, seed, variant.folder, number + 1).path / LABELLED
                if number < self._plan.rounds and place.result() is not None and not following.is_file():
                    place.reopen()  # it was the last one when it was run
                if place.result() is None:
                    self._round(seed, variant, number, place)
                if not self._keep:
                    place.slim()

    def _round(self, seed: int, variant: Variant, number: int, place: RoundPlace) -> None:
        if number == 0:
            first = first_model_folder(self._root, seed, variant.first_model)
            adopt_first_model(first, place, self.start_ids(seed, variant.start))
        last = number == self._plan.rounds
        following = None if last else round_place(self._root, seed, variant.folder, number + 1)
        labelled = place.labelled()
        take = self._take(seed, variant, number, labelled)
        folder = RoundFolder(place.path)
        look_again(folder)
        result = run_round(
            self._plan.spec(seed, number, variant, self._device, variant.looks_at_labelled and not last),
            folder,
            Ports(
                Oracle(self._benchmark, labelled, query=not last),
                self._engine,
                Recorder(place, following, take),
                self._reporter(place.path.parent, seed, variant.name, number),
            ),
        )
        picks = [] if following is None else following.labelled()[len(labelled) :]
        place.write_result(self._summary(result, folder, number, labelled, picks))
        log.info("seed %d, %s, round %d: mAP %s", seed, variant.name, number, result.metrics.get("map"))

    def _take(self, seed: int, variant: Variant, number: int, labelled: list[int]) -> Any:
        if number == self._plan.rounds:
            return take_query
        if variant.match is not None:
            followed = self._plan.variant(variant.match).folder
            theirs = round_place(self._root, seed, followed, number + 1).labelled()
            boxes = self._benchmark.boxes
            return take_boxes(sum(boxes[i] for i in theirs) - sum(boxes[i] for i in labelled), boxes)
        if not variant.counts_images:
            return take_query
        return take_images(variant.budget or self._plan.budget)

    def _reporter(self, folder: Path, seed: int, what: str, number: int) -> Reporter:
        return Reporter(folder / PROGRESS, {"seed": seed, "what": what, "round": number}, self._stop)

    def _summary(
        self, result: RoundResult, folder: RoundFolder, number: int, labelled: list[int], picks: list[int]
    ) -> dict[str, Any]:
        """What the report is made of."""
        last = number == self._plan.rounds
        difficulty = None if result.model is None else result.model.difficulty
        named = None if difficulty is None else dict(zip(self._benchmark.labels, difficulty, strict=True))
        metrics = result.metrics
        retrieval = None
        if self._plan.retrieval_images and picks:
            retrieval = compare_retrieval(folder / "detections", self._benchmark, self._plan.retrieval_images)
        return {
            "round": number,
            "labelled_images": len(labelled),
            "labelled_boxes": sum(self._benchmark.boxes[i] for i in labelled),
            "map": metrics.get("map"),
            "map50": metrics.get("map50"),
            "per_class": dict(metrics.get("per_class", {})),
            "difficulty": named,
            "picks": picks,
            "work": None if last else work_on(picks, self._benchmark, folder / "detections"),
            "seconds": result.seconds,
            "training": folder.facts("train"),
            "retrieval": retrieval,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def _look(first: Path) -> tuple[str, bool] | None:
    """With which strategy a first model looked at the images, and whether at labelled ones; None where none did yet."""
    spec = first / "spec.json"
    if not spec.is_file():
        return None
    stored = read_json(spec)
    return stored["strategy"], stored["look_at_labelled"]
