"""Which options move the picks? One trained model per seed of a finished simulation, many settings of the query.

    python scripts/sweep_picks.py SIMULATION --seeds 0,1 --out DIR

The first model of each seed is trained again while every positive prediction of every step is written down, so that
the difficulties of any xi, m0 and rule for absent classes follow without another training (they change neither losses
nor weights). Each setting then makes its query from what that one model sees in the pool. Prints a table: the rank
correlation of difficulty and AP, how many of the picks plain `ppal` makes too, the boxes in them, boxes of classes
of the tail, and picks that show a scene that is labelled already or picked twice.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppal_backend.acquisition.difficulty import DifficultyEMA, training_difficulty
from ppal_backend.acquisition.strategies import get_strategy, strategy_names
from ppal_backend.detector.heads import Positives
from ppal_backend.detector.train import attempt
from ppal_backend.detector.train.hooks import DifficultyHook
from ppal_backend.errors import StateError
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import Ports
from ppal_backend.rounds.run import _Run
from ppal_backend.simulation.data import Benchmark
from ppal_backend.simulation.folder import first_model_folder
from ppal_backend.simulation.oracle import Discard, Oracle, Reporter
from ppal_backend.simulation.plan import Plan
from ppal_backend.simulation.replay import Replay
from ppal_backend.simulation.run import local_engine, read_plan
from ppal_backend.simulation.statistics import spearman
from ppal_backend.simulation.variants import Variant, parse_variants
from ppal_backend.structures import QueryContext

Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Classes, probabilities and overlaps of a step's positives."""
TAIL = 0.5  # the rarer half of the classes
PLAIN = "provenance"  # the levels of plain ppal


def settings() -> tuple[Variant, ...]:
    """Plain ``ppal`` first, then other strategies, then one thing changed at a time."""
    # PAL reads what is not counted here.
    others = [name for name in strategy_names() if name not in ("ppal", "pal", "ppal+pal", "typiclust")]
    changes = [
        *("delta=2", "delta=8", "delta=16", "alpha=0.1", "alpha=0.9", "beta=0", "beta=1", "beta=5", "refine=fasterpam"),
        *("xi=0", "xi=0.3", "xi=1", "momentum=0.9", "momentum=0.999", "absent=drift", "levels=scale"),
    ]
    return parse_variants(["ppal", *others, "ppal+labelled:delta=8", *(f"ppal:{change}" for change in changes)])


class Recording(DifficultyHook):
    """The hook of the training, which also writes down what it is told."""

    steps: list[list[Positives]]

    def before_train(self, runner: Any) -> None:
        """Start with nothing."""
        type(self).steps = [[]]
        super().before_train(runner)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Begin the next step."""
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        self.steps.append([])

    def _take(self, positives: Positives) -> None:
        super()._take(positives)
        self.steps[-1].append(positives)


def recorded(plan: Plan, benchmark: Benchmark, out: Path, seed: int) -> list[Step]:
    """Train the first model of a seed, unless it is there; its positives step by step."""
    file = out / f"positives-{seed}.pt"
    if not file.is_file():
        attempt.DifficultyHook = Recording  # type: ignore[misc]
        Replay(out, plan, benchmark, local_engine(plan), keep=True).first_model(seed, "default")
        torch.save([[_plain(part) for part in step] for step in Recording.steps[:-1]], file)
    stored = torch.load(file, weights_only=True)
    return [_joined(step) for step in stored]


def _plain(positives: Positives) -> list[torch.Tensor]:
    usable = positives.probabilities.isfinite() & positives.ious.isfinite()
    return [t[usable].detach().cpu() for t in (positives.class_indices, positives.probabilities, positives.ious)]


def _joined(step: Sequence[Sequence[torch.Tensor]]) -> Step:
    if not step:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0)
    classes, probabilities, ious = (torch.cat(parts) for parts in zip(*step, strict=True))
    return classes, probabilities, ious


def difficulties(steps: Sequence[Step], classes: int, setting: Variant) -> np.ndarray:
    """``[C]`` difficulties after the training, by a setting's xi, m0 and rule for absent classes."""
    options = dict(setting.difficulty)
    xi = {"xi": options.pop("xi")} if "xi" in options else {}
    ema = DifficultyEMA(classes, **options)
    for indices, probabilities, ious in steps:
        ema.update(indices, training_difficulty(probabilities, ious, **xi))
    return ema.difficulty.numpy()


def sweep(simulation: Path, seeds: Sequence[int], out: Path) -> list[dict[str, Any]]:
    """One row per setting, means over the seeds."""
    plan = read_plan(simulation)
    if plan is None:
        raise StateError(f"expected the folder of a simulation, got {simulation}; name one that ppal simulate wrote")
    plan = replace(plan, variants=(Variant("ppal+labelled"),))  # so that labelled images are looked at as well
    benchmark = Benchmark.read(simulation / "data")
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        steps = recorded(plan, benchmark, out, seed)
        place = Place(plan, benchmark, out, seed)
        plain: set[int] = set()
        for setting in settings():
            difficulty = difficulties(steps, len(benchmark.labels), setting)
            picks = place.query(setting, difficulty)
            plain = plain or set(picks)
            row = {"correlation": place.correlation(difficulty)}
            rows.setdefault(setting.name, []).append(row | place.facts(picks) | {"equal": len(plain & set(picks))})
    return [{"setting": name, **_means(found)} for name, found in rows.items()]


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(float(np.mean([row[key] for row in rows])), 2) for key in rows[0]}


class Place:
    """The first model of one seed and what it sees."""

    def __init__(self, plan: Plan, benchmark: Benchmark, out: Path, seed: int) -> None:
        self._plan, self._benchmark, self._seed = plan, benchmark, seed
        self._folder = RoundFolder(first_model_folder(out, seed, "default"))
        engine = local_engine(plan)
        self._labelled = Replay(out, plan, benchmark, engine).start_ids(seed)
        reporter = Reporter(out / "progress.json", {"seed": seed, "what": "sweep", "round": 0}, None)
        ports = Ports(Oracle(benchmark, self._labelled), engine, Discard(), reporter)
        self._run = _Run(plan.spec(seed, 0, plan.variants[0], "auto", True), self._folder, ports)
        self._contexts: dict[str, QueryContext] = {PLAIN: self._run.context}
        self._ap = self._folder.read("metrics.json")["per_class"]

    def query(self, setting: Variant, difficulty: np.ndarray) -> list[int]:
        """The picks of a setting."""
        context = replace(self._context(setting.inference.get("levels", PLAIN)), difficulty=difficulty)
        strategy = get_strategy(setting.strategy, **{"delta": self._plan.delta, **setting.options})
        return list(strategy.query(context, self._plan.budget, np.random.default_rng([self._seed, 0])).image_ids)

    def _context(self, levels: str) -> QueryContext:
        if levels not in self._contexts:
            spec = replace(self._run.spec, levels=levels)
            model = self._run.model
            assert model is not None
            found = self._run.ports.engine.infer(spec, model, self._run.pool, lambda _: None, lambda: False)
            seen = {item.detections.image_id: item.detections for item in found}
            plain = self._contexts[PLAIN]
            self._contexts[levels] = replace(plain, pool=[seen[d.image_id] for d in plain.pool])
        return self._contexts[levels]

    def correlation(self, difficulty: np.ndarray) -> float:
        """Spearman's rank correlation of difficulty and AP over the classes that have one."""
        pairs = [(d, self._ap[label]) for label, d in zip(self._benchmark.labels, difficulty, strict=True)]
        pairs = [(d, ap) for d, ap in pairs if ap is not None]
        return spearman([d for d, _ in pairs], [ap for _, ap in pairs]) or 0.0

    def facts(self, picks: Sequence[int]) -> dict[str, float]:
        """What is in the picks."""
        annotations, groups_of = self._benchmark.pool.annotations, self._benchmark.groups
        instances = Counter(a.category_id for a in annotations)
        tail = sorted(instances, key=instances.__getitem__)[: round(len(instances) * TAIL)]
        chosen = [a.category_id for a in annotations if a.image_id in set(picks)]
        known = {groups_of.get(i, -i) for i in self._labelled}
        groups = [groups_of.get(i, -i) for i in picks]
        return {
            "picks": len(picks),
            "boxes": len(chosen),
            "tail_boxes": sum(c in tail for c in chosen),
            "repeated_scenes": sum(g in known or g in groups[:n] for n, g in enumerate(groups)),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Which options move the picks?")
    parser.add_argument("simulation", type=Path)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    rows = sweep(options.simulation, [int(s) for s in options.seeds.split(",")], options.out)
    names = list(rows[0])
    sys.stdout.write("| " + " | ".join(names) + " |\n|" + "---|" * len(names) + "\n")
    for row in rows:
        sys.stdout.write("| " + " | ".join(str(row[name]) for name in names) + " |\n")


if __name__ == "__main__":
    main()
