"""A strategy with its settings, as one line of a comparison: ``ppal``, ``ppal:delta=2``, ``random:match=ppal``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ppal_backend.acquisition.strategies import READS_COUNTS, USES_LABELLED, get_strategy, rival_names, strategy_names
from ppal_backend.errors import SettingsError

DIFFICULTY_OPTIONS = ("xi", "momentum", "absent")
INFERENCE_OPTIONS = {"embedding": ("query", "sampled"), "levels": ("provenance", "scale")}
ABSENT = ("keep", "drift")
STARTS = ("random", "typical")
RIVAL_FAMILIES: Mapping[str, frozenset[str]] = {
    "learnloss": frozenset({"anchor", "atss", "ddod", "fcos", "gfl", "roi", "rtmdet", "ssd", "yolox"}),
    "mdn": frozenset({"ssd"}),
    "mial": frozenset({"anchor"}),
}
"""Head families of the zoo that each strategy which changes the detector can change."""


@dataclass(frozen=True)
class Variant:
    """One line of a comparison.

    Args:
        strategy: A strategy's name.
        options: Options of the strategy.
        difficulty: ``xi``, ``momentum`` and ``absent`` of the training (Eq. 1 to 3).
        match: Name of a variant whose number of labelled boxes this one follows round by round; its number of images
            is then whatever that takes.
        budget: Budget of its own, in the strategy's unit; None for the plan's.
        inference: ``embedding`` and ``levels`` (see ``PoolInference``).
        start: How the first images are chosen: ``random``, or ``typical`` as before the first training of a project.

    Raises:
        SettingsError: An unknown strategy or option, or one out of range.
    """

    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    difficulty: Mapping[str, Any] = field(default_factory=dict)
    match: str | None = None
    budget: int | None = None
    inference: Mapping[str, Any] = field(default_factory=dict)
    start: str = STARTS[0]

    def __post_init__(self) -> None:
        if self.strategy not in (*strategy_names(), *rival_names()):
            names = ", ".join((*strategy_names(), *rival_names()))
            raise SettingsError(f"expected a strategy of {names}, got {self.strategy!r}; choose one of these")
        try:
            get_strategy(self.strategy, **self.options)
        except (TypeError, ValueError) as error:
            known = f"and {', '.join((*DIFFICULTY_OPTIONS, *INFERENCE_OPTIONS, 'match', 'budget', 'start'))} besides"
            raise SettingsError(f"strategy {self.strategy!r}: {error} ({known})") from None
        self._check_difficulty()
        for name, value in (*self.inference.items(), ("start", self.start)):
            allowed = STARTS if name == "start" else INFERENCE_OPTIONS.get(name, ())
            if value not in allowed:
                raise SettingsError(f"strategy {self.strategy!r}: expected {name} one of {allowed}, got {value!r}")
        if self.budget is not None and (not isinstance(self.budget, int) or self.budget < 1):
            raise SettingsError(f"strategy {self.strategy!r}: expected budget >= 1, got {self.budget!r}; correct it")

    def _check_difficulty(self) -> None:
        for name, value in self.difficulty.items():
            fine = value in ABSENT if name == "absent" else _is_share(value)
            if name not in DIFFICULTY_OPTIONS or not fine:
                wanted = f"one of {ABSENT}" if name == "absent" else "a number in [0, 1]"
                raise SettingsError(f"strategy {self.strategy!r}: expected {name} to be {wanted}, got {value!r}")

    @property
    def name(self) -> str:
        """The name in tables and plots; equal settings have equal names."""
        settings = {**self.options, **self.difficulty, **self.inference}
        if self.start != STARTS[0]:
            settings["start"] = self.start
        if self.match is not None:
            settings["match"] = self.match
        if self.budget is not None:
            settings["budget"] = self.budget
        listed = ",".join(f"{key}={_text(settings[key])}" for key in sorted(settings))
        return f"{self.strategy}:{listed}" if listed else self.strategy

    @property
    def folder(self) -> str:
        """The name as a folder."""
        return re.sub(r"[^A-Za-z0-9+._=-]", "_", self.name)

    @property
    def first_model(self) -> str:
        """Variants with the same one share their first model and what it sees in the pool."""
        settings = {**self.difficulty, **self.inference}
        if self.changes_detector:
            settings["rival"] = self.strategy
        if self.start != STARTS[0]:
            settings["start"] = self.start
        return ",".join(f"{key}={_text(settings[key])}" for key in sorted(settings)) or "default"

    @property
    def changes_detector(self) -> bool:
        """Whether the strategy trains a detector of its own (see ``detector.rivals``)."""
        return self.strategy in rival_names()

    @property
    def counts_images(self) -> bool:
        """Whether the budget counts images, not predicted boxes or those of another strategy."""
        return self.match is None and self.options.get("unit", "images") == "images"

    @property
    def looks_at_labelled(self) -> bool:
        """Whether the strategy uses the model's detections on labelled images."""
        return self.strategy in USES_LABELLED

    @property
    def reads_counts(self) -> bool:
        """Whether the strategy reads how many boxes before suppression a detection stands for."""
        return self.strategy in READS_COUNTS

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form, also accepted by :func:`parse_variants`."""
        plain: dict[str, Any] = {"strategy": self.strategy, **self.options, **self.difficulty, **self.inference}
        start = None if self.start == STARTS[0] else self.start
        return {**plain, **_given(match=self.match, budget=self.budget, start=start)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Variant:
        """The inverse of :meth:`as_dict`."""
        rest = dict(value)
        if "strategy" not in rest:
            raise SettingsError(f"expected 'strategy' in {dict(value)}, got none; name the strategy")
        strategy, match, budget = str(rest.pop("strategy")), rest.pop("match", None), rest.pop("budget", None)
        difficulty, inference = (
            {key: rest.pop(key) for key in names if key in rest} for names in (DIFFICULTY_OPTIONS, INFERENCE_OPTIONS)
        )
        start = str(rest.pop("start", STARTS[0]))
        return cls(strategy, rest, difficulty, None if match is None else str(match), budget, inference, start)


def parse_variants(given: str | Sequence[Any], earlier: Sequence[Variant] = ()) -> tuple[Variant, ...]:
    """Read a list of variants.

    Args:
        given: ``"ppal,entropy,ppal:delta=2,alpha=0.1,random:match=ppal"``, JSON (a list of names and objects such as
            ``{"strategy": "ppal", "delta": 2}``), or such a list itself.
        earlier: What the folder of the simulation holds already; ``match`` may name one of these.

    Returns:
        At least one variant, no two with the same name or folder; then the earlier ones that were not named again.

    Raises:
        SettingsError: None is given, one is given twice, a name or option does not exist, or ``match`` names no
            other variant of the list or of the folder.
    """
    items = _items(given)
    variants = tuple(Variant.from_dict(i) if isinstance(i, Mapping) else _parse_one(str(i)) for i in items)
    names = [variant.name for variant in variants]
    if not names:
        raise SettingsError("expected at least one strategy, got none; name one, such as ppal,random")
    variants = (*variants, *(variant for variant in earlier if variant.name not in names))
    folders = [variant.folder for variant in variants]
    twice = sorted({variant.name for variant in variants if folders.count(variant.folder) > 1})
    if twice:
        raise SettingsError(f"expected every strategy once, got {', '.join(twice)} again; remove one")
    check_matches(variants)
    return variants


def check_matches(variants: Sequence[Variant]) -> None:
    """Every ``match`` names a variant that follows nobody itself.

    Raises:
        SettingsError: It does not.
    """
    followed = {variant.name for variant in variants if variant.match is None}
    for variant in variants:
        if variant.match is not None and variant.match not in followed:
            raise SettingsError(
                f"expected match to name another strategy of the list ({', '.join(sorted(followed))}), got "
                f"{variant.match!r}; add it to the list"
            )


def check_detector(variants: Sequence[Variant], detector: str, head_family: str) -> None:
    """Every strategy that changes the detector can change this one.

    Raises:
        SettingsError: One cannot.
    """
    for variant in variants:
        families = RIVAL_FAMILIES.get(variant.strategy)
        if families is not None and head_family not in families:
            raise SettingsError(
                f"strategy {variant.strategy!r} changes detectors of {', '.join(sorted(families))} heads, got "
                f"{detector} ({head_family}); choose another detector (ppal zoo list) or leave the strategy out"
            )


def _items(given: str | Sequence[Any]) -> list[Any]:
    if not isinstance(given, str):
        return list(given)
    text = given.strip()
    if text.startswith(("[", "{")):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise SettingsError(f"expected strategies as JSON, got broken text ({error}); correct it") from None
        return value if isinstance(value, list) else [value]
    items: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        if items and "=" in part.split(":")[0]:
            items[-1] += f",{part}"  # a further option of the strategy before it
        elif part:
            items.append(part)
    return items


def _parse_one(text: str) -> Variant:
    strategy, _, listed = text.partition(":")
    settings: dict[str, Any] = {"strategy": strategy.strip()}
    for part in filter(None, (p.strip() for p in listed.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise SettingsError(f"expected option=value in {text!r}, got {part!r}; write {strategy}:option=value")
        settings[key.strip()] = _value(value.strip())
    return Variant.from_dict(settings)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 8.0 and 8 are one setting
    return value if isinstance(value, str) else json.dumps(value)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
