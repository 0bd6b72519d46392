"""What people ask of the queue: tasks put in front or at the end, and quotas that the next query sets are to hold."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["label", "data", "storage"]
KINDS: tuple[Kind, ...] = ("label", "data", "storage")
LONGEST = 300
"""Characters of a task's data field, or of a quota's value, that are compared."""
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*(.+)", re.DOTALL)
_ADVICE = "write '30% label:stingray', '20% data:camera=north' or '20% storage:s3://bucket/day1/'"


@dataclass(frozen=True)
class Quota:
    """At least ``share`` of the images of a query set are to hold something.

    Args:
        kind: ``label`` (predicted by a detection above the score threshold), ``data`` (the task's data field ``field``
            is ``value``) or ``storage`` (a data field, as its image's address, begins with ``value``).
        value: The label, the field's value, or the beginning of the address.
        share: In (0, 1].
        field: Of ``data`` the field's name, else "".
        id: What the store calls it; 0 before it is stored.

    Raises:
        ValueError: A part is missing, too long or out of range.
    """

    kind: Kind
    value: str
    share: float
    field: str = ""
    id: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"expected a quota of kind {', '.join(KINDS)}, got {str(self.kind)[:40]!r}; {_ADVICE}")
        if not 0 < self.share <= 1 or not math.isfinite(self.share):
            raise ValueError(f"expected a quota between 0 and 100 %, got {100 * self.share:g} %; {_ADVICE}")
        if not self.value.strip() or (self.kind == "data") != bool(self.field.strip()):
            raise ValueError(f"expected a quota that says what of the images is meant; {_ADVICE}")
        if max(len(self.value), len(self.field)) > LONGEST:
            raise ValueError(f"expected a quota of at most {LONGEST} characters, got more; {_ADVICE}")

    @classmethod
    def parse(cls, text: str) -> Quota:
        """Read ``30% label:stingray``, ``20% data:camera=north`` or ``20% storage:s3://bucket/day1/``.

        Raises:
            ValueError: It is none of these.
        """
        found = _SHARE.fullmatch(text)
        kind, colon, rest = found.group(2).strip().partition(":") if found else ("", "", "")
        if found is None or not colon:
            raise ValueError(f"expected a quota, got {text[:80]!r}; {_ADVICE}")
        share = float(found.group(1)) / 100
        if kind == "data":
            field, _, value = rest.partition("=")
            return cls("data", value.strip(), share, field.strip())
        return cls(kind, rest.strip(), share)  # type: ignore[arg-type]

    @property
    def what(self) -> str:
        """What the images are to hold, in words."""
        if self.kind == "label":
            return f"with {self.value}"
        return f"with {self.field} = {self.value}" if self.kind == "data" else f"from {self.value}"

    @property
    def text(self) -> str:
        """The quota in words."""
        return f"at least {100 * self.share:g} % {self.what}"

    def needed(self, images: int) -> int:
        """Images that a query set of so many needs."""
        return math.ceil(self.share * images - 1e-9)

    def holds(self, labels: Collection[str], data: Mapping[str, str]) -> bool:
        """Whether an image counts for it.

        Args:
            labels: Labels predicted on it above the score threshold.
            data: Its task's data, by field (:func:`comparable`).
        """
        if self.kind == "label":
            return self.value in labels
        if self.kind == "data":
            return data.get(self.field) == self.value
        return any(value.startswith(self.value) for value in data.values())


def comparable(data: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a task's data that quotas can go by: texts, numbers and truth values, cut at :data:`LONGEST`."""
    kept = {str(name): value for name, value in data.items() if isinstance(value, str | int | float)}
    return {
        name: (str(value).lower() if isinstance(value, bool) else str(value))[:LONGEST] for name, value in kept.items()
    }


@dataclass(frozen=True)
class Steering:
    """What people ask of one project's queue.

    Args:
        first: Task ids to label first, in order.
        last: Task ids to label last, in order.
        quotas: What query sets are to hold.
        pinned_at: When each pin was set: tells a pin from a later one of the same task.

    Raises:
        ValueError: A task is in both, or twice in one.
    """

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    quotas: tuple[Quota, ...] = ()
    pinned_at: Mapping[int, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        pinned = (*self.first, *self.last)
        if len(set(pinned)) != len(pinned):
            raise ValueError("expected every pinned task once, got one twice")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any] | None) -> Steering:
        """The inverse of :meth:`as_dict`; None (of rounds before there was steering) asks for nothing."""
        if value is None:
            return cls()
        pinned_at = {int(task_id): str(at) for task_id, at in value.get("pinned_at", {}).items()}
        quotas = tuple(Quota(**quota) for quota in value["quotas"])
        return cls(tuple(value["first"]), tuple(value["last"]), quotas, pinned_at)

    def pins_of(self, earlier: Steering) -> dict[int, str]:
        """Pins that were there already when ``earlier`` was read, with when they were set."""
        known = {*earlier.first, *earlier.last}
        mine = {i: self.pinned_at.get(i, "") for i in (*self.first, *self.last) if i in known}
        return {i: at for i, at in mine.items() if earlier.pinned_at.get(i, "") == at}
