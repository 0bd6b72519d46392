"""The overview of all projects, and of one: the round at work, and how long it may still take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from ppal_backend.errors import PPALError
from ppal_backend.rounds.folder import OUTPUTS
from ppal_backend.service.dashboard.project import Project, StepMark
from ppal_backend.store import RoundRecord

ROUNDS_SHOWN = 12

ONLY_TRAINING = ("train", "evaluate")
IN_WORDS = {
    "export": "Read the annotations",
    "dataset": "Fetch and check the images",
    "train": "Train",
    "evaluate": "Measure on held-out images",
    "infer": "Look at the pool",
    "candidates": "Choose candidates",
    "query": "Choose and order the query set",
    "publish": "Publish the queue",
}


@dataclass(frozen=True)
class Step:
    """One step of a round: ``done``, ``running``, ``stopped`` where the round waits or is paused, or ``waiting``; how
    far it is; seconds taken or left, None where nobody can tell."""

    name: str
    text: str
    state: str
    done: int = 0
    total: int = 0
    detail: str = ""
    seconds: float | None = None
    left_s: float | None = None


def steps_of(kind: str) -> tuple[str, ...]:
    """The steps of a round, in order."""
    return tuple(step for step in OUTPUTS if kind == "train" or step not in ONLY_TRAINING)


def step_line(
    record: RoundRecord, marks: Mapping[str, StepMark], usual: Mapping[str, float], now: datetime
) -> list[Step]:
    """Every step of a round that is pending or running.

    Args:
        record: the round.
        marks: its finished steps.
        usual: seconds of each step in the last complete round of its kind.
        now: the time, in UTC without a zone.
    """
    begun = max([m.finished_at for m in marks.values()] + [record.started_at or record.created_at])
    line = []
    for name in steps_of(record.kind):
        if name in marks:
            line.append(Step(name, IN_WORDS[name], "done", seconds=marks[name].seconds))
        elif record.state == "running" and name == record.step:
            line.append(_running(record, usual.get(name), max(0.0, (now - begun).total_seconds())))
        else:
            line.append(Step(name, IN_WORDS[name], "waiting", left_s=usual.get(name)))
    return line


def left_s(line: Sequence[Step]) -> float | None:
    """Seconds until the round is done; None when a step's time is unknown."""
    parts = [step.left_s for step in line if step.state != "done"]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def usual_seconds(rounds: Sequence[RoundRecord], kind: str) -> dict[str, float]:
    """Seconds of each step in the last complete round of a kind."""
    done = [r for r in rounds if r.state == "done" and r.kind == kind]
    return dict(done[-1].metrics.get("seconds") or {}) if done else {}


def _running(record: RoundRecord, usual_s: float | None, elapsed_s: float) -> Step:
    name, progress = record.step, record.progress
    done, total = (int(progress.get(key) or 0) for key in ("done", "total"))
    rest = None if usual_s is None else max(0.0, usual_s - elapsed_s)
    if 0 < done <= total and record.attempts == 1:
        rest = elapsed_s * (total - done) / done
    elif 0 < done <= total:  # it was interrupted: the time since it began tells nothing
        rest = None if usual_s is None else usual_s * (total - done) / total
    detail = str(progress.get("detail") or "")
    return Step(name, IN_WORDS[name], "running", done, total, detail, elapsed_s, rest)


def overview(projects: Sequence[Project]) -> list[dict[str, Any]]:
    """A row for each project; what is wrong with one does not hide the others."""
    return [_overview_row(p) for p in projects]


def _overview_row(project: Project) -> dict[str, Any]:
    metrics = project.trained.metrics if project.trained else {}
    row = {
        "project": project,
        "open": project.opened[0] if project.opened else None,
        "map": metrics.get("map"),
        "images": metrics.get("labelled_images"),
        "labels": (),
        "budget": None,
    }
    try:
        return {**row, "labels": project.labels, "budget": project.options.budget}
    except PPALError:  # the labeling config or an extra parameter is not usable any more, which is a finding
        return row


def state_of(record: RoundRecord, paused: bool) -> str:
    """What an open round does, in a word: ``pending``, ``running``, ``waiting``, ``paused`` or ``cancelling``."""
    if record.cancel_asked:
        return "cancelling"
    if record.is_waiting:
        return "waiting"
    return "paused" if paused else record.state


def now_page(project: Project) -> dict[str, Any]:
    """The round at work, the ones before it, and what hinders."""
    record = project.opened[0] if project.opened else None
    time = datetime.now(UTC).replace(tzinfo=None)
    shown: dict[str, Any] = {"record": record, "state": "", "line": [], "left_s": None, "log": []}
    if record is not None:
        usual = usual_seconds(project.rounds, record.kind)
        state = state_of(record, project.record.paused)
        line = step_line(record, project.files(record.number).marks(), usual, time)
        if state in ("waiting", "paused"):
            line = [replace(s, state="stopped", left_s=None) if s.state == "running" else s for s in line]
        shown.update(state=state, line=line, left_s=left_s(line), log=project.log_lines(record.number))
    return {
        **shown,
        "waiting": project.opened[1:],
        "last": [r for r in reversed(project.rounds) if r.finished_at is not None][:ROUNDS_SHOWN],
        "missing": max(0, project.options.budget - project.new_annotations),
    }
