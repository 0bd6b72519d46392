"""Which rounds' files may go: those of versions that are neither recent, nor active, nor needed by an open round."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

HEAVY = ("export", "dataset", "train", "detections", "labelled_detections", "candidates.json")
"""What is removed of a round. Its spec, marks, metrics and query set stay: they are small and tell its story."""


@dataclass(frozen=True)
class Pruned:
    """What was removed, or would be, of one round."""

    round_number: int
    size_bytes: int


def prune_rounds(
    rounds: Path, keep: Collection[int], before: int, checkpoints: Collection[Path], dry_run: bool = False
) -> list[Pruned]:
    """Remove the heavy files of old rounds.

    Args:
        rounds: The folder with one folder per round.
        keep: Numbers of rounds to leave whole.
        before: Only rounds with a lower number are touched.
        checkpoints: Files that stay wherever they lie.
        dry_run: Remove nothing.

    Returns:
        The rounds of which something is removed, oldest first. What cannot be removed is logged and left.
    """
    numbers = sorted(int(p.name) for p in rounds.glob("*") if p.is_dir() and p.name.isdigit())
    pruned = []
    for number in numbers:
        if number in keep or number >= before:
            continue
        doomed = [
            path
            for path in (rounds / str(number) / name for name in HEAVY)
            if path.exists() and not any(checkpoint.is_relative_to(path) for checkpoint in checkpoints)
        ]
        size = sum(f.stat().st_size for path in doomed for f in _files(path))
        if not doomed:
            continue
        pruned.append(Pruned(number, size))
        if not dry_run:
            for path in doomed:
                _remove(path)
    return pruned


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        log.warning("%s stays for now: %s", path, error)
