"""Which annotated images are held out for evaluation: by task id alone, so never by chance or by round."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

FEWEST_TO_HOLD_OUT = 10


def holdout_ids(image_ids: Sequence[int], fraction: float) -> set[int]:
    """The images to evaluate on: those whose hashed id falls below ``fraction``.

    An image stays on its side in all later rounds. With at least ``FEWEST_TO_HOLD_OUT`` images and a
    fraction above 0 there is always at least one (the smallest hash), and never more than half.
    """
    if fraction <= 0 or len(image_ids) < FEWEST_TO_HOLD_OUT:
        return set()
    ranked = sorted(set(image_ids), key=_position)
    chosen = [i for i in ranked if _position(i) < fraction] or ranked[:1]
    return set(chosen[: len(ranked) // 2])


def _position(image_id: int) -> float:
    digest = hashlib.sha256(str(image_id).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
