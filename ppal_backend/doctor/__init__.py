"""What is wrong with this installation and what to do about it; and connecting a project by one command.

Every check gives a :class:`Finding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

State = Literal["ok", "note", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One check: what it is about, how it stands, what was seen, and what to do when that is not well.

    ``title`` says it in a few words. ``next_try_at`` (UTC, without a zone) is when the backend tries again by itself,
    ``can_try_again`` whether it does so at once when asked.
    """

    check: str
    state: State
    seen: str
    advice: str = ""
    title: str = ""
    next_try_at: datetime | None = None
    can_try_again: bool = False


def ok(check: str, seen: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", seen)


def warning(check: str, seen: str, advice: str) -> Finding:
    """It works, but not for long or not for everybody."""
    return Finding(check, "warning", seen, advice)


def failed(check: str, seen: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(check, "failed", seen, advice)


def from_problem(check: str, text: str) -> Finding:
    """A failure told in one sentence whose part after the last semicolon says what to do."""
    seen, _, advice = text.rpartition("; ")
    return Finding(check, "failed", seen or text, advice if seen else "see the backend's log")
