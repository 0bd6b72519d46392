"""What a round is to do, fixed when it starts, so that a resumed round does the same; and how far its step has come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

STRATEGY_NAMES = (
    "random", "entropy", "posterior", "margin", "dcus", "dfreq", "rand+ccms", "entropy+ccms", "dfreq+ccms", "dcus+rand",
    "dcus+global", "dcus+fpn", "dcus+jaccard", "ppal", "coreset", "cdal", "enms+divproto", "pal", "ppal+labelled",
    "auto", "gain", "gain+ccms", "dcus+coverage", "ppal+balance", "ppal+pal", "typiclust",
)  # fmt: skip
"""The names of ``acquisition.strategies``, for processes that must not load torch; a test compares."""

RIVAL_NAMES = ("learnloss", "mdn", "mial")
"""Strategies that change the detector they choose with, which a project's rounds never do: in simulations only."""


VERSION_PREFIX = "ppal-"
"""Names of this backend's model versions begin with it, and no others do."""

SECOND_OPINION_SCORE = 0.0
"""Score of a prediction that serves a task again with nothing drawn on it; published ranks begin above."""

KIND_NAMES = {"train": "training", "rank": "ordering"}
"""What people read of a round's kind."""

AS_IS = "as_is.pth"
"""File name of a checkpoint that holds the zoo's detector as published, told in a project's labels."""


@dataclass(frozen=True)
class ModelRef:
    """A trained detector: zoo name, checkpoint path, labels in class order, and its class difficulties."""

    detector: str
    checkpoint: str
    labels: tuple[str, ...]
    difficulty: tuple[float, ...] | None = None

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ModelRef:
        """The inverse of ``asdict``."""
        difficulty = value["difficulty"]
        return cls(
            value["detector"],
            value["checkpoint"],
            tuple(value["labels"]),
            None if difficulty is None else tuple(difficulty),
        )


@dataclass(frozen=True)
class DetectorChoice:
    """The detector of a project that names none.

    ``by`` says who chose it: ``rule`` (the zoo's order), ``trial`` (the rule found the weights of none and took the
    detector for trying out), ``upgrade`` (it is that of the project's last training, from before there was a rule), or
    ``person``. ``device`` is where the rule assumed it to train, ``cuda`` or ``cpu``, "" where it did not choose.
    """

    detector: str
    by: Literal["rule", "trial", "upgrade", "person"]
    reason: str
    device: str = ""


@dataclass(frozen=True)
class RoundSpec:
    """A round's parameters. ``kind`` is ``train``, or ``rank`` to order the pool with ``model`` (or at random).

    ``strategy_options`` are options of the strategy beside ``delta``; ``difficulty_options`` are ``xi``, ``momentum``
    and ``absent`` of the training (Eq. 1 to 3); ``look_at_labelled`` adds the model's detections on the labelled
    images to what the strategy sees. Without ``difficulty`` no class difficulty is followed and every class weighs 1.
    ``init_weights`` is ``zoo``, ``random`` or ``last``: with ``last`` a training starts from ``model``, where that is
    of the same detector, and from the zoo's weights otherwise. ``patience`` keeps a tenth of the training images back
    and ends a training after so many evaluations on them that brought nothing; ``deterministic`` asks for the same
    bits on every run on a GPU too; ``mixed_precision`` allows half precision in training.
    ``embedding`` and ``levels`` say what describes a detection (see ``PoolInference``). ``cold_start`` orders a pool
    that no model has seen: ``typical`` images first, where the zoo's initial weights can look at it, or ``random``.
    Of all tasks ``holdout_fraction`` are kept to measure on until ``evaluation_images`` are labelled;
    ``train_on_everything`` trains on them too, and measures nothing;
    with ``keep_better`` a model that is worse than the one in force does not come into force.
    ``pool_minutes`` is how long the detector may look at the pool; images it does not get to keep their last place.
    With ``other_shapes`` polygons, ellipses and brush masks are learned as the boxes around them.
    ``draw_map`` leaves a map of the pool for people to look at, with a sample of the labelled images on it.
    ``slices`` is ``off``, ``auto`` or the side of the tiles that a training learns from beside whole images; what it
    decided stands in its checkpoint, so a ranking does as the training of its model did.
    ``known`` maps labels to the classes of the zoo's weights that they are known from: a training's head starts from
    their rows, and a ``rank`` round without a ``model`` orders the pool by the zoo's detector as it is.
    """

    project_id: int
    project_key: str
    number: int
    kind: Literal["train", "rank"]
    detector: str
    strategy: str
    budget: int
    delta: float
    seed: int
    score_threshold: float
    holdout_fraction: float
    max_iterations: int | None = None
    init_weights: str = "zoo"
    device: str = "auto"
    from_name: str | None = None
    model: ModelRef | None = None
    strategy_options: Mapping[str, Any] = field(default_factory=dict)
    difficulty_options: Mapping[str, Any] = field(default_factory=dict)
    look_at_labelled: bool = False
    difficulty: bool = True
    patience: int | None = None
    deterministic: bool = False
    mixed_precision: bool = True
    embedding: Literal["query", "sampled"] = "query"
    levels: Literal["provenance", "scale"] = "provenance"
    cold_start: Literal["typical", "random"] = "random"
    draw_map: bool = False
    slices: int | str = "off"
    evaluation_images: int = 40
    pool_minutes: float | None = None
    other_shapes: bool = False
    train_on_everything: bool = False
    keep_better: bool = False
    known: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def is_as_is(self) -> bool:
        """Whether the pool is ordered by the zoo's detector as it is."""
        return self.kind == "rank" and self.model is None and bool(self.known)

    def __post_init__(self) -> None:
        if self.kind not in ("train", "rank"):
            raise ValueError(f"expected kind 'train' or 'rank', got {self.kind!r}")
        if self.budget < 1 or not self.delta > 1:
            raise ValueError(f"expected budget >= 1 and delta > 1, got {self.budget} and {self.delta}")
        if self.evaluation_images < 1:
            raise ValueError(f"expected evaluation_images >= 1, got {self.evaluation_images}")
        if not 0 <= self.holdout_fraction <= 0.5:
            raise ValueError(f"expected holdout_fraction in [0, 0.5], got {self.holdout_fraction}")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> RoundSpec:
        """The inverse of :meth:`as_dict`."""
        model = None if value.get("model") is None else ModelRef.from_dict(value["model"])
        return cls(**{**value, "model": model})


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


def describe_slicing(metrics: Mapping[str, Any]) -> str:
    """What a training decided about tiles and why, in a sentence; empty where tiles were switched off.

    Args:
        metrics: Of the round: ``slices`` (px or None) and ``why_slices``.
    """
    if not metrics.get("why_slices"):
        return ""
    if metrics.get("slices") is None:
        return f"Images are not cut into tiles: {metrics['why_slices']}."
    return (
        f"The model looks at images as a whole and in tiles of {metrics['slices']} px, as it learned to: "
        f"{metrics['why_slices']}."
    )
