"""CPU threads that get along with other processes."""

from __future__ import annotations

import os


def yield_while_waiting() -> None:
    """Let idle OpenMP threads sleep instead of spinning; call before torch is imported.

    Spinning threads of several processes on few cores take each other's time: with two cores and other work on
    them, a small training step took three to four times as long. The operator's own OMP_WAIT_POLICY wins.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
