"""A progress display for people, read from what a simulation leaves on disk."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from ppal_backend.simulation.layout import PLAN, RESULT, round_place
from ppal_backend.simulation.oracle import PROGRESS
from ppal_backend.simulation.plan import Plan

POLL_S = 1.0
SHOWN = 3


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        now = "; ".join(current_work(self._root)[:SHOWN])
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
