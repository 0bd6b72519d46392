"""What is wrong now, for every page and ``ppal status`` in the same words.

It is read from the state, where the worker keeps what it found out; nothing is asked of Label Studio here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime

from ppal_backend.doctor import Finding, from_problem, warning
from ppal_backend.errors import PPALError
from ppal_backend.label_studio.schema import parse_label_config
from ppal_backend.operations.control import again_in_words
from ppal_backend.operations.detectors import TOPIC, in_force
from ppal_backend.service import readiness
from ppal_backend.settings import Settings
from ppal_backend.store import LABEL_STUDIO_NOTE, ProjectRecord, RoundRecord, Store, now
from ppal_backend.structures.quality import count

_TITLES = {
    "worker": "No worker runs",
    "disk": "The disk is nearly full",
    "images": "Images cannot be used",
    "classes": "Classes that training learns nothing of",
    "queue": "Tasks do not come in the order of the queue",
    "order": "People do not label what the queue puts first",
    "webhook": "Annotations are noticed late",
    "annotations": "Some of what was drawn is not learned from",
    "pause": "Paused",
    "settings": "The project's settings cannot be used",
    "events": "Some events could not be used",
    "pins": "Pinned tasks are gone",
    "quotas": "A quota cannot be held",
    "detector": "The detector cannot be trained",
}
_OF_ROUNDS = ("poll", "round")  # told from the project and its rounds instead
_AS_WARNING = ("annotations", "events", "pins", "quotas")


def health(settings: Settings, store: Store, project: ProjectRecord | None = None) -> list[Finding]:
    """What is wrong with the installation and, where one is given, with a project; the cause of others comes first.

    Args:
        settings: the operator's settings.
        store: the state.
        project: the project; None for the installation alone.
    """
    found = list(_installation(settings, store, project))
    if project is not None:
        known = {finding.check for finding in found}
        found += _project(settings, store, project, known)
        if "worker" in known:  # nobody is there to try
            found = [replace(finding, next_try_at=None) for finding in found]
    return sorted(found, key=lambda finding: ("failed", "warning", "note").index(finding.state))


def next_try(finding: Finding, time: datetime | None = None) -> str:
    """When the backend tries again, as a sentence; "" where it does not by itself.

    Args:
        finding: what was found.
        time: now (UTC, without a zone).
    """
    if finding.next_try_at is None:
        return ""
    left_s = (finding.next_try_at - (time or now())).total_seconds()
    if left_s < 1:
        return "Trying again now."
    return f"Next try in {_span(left_s)}."


def project_state(settings: Settings, store: Store, project: ProjectRecord) -> list[Finding]:
    """The findings of a project that are known from the state alone, for ``ppal doctor``."""
    return list(_project(settings, store, project, set()))


def _installation(settings: Settings, store: Store, project: ProjectRecord | None) -> Iterator[Finding]:
    for name, problem in (("worker", readiness.worker(store)), ("disk", readiness.disk(settings))):
        if problem:
            yield _titled(from_problem(name, problem))
    note, _ = store.notes.get(LABEL_STUDIO_NOTE)
    if project is None and note.get("problem"):
        yield _label_studio(str(note["problem"]), str(note.get("failed")), None)
    parked = store.events.counts().get("parked", 0)
    if parked:
        events = f"{count(parked, 'event')} could not be used and {_was(parked)} put by"
        yield _titled(warning("events", events, "the worker's log has the reasons"))


def _project(settings: Settings, store: Store, project: ProjectRecord, known: set[str]) -> Iterator[Finding]:
    running, failed = store.rounds.running(project.id), store.rounds.failure(project.id)
    waiting = running if running is not None and running.is_waiting else None
    poll = project.problems.get("poll")
    if poll:
        finding = replace(_label_studio(poll, project.poll_failed, project.next_poll_at), can_try_again=True)
        if waiting is not None and project.poll_failed in ("unavailable", "token"):
            finding = replace(finding, next_try_at=_earlier(finding.next_try_at, waiting.next_try_at))
            waiting = None
        yield finding
    if waiting is not None and "disk" not in known | set(project.problems):
        yield replace(
            from_problem(f"round {waiting.number}", waiting.error),
            state="warning",
            title=f"Round {waiting.number} waits",
            next_try_at=None if project.paused else waiting.next_try_at,
            can_try_again=True,
        )
    if failed is not None:
        yield _failed_round(settings, store, project, failed)
    for topic, text in project.problems.items():
        if topic not in _OF_ROUNDS and not (topic == "disk" and "disk" in known):
            finding = _titled(from_problem(topic, text))
            if topic == "disk" and waiting is not None:
                finding = replace(finding, next_try_at=waiting.next_try_at, can_try_again=True)
            yield finding
    try:
        yield from trial_detector(settings, project)
        parse_label_config(project.label_config, settings.project_options(project.options).from_name)
    except PPALError as error:
        yield _titled(from_problem("settings", str(error)))


def trial_detector(settings: Settings, project: ProjectRecord) -> Iterator[Finding]:
    """That a project got the detector for trying out because no other could be had.

    Raises:
        SettingsError: an extra parameter is not valid any more.
    """
    found = in_force(settings, project)
    if found.advice:
        seen = f"{found.name} was made for trying out; it will not work on photographs ({found.reason})"
        yield replace(warning(TOPIC, seen, found.advice), title="The detector is not for photographs")


def _label_studio(text: str, kind: str, next_try_at: datetime | None) -> Finding:
    titles = {"unavailable": "Waiting for Label Studio", "token": "Label Studio refuses the token"}
    found = from_problem("poll", text)
    title = titles.get(kind, "Label Studio could not be asked")
    return replace(found, title=title, next_try_at=next_try_at)


def _failed_round(settings: Settings, store: Store, project: ProjectRecord, record: RoundRecord) -> Finding:
    found = from_problem(f"round {record.number}", record.error)
    try:
        budget = settings.project_options(project.options).budget
    except PPALError:  # another finding; nothing starts before they are corrected
        again = "It is tried again when the project's settings are corrected"
    else:
        again = again_in_words(store, record, budget)
    advice = f"{_sentence(found.advice)} {again}" if "; " in record.error else again
    return replace(found, title=f"Round {record.number} failed", advice=advice, can_try_again=True)


def _titled(found: Finding) -> Finding:
    state = {"pause": "note"}.get(found.check, "warning" if found.check in _AS_WARNING else found.state)
    return replace(found, state=state, title=_TITLES.get(found.check, found.check.capitalize()))  # type: ignore[arg-type]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _was(number: int) -> str:
    return "was" if number == 1 else "were"


def _earlier(one: datetime | None, other: datetime | None) -> datetime | None:
    return min((t for t in (one, other) if t is not None), default=None)


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
