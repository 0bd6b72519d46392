"""How far a step has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` units of ``step``; ``detail`` is a short remark for people."""

    step: str
    done: int
    total: int
    detail: str = ""

    def __post_init__(self) -> None:
        if self.total < 0 or self.done < 0:
            raise ValueError(f"expected 0 <= done and 0 <= total, got done={self.done}, total={self.total}")


OnProgress = Callable[[Progress], None]
