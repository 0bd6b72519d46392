"""The overview of all projects, and of one: how far it is, how good, what happens next, and the round at work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from statistics import median
from typing import Any

from ppal_backend.errors import PPALError
from ppal_backend.operations.detectors import known_label_lines
from ppal_backend.rounds.folder import OUTPUTS
from ppal_backend.service.dashboard.learning import FEW_BOXES, RARE_SHARE
from ppal_backend.service.dashboard.project import Project, StepMark
from ppal_backend.store import RoundRecord
from ppal_backend.store import now as utc_now
from ppal_backend.structures.quality import Quality, count

ROUNDS_SHOWN = 12

ONLY_TRAINING = ("train", "evaluate")
IN_WORDS = {
    "export": "Read the annotations",
    "dataset": "Fetch and check the images",
    "adopt": "Take the published detector as it is",
    "train": "Train",
    "evaluate": "Measure on held-out images",
    "infer": "Look at the pool",
    "candidates": "Find what the model is unsure of",
    "query": "Choose what is next to label",
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


def steps_of(kind: str, as_is: bool = False) -> tuple[str, ...]:
    """The steps of a round, in order; ``as_is`` where the zoo's detector orders the pool as it is."""
    left_out = () if kind == "train" else ONLY_TRAINING
    return tuple(step for step in OUTPUTS if step not in left_out and (as_is or step != "adopt"))


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
    as_is = record.number == 0 or record.step == "adopt" or "adopt" in marks
    for name in steps_of(record.kind, as_is):
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


CLASSES_SHOWN = 12


@dataclass(frozen=True)
class ClassCount:
    """Labelled boxes of a class; ``share`` in [0, 1] of the class with most."""

    label: str
    boxes: int
    share: float
    is_rare: bool


@dataclass(frozen=True)
class Pace:
    """Seconds for an image (median), of how many images; ``who`` is an annotator's id, "" for all of them."""

    who: str
    with_s: float | None
    with_images: int
    without_s: float | None
    without_images: int
    left_out: int


def quality_in_words(metrics: Mapping[str, Any] | None, portion: int) -> str:
    """How good the model is, in a sentence.

    Args:
        metrics: of the training that made the model in force; None before there is one.
        portion: annotations that start a training.
    """
    if metrics is None or (metrics.get("map") is None and metrics.get("measured") is None):
        return f"No model yet: the first one trains by itself after {count(portion, 'annotation')}."
    quality = Quality.of(metrics)
    return " ".join(part for part in (quality.sentence, quality.comparison_sentence) if part)


def next_in_words(project: Project, state: str, left: float | None) -> str:
    """What happens next and when, in a sentence.

    Args:
        project: the project.
        state: of its open round (see :func:`state_of`), "" without one.
        left: seconds until that round is done, None where nobody can tell.
    """
    if project.record.paused:
        return "Paused: nothing starts until somebody presses Resume."
    if state:
        record = project.opened[0]
        what = "training" if record.kind == "train" else "ordering the tasks"
        if state == "running":
            when = "" if left is None else f"; the new queue is there in about {span(left)}"
            return f"Round {record.number} is {what}{when}."
        return {
            "waiting": f"Round {record.number} waits, and is tried again by itself.",
            "cancelling": f"Round {record.number} is being cancelled.",
        }.get(state, f"Round {record.number} starts as soon as a worker is free.")
    missing = project.missing
    if project.record.task_count and project.labelled_tasks >= project.record.task_count and missing:
        return "Everything is labelled. More tasks get a place in the queue as soon as they are imported."
    if not missing:
        return "A training starts within seconds."
    left_over = (project.record.task_count or 0) - project.labelled_tasks
    if 0 < left_over < missing:
        return (
            f"Only {count(left_over, 'image is', 'images are')} left, and {missing} more annotations start a training "
            "by themselves: label them, then press Train now."
        )
    return f"The next training starts by itself after {count(missing, 'more annotation')}."


def class_counts(per_class: Mapping[str, int]) -> list[ClassCount]:
    """Labelled boxes by class, most first; rare is what the page of classes calls so."""
    most = max(per_class.values(), default=0)
    rare_below = max(FEW_BOXES, RARE_SHARE * median(per_class.values())) if per_class else 0
    rows = [ClassCount(k, n, n / most if most else 0.0, n < rare_below) for k, n in per_class.items()]
    return sorted(rows, key=lambda row: -row.boxes)


def balance_in_words(rows: Sequence[ClassCount]) -> str:
    """How evenly the boxes lie over the classes, in a sentence; "" where that is no question."""
    if len(rows) < 2 or not rows[0].boxes:
        return ""
    most, least = rows[0], rows[-1]
    if not least.boxes:
        none = [row.label for row in rows if not row.boxes]
        return f"No box yet of {', '.join(none[:5])}{f' and {len(none) - 5} more' if len(none) > 5 else ''}."
    times = most.boxes / least.boxes
    if times < 2:
        return "Evenly spread."
    return f"{most.label} has {times:.0f} times as many boxes as {least.label}."


def paces(times: Mapping[str, Mapping[str, float]]) -> list[Pace]:
    """Seconds for an image as rows: of all annotators together, then of each where that was asked for."""
    whos = sorted({name.partition(" ")[2] for name in times})
    rows = []
    for who in whos:
        found = [times.get(f"{group} {who}".strip(), {}) for group in ("with", "without")]
        numbers = [(f.get("median_s"), int(f.get("images", 0))) for f in found]
        rows.append(Pace(who, *numbers[0], *numbers[1], sum(int(f.get("out", 0)) for f in found)))
    return rows


def summary_of(project: Project, state: str, left: float | None) -> dict[str, Any]:
    """What a lead wants to know at a glance."""
    number, facts = project.snapshot or (None, {})
    rows = class_counts(facts.get("labelled_per_class") or {})
    return {
        "labelled": project.labelled_tasks,
        "tasks": project.record.task_count,
        "quality": quality_in_words(project.trained.metrics if project.trained else None, project.portion),
        "next": next_in_words(project, state, left),
        "classes": rows[:CLASSES_SHOWN],
        "more_classes": rows[CLASSES_SHOWN:],
        "balance": balance_in_words(rows),
        "paces": paces(facts.get("times") or {}),
        "as_of": number,
    }


def span(seconds: float) -> str:
    """A time span in words, rounded to what people want to know."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def overview(projects: Sequence[Project]) -> list[dict[str, Any]]:
    """A row for each project; what is wrong with one does not hide the others."""
    return [_overview_row(p) for p in projects]


def _overview_row(project: Project) -> dict[str, Any]:
    row: dict[str, Any] = {"project": project, "state": "", "labels": (), "summary": None}
    try:
        shown = _round(project)
        summary = summary_of(project, shown["state"], shown["left_s"])
        return {**row, "state": shown["state"], "labels": project.labels, "summary": summary}
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
    """How far the project is, the round at work, and the ones before it."""
    shown = _round(project)
    return {
        **shown,
        "summary": summary_of(project, shown["state"], shown["left_s"]),
        "waiting": project.opened[1:],
        "last": [r for r in reversed(project.rounds) if r.finished_at is not None][:ROUNDS_SHOWN],
        "missing": project.missing,
        "known": known_label_lines(project.runtime.settings, project.runtime.store, project.record),
    }


def _round(project: Project) -> dict[str, Any]:
    """The open round and its steps."""
    record = project.opened[0] if project.opened else None
    time = utc_now()
    shown: dict[str, Any] = {"record": record, "state": "", "line": [], "left_s": None, "log": []}
    if record is not None:
        usual = usual_seconds(project.rounds, record.kind)
        state = state_of(record, project.record.paused)
        line = step_line(record, project.files(record.number).marks(), usual, time)
        if state in ("waiting", "paused"):
            line = [replace(s, state="stopped", left_s=None) if s.state == "running" else s for s in line]
        shown.update(state=state, line=line, left_s=left_s(line), log=project.log_lines(record.number))
    return shown
