"""How many images a query may hold: counted in images or in predicted boxes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

UNITS = ("images", "boxes")


class Budget:
    """A limit and what each image of the pool costs.

    In images every image costs 1. In boxes an image costs its predicted boxes that count, and at least 1, since
    somebody has to look at it; so the predicted boxes of a query never exceed the limit.

    Args:
        limit: Images or boxes, >= 1.
        costs: Cost of every image of the pool, each >= 1.

    Raises:
        ValueError: The limit or a cost is below 1.
    """

    def __init__(self, limit: int, costs: Sequence[int]) -> None:
        if isinstance(limit, bool) or int(limit) != limit or limit < 1:
            raise ValueError(f"expected budget to be an int >= 1, got {limit!r}; ask for at least one image")
        if costs and min(costs) < 1:
            raise ValueError(f"expected costs >= 1, got {min(costs)}")
        self.limit = int(limit)
        self.costs = list(costs)

    def affordable(self, cost: int, spent: int) -> bool:
        """Whether an image of this cost still fits."""
        return spent + cost <= self.limit

    def covers(self, positions: Iterable[int]) -> bool:
        """Whether all these images together fit."""
        return sum(self.costs[p] for p in positions) <= self.limit

    def take(self, positions: Iterable[int]) -> list[int]:
        """Go through positions in order and keep each that still fits."""
        kept: list[int] = []
        spent = 0
        for position in positions:
            if spent >= self.limit:
                break
            if self.affordable(self.costs[position], spent):
                kept.append(position)
                spent += self.costs[position]
        return kept

    def expanded(self, positions: Sequence[int], ratio: float) -> list[int]:
        """Shortest beginning of ``positions`` that costs at least ``ratio`` times the limit (or all), without those
        that cost more than the limit by themselves: nothing could be chosen from a beginning of such images."""
        wanted = math.ceil(ratio * self.limit)
        kept: list[int] = []
        spent = 0
        for position in positions:
            if spent >= wanted:
                break
            if self.affordable(self.costs[position], 0):
                kept.append(position)
                spent += self.costs[position]
        return kept

    def center_count(self, positions: Sequence[int]) -> int:
        """How many of these images fit at their mean cost, at least 1."""
        if not positions:
            return 0
        mean = sum(self.costs[p] for p in positions) / len(positions)
        return min(len(positions), max(1, int(self.limit / mean)))
