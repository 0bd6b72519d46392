"""The results of a simulation, whole or partial, as tables of seeds by rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.errors import StateError
from ppal_backend.files import read_json
from ppal_backend.simulation.benchmark import FACTS
from ppal_backend.simulation.layout import PLAN, round_place
from ppal_backend.simulation.plan import Plan

Round = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """What is there.

    Args:
        root: Folder of the simulation.
        plan: Its plan.
        facts: Facts about the data.
        rounds: Finished rounds from 0 on without a gap, by variant name and seed.
    """

    root: Path
    plan: Plan
    facts: Mapping[str, Any]
    rounds: Mapping[tuple[str, int], tuple[Round, ...]]

    @classmethod
    def read(cls, root: Path) -> Results:
        """Read a simulation's folder.

        Raises:
            StateError: It holds no simulation, or no round is finished.
        """
        root = Path(root)
        if not (root / PLAN).is_file() or not (root / "data" / FACTS).is_file():
            raise StateError(f"expected the folder of a simulation, got {root} without {PLAN}; run ppal simulate first")
        plan = Plan.from_dict(read_json(root / PLAN))
        rounds: dict[tuple[str, int], tuple[Round, ...]] = {}
        for variant in plan.variants:
            for seed in plan.seeds:
                found = []
                for number in range(plan.rounds + 1):
                    result = round_place(root, seed, variant.folder, number).result()
                    if result is None:
                        break
                    found.append(result)
                rounds[variant.name, seed] = tuple(found)
        if not any(rounds.values()):
            raise StateError(f"expected at least one finished round in {root}, got none; run ppal simulate again")
        return cls(root, plan, read_json(root / "data" / FACTS), rounds)

    @property
    def names(self) -> tuple[str, ...]:
        """Variants with at least one finished round, in the order of the plan."""
        return tuple(v.name for v in self.plan.variants if any(self.rounds[v.name, s] for s in self.plan.seeds))

    @property
    def complete(self) -> bool:
        """Whether every round of the plan is there."""
        return all(len(found) == self.plan.rounds + 1 for found in self.rounds.values())

    def complete_seeds(self, *names: str) -> list[int]:
        """Seeds for which all rounds of all these variants are there."""
        wanted = self.plan.rounds + 1
        return [s for s in self.plan.seeds if all(len(self.rounds[name, s]) == wanted for name in names)]

    def table(self, name: str, value: str | Callable[[Round], float | None]) -> np.ndarray:
        """``[seeds, rounds + 1]`` of one figure of a variant, NaN where it is missing."""
        get = value if callable(value) else lambda found: found[value]
        out = np.full((len(self.plan.seeds), self.plan.rounds + 1), np.nan)
        for row, seed in enumerate(self.plan.seeds):
            for column, found in enumerate(self.rounds[name, seed]):
                figure = get(found)
                out[row, column] = np.nan if figure is None else figure
        return out

    def curve(self, name: str, seed: int, x: str, y: str = "map") -> tuple[np.ndarray, np.ndarray]:
        """One seed's figures ``y`` against ``x``, round by round."""
        found = self.rounds[name, seed]
        heights = [0.0 if r[y] is None else float(r[y]) for r in found]
        return np.array([float(r[x]) for r in found]), np.array(heights)

    def class_groups(self) -> dict[str, tuple[str, ...]]:
        """The rarest and the most frequent third of the classes of the pool (``tail``, ``head``)."""
        labels, counts = self.facts["labels"], self.facts["class_counts"]
        present = sorted((c, label) for label, c in zip(labels, counts, strict=True) if c > 0)
        size = -(-len(present) // 3)
        return {
            "tail": tuple(label for _, label in present[:size]),
            "head": tuple(label for _, label in sorted(present, key=lambda pair: (-pair[0], pair[1]))[:size]),
        }

    def group_map(self, labels: tuple[str, ...]) -> Callable[[Round], float | None]:
        """Mean AP of some classes, over those that the test set has."""

        def get(found: Round) -> float | None:
            values = [found["per_class"][label] for label in labels if label in found["per_class"]]
            return float(np.mean(values)) if values else None

        return get

    def labelled_after(self, name: str, seed: int, number: int) -> list[int]:
        """Images labelled when round ``number`` began."""
        return round_place(self.root, seed, self.plan.variant(name).folder, number).labelled()

    def near_duplicates(self, name: str) -> dict[str, np.ndarray]:
        """Near-duplicates of each query, ``[seeds, rounds]``, where the data name groups.

        ``inside`` counts picks whose group the query holds already; ``labelled`` those whose group was labelled
        before. Empty without groups.
        """
        groups = {int(image): int(group) for image, group in self.facts["groups"]}
        if not groups:
            return {}
        inside = np.full((len(self.plan.seeds), self.plan.rounds), np.nan)
        before = inside.copy()
        for row, seed in enumerate(self.plan.seeds):
            for found in self.rounds[name, seed][: self.plan.rounds]:
                number = int(found["round"])
                known = {groups[i] for i in self.labelled_after(name, seed, number) if i in groups}
                picked = [groups[i] for i in found["picks"] if i in groups]
                inside[row, number] = len(picked) - len(set(picked))
                before[row, number] = sum(group in known for group in picked)
        return {"inside": inside, "labelled": before}
