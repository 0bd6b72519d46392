"""``ppal simulate``: from options to finished rounds and a report, with a progress display for people."""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from ppal_backend.detector.zoo import ZooEntry, find_entry
from ppal_backend.detector.zoo.fetch import weights_file
from ppal_backend.detector.zoo.fingerprint import detector_fingerprint
from ppal_backend.engines.local import LocalEngine
from ppal_backend.errors import SettingsError, StateError
from ppal_backend.files import write_json
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import TrainingFiles
from ppal_backend.settings import load_settings
from ppal_backend.simulation.data import FACTS, Benchmark, DataSource, source_from
from ppal_backend.simulation.folder import PLAN, RESULT, locked, round_place
from ppal_backend.simulation.oracle import PROGRESS
from ppal_backend.simulation.plan import Plan, load_preset, parse_amount, parse_seeds
from ppal_backend.simulation.replay import random_start
from ppal_backend.simulation.schedule import EngineFactory, run_tasks
from ppal_backend.simulation.variants import Variant, check_detector, parse_variants

log = logging.getLogger(__name__)

POLL_S = 1.0
TASKS_SHOWN = 3
_WORTH_MEASURING = 10_000  # steps of training, about an hour or more
_STEPS_MEASURED, _IMAGES_MEASURED = 6, 32
DEFAULTS: Mapping[str, Any] = {
    "detector": "retinanet_tiny",
    "strategies": ["random", "entropy", "ppal"],
    "start": "5%",
    "budget": "2.5%",
    "rounds": 6,
    "seeds": 3,
}
_PLAN_KEYS = frozenset(
    {"detector", "strategies", "start", "budget", "rounds", "seeds", "delta", "max_iterations", "init_weights",
     "difficulty", "slices", "threads", "retrieval_images"}
)  # fmt: skip


@dataclass(frozen=True)
class SimulationOptions:
    """What somebody asks for; what is None comes from the preset, then from the defaults.

    Args:
        out: Folder of the simulation; one that holds an unfinished one is gone on with.
        preset: Name of a preset.
        data: Settings of the data, see :class:`~ppal_backend.simulation.data.DataSource`.
        plan: Settings of the plan: ``detector``, ``strategies``, ``start``, ``budget``, ``rounds``, ``seeds``,
            ``delta``, ``max_iterations``, ``init_weights``, ``difficulty``, ``slices``, ``threads``,
            ``retrieval_images``.
        jobs: Processes.
        devices: Shared out among them.
        keep: Whether to keep checkpoints and detections of finished rounds.
    """

    out: Path
    preset: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    jobs: int = 1
    devices: Sequence[str] = ("auto",)
    keep: bool = False


def simulate(
    options: SimulationOptions, console: Console | None = None, engine_factory: EngineFactory | None = None
) -> Path:
    """Run a simulation, or go on with the one in ``out``, and write its report.

    Args:
        options: What to run.
        console: Where to show progress; None for nowhere.
        engine_factory: Where detectors run; this machine by default.

    Returns:
        Path of ``report.md``.

    Raises:
        SettingsError: A name or number is wrong.
        DatasetError: The data cannot be used.
        StateError: The folder holds another simulation, another process works in it, or parts failed.
        WeightsUnavailable: The detector's initial weights are not there and cannot be fetched.
        RoundCancelled: Ctrl-C; the same call goes on.
    """
    out = Path(options.out).resolve()
    console = console or Console(quiet=True)
    with locked(out / ".lock", f"another simulation is running in {out}; wait for it or stop it"):
        plan = prepare(options, out, console)
        _announce(plan, console)
        if engine_factory is None:
            settings = load_settings()
            entry = find_entry(plan.detector, settings.model_zoo)
            if plan.init_weights == "zoo" and (entry.weights is not None or not entry.from_scratch):
                weights_file(entry, settings.weights_dir)  # before anything starts, rather than in every part of it
            _announce_duration(out, plan, entry, options, console)
        try:
            with Board(out, plan, console):
                run_tasks(
                    out,
                    plan,
                    engine_factory or local_engine,
                    jobs=options.jobs,
                    devices=options.devices,
                    keep=options.keep,
                )
        except BaseException:
            console.print("finished rounds are kept; the same command goes on from here", style="yellow")
            raise
        from ppal_backend.simulation.report import write_report  # draws; only the parent process needs that

        return write_report(out)


def prepare(options: SimulationOptions, out: Path, console: Console) -> Plan:
    """Read the data, settle the plan and write both into ``out``.

    Raises:
        SettingsError: A name or number is wrong.
        DatasetError: The data cannot be used.
        StateError: ``out`` holds a simulation of other data or another protocol.
    """
    preset: dict[str, Any] = load_preset(options.preset) if options.preset else {"title": "", "data": {}, "plan": {}}
    wanted = {**DEFAULTS, **preset["plan"], **_given(options.plan)}
    unknown = sorted(set(wanted) - _PLAN_KEYS)
    if unknown:
        raise SettingsError(f"expected settings among {sorted(_PLAN_KEYS)}, got {unknown}; correct the name")
    earlier = read_plan(out)
    variants = parse_variants(wanted["strategies"], () if earlier is None else earlier.variants)
    settings = load_settings()
    entry = find_entry(str(wanted["detector"]), settings.model_zoo)
    check_detector(variants, entry.name, entry.head_family)
    source = source_from({**preset["data"], **_given(options.data)})
    with console.status("reading the data"):
        benchmark = source.load(settings.cache_dir / "benchmarks")
    total = len(benchmark.pool.images)
    rest = {key: value for key, value in wanted.items() if key not in ("strategies", "start", "budget", "seeds")}
    plan = Plan(
        start=parse_amount(wanted["start"], total, "start"),
        budget=parse_amount(wanted["budget"], total, "budget"),
        seeds=parse_seeds(wanted["seeds"]),
        variants=variants,
        pool_images=total,
        data_sha256=benchmark.sha256,
        detector_sha256=detector_fingerprint(entry),
        title=_title(options.preset, preset["title"], source, benchmark),
        **rest,
    )
    _need_boxes_at_the_start(plan, benchmark)
    if earlier is not None:
        plan = plan.extends(earlier)
    else:
        if any(path.name != ".lock" for path in out.iterdir()):
            raise StateError(
                f"expected an empty folder or an earlier simulation at {out}, got something else; choose another"
            )
        with console.status("looking for damaged pictures"):
            benchmark.need_pictures()
    _write_data(benchmark, out / "data", fresh=earlier is None)
    write_json(out / PLAN, plan.as_dict())
    return plan


def _title(preset: str | None, title: str, source: DataSource, benchmark: Benchmark) -> str:
    """A preset's own title tells of its data, and any folder can be given to one of the photographs."""
    if source.format in ("coco", "folder") and preset is not None and benchmark.source != preset:
        return f"{benchmark.source}, as preset {preset}"
    return title or benchmark.source


def _need_boxes_at_the_start(plan: Plan, benchmark: Benchmark) -> None:
    """Nothing can be trained on images without boxes alone.

    Raises:
        SettingsError: A seed draws such images.
    """
    drawn = {seed: random_start(benchmark.pool.image_ids, plan.start, seed) for seed in plan.seeds}
    empty = [seed for seed, ids in drawn.items() if not any(benchmark.boxes[i] for i in ids)]
    if empty and any(variant.start == "random" for variant in plan.variants):
        raise SettingsError(
            f"simulation: expected a box among the first {plan.start} images of every seed, got none in those of seeds "
            f"{empty}; give a larger --start or other --seeds"
        )


def local_engine(plan: Plan) -> LocalEngine:
    """The detector in this process."""
    settings = load_settings()
    return LocalEngine(settings.model_zoo, plan.threads, weights_dir=settings.weights_dir)


def _write_data(benchmark: Benchmark, folder: Path, fresh: bool) -> None:
    """Write the data unless they are there; a moved data set (same content, other paths) is written again."""
    if not fresh and (folder / FACTS).is_file():
        there = Benchmark.read(folder)
        if (there.pool.images[0], there.test.images[0]) == (benchmark.pool.images[0], benchmark.test.images[0]):
            return
        for rounds in ("seed-*/*", "seed-*/*/round-*"):  # the lists of images that they go on with name the old paths
            for mark in folder.parent.glob(f"{rounds}/steps/dataset.json"):
                mark.unlink()
                begun = RoundFolder(mark.parent.parent)
                if not begun.is_done("train"):
                    begun.undo(["train"])
    benchmark.write(folder)


def _announce(plan: Plan, console: Console) -> None:
    names = ", ".join(variant.name for variant in plan.variants)
    console.print(
        f"[bold]{plan.title}[/]\n{plan.detector}; pool of {plan.pool_images} images, start {plan.start}, "
        f"+ {plan.budget} a round, {plan.rounds} rounds, seeds {list(plan.seeds)}\nstrategies: {names}",
        highlight=False,
    )


def _announce_duration(root: Path, plan: Plan, entry: ZooEntry, options: SimulationOptions, console: Console) -> None:
    """Say how long the trainings that are left will take, from a few steps on images of the pool."""
    steps = steps_left(root, plan, entry)
    if steps < _WORTH_MEASURING:
        return
    with console.status("measuring a few steps of training"), tempfile.TemporaryDirectory() as folder:
        second = _seconds_a_step(root, plan, Path(folder), options.devices[0])
    hours = steps * second / min(options.jobs, len(plan.seeds) * len(plan.variants)) / 3600
    console.print(
        f"{steps} steps of training are left, {second:.2f} s each: {hours:.1f} h with --jobs {options.jobs}, if as "
        f"many cores are free; looking at the pool and choosing come on top",
        highlight=False,
    )


def steps_left(root: Path, plan: Plan, entry: ZooEntry) -> int:
    """Optimiser steps of all trainings that are not over; a first model that strategies share counts once."""
    total = 0
    for seed in plan.seeds:
        first_models = set()
        for variant in plan.variants:
            for number in range(plan.rounds + 1):
                if (round_place(root, seed, variant.folder, number).path / RESULT).is_file():
                    continue
                if number == 0:
                    first_models.add(variant.first_model)
                else:
                    images = plan.start + number * (variant.budget or plan.budget)
                    total += entry.schedule.iterations(images, plan.max_iterations)
        total += len(first_models) * entry.schedule.iterations(plan.start, plan.max_iterations)
    return total


def _seconds_a_step(root: Path, plan: Plan, folder: Path, device: str) -> float:
    """Median seconds of a training step on a few images of the pool."""
    benchmark = Benchmark.read(root / "data")
    most_boxes_first = sorted(benchmark.boxes, key=lambda image_id: -benchmark.boxes[image_id])
    benchmark.pool.subset(set(most_boxes_first[:_IMAGES_MEASURED])).write(folder / "train.json")
    stamps: list[float] = []
    spec = replace(plan.spec(0, 0, Variant("random"), device, look_at_labelled=False), max_iterations=_STEPS_MEASURED)

    def stamp() -> bool:
        stamps.append(time.monotonic())
        return False

    files = TrainingFiles(folder / "train.json")
    local_engine(plan).train(spec, benchmark.labels, files, folder / "work", lambda progress: None, stamp)
    return float(np.median(np.diff(stamps)))


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


class Board:
    """Rounds done of all rounds, the time left, and what is being done now.

    The time left comes from the rounds that were finished since the display started, so a resumed simulation is not
    misled by what it finds done.

    Args:
        root: Folder of the simulation.
        plan: For the number of rounds.
        console: Where to draw.
    """

    def __init__(self, root: Path, plan: Plan, console: Console) -> None:
        self._root, self._plan = root, plan
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="board", daemon=True)
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            # The one column that gives way where the terminal is narrow.
            TextColumn("[dim]{task.fields[now]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        )
        self._progress = Progress(*columns, console=console, transient=not console.is_terminal, expand=True)
        self._began, self._at_start = time.monotonic(), finished_rounds(root, plan)

    def __enter__(self) -> Board:
        total = len(self._plan.seeds) * len(self._plan.variants) * (self._plan.rounds + 1)
        self._task = self._progress.add_task("rounds", total=total, left="", now="")
        self._progress.start()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        self._draw()
        self._progress.stop()

    def _keep(self) -> None:
        while not self._ended.wait(POLL_S):
            self._draw()

    def _draw(self) -> None:
        done = finished_rounds(self._root, self._plan)
        total = len(self._plan.seeds) * len(self._plan.variants) * (self._plan.rounds + 1)
        left = time_left(done - self._at_start, total - done, time.monotonic() - self._began)
        now = "; ".join(current_work(self._root)[:TASKS_SHOWN])
        self._progress.update(self._task, completed=done, left=left, now=now)


def finished_rounds(root: Path, plan: Plan) -> int:
    """Rounds of the plan that are over."""
    return sum(
        (round_place(root, seed, variant.folder, number).path / RESULT).is_file()
        for seed in plan.seeds
        for variant in plan.variants
        for number in range(plan.rounds + 1)
    )


def time_left(done: int, left: int, seconds: float) -> str:
    """An estimate for people: empty while nothing is known."""
    if left <= 0:
        return "done"
    if done <= 0:
        return ""
    minutes = left * seconds / done / 60.0
    return f"about {minutes / 60.0:.1f} h left" if minutes >= 90 else f"about {max(1, round(minutes))} min left"


def current_work(root: Path, fresh_s: float = 60.0) -> list[str]:
    """What the running tasks said last, newest first."""
    lines: list[tuple[float, str]] = []
    for path in root.glob(f"seed-*/*/{PROGRESS}"):
        try:
            written, value = path.stat().st_mtime, json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # being replaced right now
        if time.time() - written <= fresh_s:
            share = f" {100 * value['done'] // value['total']}%" if value["total"] else ""
            lines.append((written, f"seed {value['seed']} {value['what']} r{value['round']} {value['step']}{share}"))
    return [text for _, text in sorted(lines, reverse=True)]


def read_plan(root: Path) -> Plan | None:
    """The plan of the simulation in a folder; None where there is none."""
    path = root / PLAN
    return Plan.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
