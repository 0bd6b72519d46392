"""What a simulation is to do, fixed when it starts, so that a resumed one does the same; presets are named plans."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppal_backend.errors import SettingsError, StateError
from ppal_backend.rounds.evaluation_set import FEWEST_TO_TRAIN
from ppal_backend.settings import as_slices
from ppal_backend.simulation.variants import Variant, check_matches
from ppal_backend.structures.round import RoundSpec

SCORE_THRESHOLD = 0.05
PRESETS = Path(__file__).parent / "presets"
"""The paper's protocols and the built-in benchmarks, as TOML."""


@dataclass(frozen=True)
class Plan:
    """A simulation, sized to its data.

    Args:
        detector: Name in the model zoo.
        start: Images labelled at the start, enough to train on.
        budget: Images labelled a round, >= 1.
        rounds: Queries, >= 1; so ``rounds + 1`` models are trained, counting the one of the start.
        seeds: Starts; each draws its own first images and trains with its own seed.
        variants: What is compared.
        delta: Budget expanding ratio of strategies that do not set their own.
        max_iterations: Cap on the training; None follows the detector's schedule.
        init_weights: ``zoo`` or ``random``.
        difficulty: Whether class difficulties are followed in training; else every class weighs 1.
        slices: ``off``, ``auto`` or the side of a tile in pixels, as for a project.
        threads: CPU threads of a process; part of the plan because sums depend on it in the last digit.
        retrieval_images: Images on which retrieval by CCMS is compared with global features, 0 for none.
        pool_images: Size of the pool with the start.
        data_sha256: Fingerprint of the data.
        detector_sha256: Fingerprint of the detector's config, schedule and initial weights.
        title: For people.

    Raises:
        SettingsError: A number is out of range, or the pool is too small.
    """

    detector: str
    start: int
    budget: int
    rounds: int
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    pool_images: int
    data_sha256: str = ""
    detector_sha256: str = ""
    delta: float = 4.0
    max_iterations: int | None = None
    init_weights: str = "zoo"
    difficulty: bool = True
    slices: int | str = "off"
    threads: int | None = 1
    retrieval_images: int = 300
    title: str = ""

    def __post_init__(self) -> None:
        checks = (
            (self.start >= FEWEST_TO_TRAIN, f"a start of at least {FEWEST_TO_TRAIN} images", self.start),
            (self.budget >= 1, "a budget of at least 1 image", self.budget),
            (self.rounds >= 1, "at least 1 round", self.rounds),
            (len(self.seeds) > 0, "at least one seed", list(self.seeds)),
            (len(set(self.seeds)) == len(self.seeds), "every seed once", list(self.seeds)),
            (all(0 <= seed < 2**31 for seed in self.seeds), "seeds in [0, 2^31)", list(self.seeds)),
            (self.delta > 1, "delta > 1", self.delta),
            (self.max_iterations is None or self.max_iterations >= 1, "max_iterations >= 1", self.max_iterations),
            (self.threads is None or self.threads >= 1, "threads >= 1", self.threads),
            (self.retrieval_images >= 0, "retrieval_images >= 0", self.retrieval_images),
            (self.init_weights in ("zoo", "random"), "init_weights 'zoo' or 'random'", self.init_weights),
        )
        for holds, expected, got in checks:
            if not holds:
                raise SettingsError(f"simulation: expected {expected}, got {got}; choose another value")
        try:
            object.__setattr__(self, "slices", as_slices(self.slices))
        except ValueError as error:
            raise SettingsError(f"simulation: slices: {error}, got {self.slices!r}; choose another value") from None
        check_matches(self.variants)
        budget = max([self.budget, *(v.budget or 0 for v in self.variants if v.counts_images)])
        needed = self.start + self.rounds * budget
        if needed > self.pool_images:
            raise SettingsError(
                f"simulation: expected a pool of at least {needed} images (a start of {self.start} and {self.rounds} "
                f"rounds of {budget}), got {self.pool_images}; label fewer (--start, --budget, --rounds) or use more"
            )

    def variant(self, name: str) -> Variant:
        """The variant of that name.

        Raises:
            SettingsError: The plan has none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise SettingsError(f"expected one of {[v.name for v in self.variants]}, got {name!r}; correct the name")

    def spec(self, seed: int, number: int, variant: Variant, device: str, look_at_labelled: bool) -> RoundSpec:
        """Parameters of round ``number`` (0 trains on the start)."""
        options = dict(variant.options)
        return RoundSpec(
            project_id=seed,
            project_key=f"simulation {variant.name}",
            number=number,
            kind="train",
            detector=self.detector,
            strategy=variant.strategy,
            budget=variant.budget or self.budget,
            delta=float(options.pop("delta", self.delta)),
            seed=seed,
            score_threshold=SCORE_THRESHOLD,
            holdout_fraction=0.0,
            max_iterations=self.max_iterations,
            init_weights=self.init_weights,
            difficulty=self.difficulty,
            slices=self.slices,
            device=device,
            strategy_options=options,
            difficulty_options=dict(variant.difficulty),
            **variant.inference,
            look_at_labelled=look_at_labelled,
        )

    def start_spec(self, seed: int, device: str) -> RoundSpec:
        """Parameters of the choice of typical first images, before anything is trained."""
        spec = self.spec(seed, 0, Variant("random"), device, look_at_labelled=False)
        return replace(spec, kind="rank", budget=self.start, cold_start="typical")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        plain = dict(vars(self))
        return {**plain, "seeds": list(self.seeds), "variants": [v.as_dict() for v in self.variants]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`as_dict`."""
        variants = tuple(Variant.from_dict(v) for v in value["variants"])
        return cls(**{**value, "seeds": tuple(value["seeds"]), "variants": variants})

    def extends(self, earlier: Plan) -> Plan:
        """This plan with the seeds and rounds of an earlier one in the same folder, whose strategies it has already.

        Raises:
            StateError: They differ in anything else, so their results would not compare.
        """
        different = [
            name
            for name, value in vars(self).items()
            if name not in ("seeds", "variants", "rounds", "title") and getattr(earlier, name) != value
        ]
        if different:
            listed = ", ".join(
                f"{name} {getattr(earlier, name)!r} there, {getattr(self, name)!r} now" for name in different
            )
            raise StateError(f"the folder holds another simulation ({listed}); use a folder of its own")
        return replace(
            self,
            rounds=max(earlier.rounds, self.rounds),
            seeds=tuple(dict.fromkeys((*earlier.seeds, *self.seeds))),
        )


def parse_amount(given: str | int | float, total: int, what: str) -> int:
    """A number of images, given as such or as a share: ``38`` or ``"2.5%"`` (rounded half up, at least 1).

    Raises:
        SettingsError: It is neither.
    """
    text = str(given).strip()
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100.0
            if not 0 < share <= 1:
                raise ValueError
            return max(1, math.floor(share * total + 0.5))
        number = float(text)
        if number != int(number) or number < 1:
            raise ValueError
        return int(number)
    except (ValueError, OverflowError):
        raise SettingsError(f"expected {what} as a number of images or a share such as 2.5%, got {given!r}") from None


def parse_seeds(given: str | int | Sequence[int]) -> tuple[int, ...]:
    """Seeds: a count (``3`` is 0, 1, 2) or a list (``"0,4,7"``; ``"4,"`` is seed 4 alone).

    Raises:
        SettingsError: It is neither.
    """
    try:
        if isinstance(given, str) and "," in given:
            return tuple(int(part) for part in given.split(",") if part.strip())
        if isinstance(given, str | int):
            return tuple(range(int(given)))
        return tuple(int(seed) for seed in given)
    except ValueError:
        raise SettingsError(f"expected a number of seeds or a list such as 0,1,2, got {given!r}") from None


def preset_names() -> tuple[str, ...]:
    """Names of the presets."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.toml")))


def load_preset(name: str) -> dict[str, Any]:
    """A preset's tables: ``title``, ``data`` and ``plan``.

    Raises:
        SettingsError: There is no such preset (the message lists those there are), or its file is broken.
    """
    if name not in preset_names():
        raise SettingsError(f"expected a preset of {', '.join(preset_names())}, got {name!r}; choose one of these")
    try:
        tables = tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"preset {name!r} is not valid TOML: {error}") from None
    missing = [key for key in ("title", "data", "plan") if key not in tables]
    if missing:
        raise SettingsError(f"preset {name!r} lacks {', '.join(missing)}; add it")
    return tables
