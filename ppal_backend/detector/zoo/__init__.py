"""The model zoo: which detectors there are and how each one is trained.

This module imports nothing heavy, so a command line can list the zoo at once.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppal_backend.detector.zoo.known_classes import COCO_CLASSES
from ppal_backend.errors import DetectorError, UnknownDetector

ZOO_FILE = "zoo.toml"
_DECAYS = ("cosine", "step", "constant")
_WEIGHT_KINDS = ("detector", "backbone", "vocabulary")
_DIGEST_DIGITS = 64
_CLASS_LISTS = {"coco": COCO_CLASSES}  # what an entry may name instead of listing them
_TABLES = ("weights", "schedule", "inference", "vocabulary")
_RECIPES = "recipe"  # the table that holds named schedules
AUTO = "auto"  # instead of a name: the first that can be had, in the order of the table of that name
_INCLUDE = "include_packaged"  # set in an operator's zoo: its detectors come on top of the packaged ones


@dataclass(frozen=True)
class Weights:
    """Initial weights of a detector.

    Args:
        kind: ``detector`` for a whole detector, ``backbone`` for its backbone only, ``vocabulary`` for the words of the
            text encoder that reads prompts.
        path: File in the zoo, or None when it does not ship the weights.
        url: Address to download from, or None when there is none.
        sha256: Hex digest of the file, or its first 8 or more digits; empty means unchecked.
        licence: Licence of the weights.
        source: What they were trained on, or by which script.
        file: Name of a file without an address, which people put in place themselves; it needs a whole digest.
        classes: Names of the classes that a whole detector knows, in the order of its head's rows; () where nobody
            says.
    """

    kind: str
    path: Path | None
    url: str | None
    sha256: str
    licence: str
    source: str = ""
    file: str | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _WEIGHT_KINDS:
            raise ValueError(f"expected weights kind to be one of {_WEIGHT_KINDS}, got {self.kind!r}")
        if sum(origin is not None for origin in (self.path, self.url, self.file)) != 1:
            raise ValueError("expected weights with a path, a url or a file; give exactly one")
        if self.file is not None and (
            not self.file or Path(self.file).name != self.file or len(self.sha256) != _DIGEST_DIGITS
        ):
            raise ValueError(f"expected a bare file name and a sha256 of {_DIGEST_DIGITS} digits, got {self.file!r}")
        if self.kind == "vocabulary" and len(self.sha256) != _DIGEST_DIGITS:
            raise ValueError(f"expected a vocabulary with a sha256 of {_DIGEST_DIGITS} digits, got {self.sha256!r}")

    @property
    def file_name(self) -> str:
        """Name of the file on disk."""
        if self.path is not None:
            return self.path.name
        if self.kind == "vocabulary":  # published under the same name for every text encoder
            return f"vocabulary-{self.sha256[:8]}.txt"
        return self.file if self.file is not None else str(self.url).rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a detector trains; scaled to the data set by :meth:`iterations`.

    Args:
        epochs: Passes over the data set that are aimed at.
        min_iterations: Fewest optimiser steps, however small the data set.
        max_iterations: Most optimiser steps, unless ``min_epochs`` asks for more.
        batch_size: Images a step.
        lr: Learning rate at this batch size.
        warmup_iterations: Steps of linear warm-up (never more than a fifth of the training).
        decay: ``cosine``, ``step`` (times 0.1 at ``step_at``) or ``constant``.
        step_at: Fraction of the training, in (0, 1), at which ``step`` lowers the learning rate.
        min_epochs: Fewest passes over the data set, however large it is.
    """

    epochs: float
    min_iterations: int
    max_iterations: int
    batch_size: int
    lr: float
    warmup_iterations: int = 0
    decay: str = "cosine"
    step_at: float = 0.77
    min_epochs: float = 0.0

    def __post_init__(self) -> None:
        for name in ("min_iterations", "max_iterations", "batch_size", "warmup_iterations"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"expected {name} as a whole number, got {getattr(self, name)!r}")
        if not 1 <= self.min_iterations <= self.max_iterations:
            raise ValueError(
                f"expected 1 <= min_iterations <= max_iterations, got {self.min_iterations} and {self.max_iterations}"
            )
        if not (0 < self.epochs < math.inf and self.batch_size >= 1 and 0 < self.lr < math.inf):
            raise ValueError(
                f"expected positive epochs, batch_size and lr, got {self.epochs}, {self.batch_size} and {self.lr}"
            )
        if self.warmup_iterations < 0 or not 0 <= self.min_epochs <= self.epochs:
            raise ValueError("expected warmup_iterations >= 0 and min_epochs from 0 to epochs")
        if self.decay not in _DECAYS or not 0 < self.step_at < 1:
            raise ValueError(f"expected decay to be one of {_DECAYS} and step_at in (0, 1), got {self.decay!r}")

    def iterations(self, images: int, cap: int | None = None) -> int:
        """Optimiser steps for a data set.

        Args:
            images: Number of training images, at least 1.
            cap: Upper bound that overrides the schedule's own bounds.

        Returns:
            At least 1.

        Raises:
            ValueError: ``images`` or ``cap`` is below 1.
        """
        if images < 1 or (cap is not None and cap < 1):
            raise ValueError(f"expected images >= 1 and cap >= 1, got {images} and {cap}")
        wanted = round(self.epochs * images / self.batch_size)
        fewest = round(self.min_epochs * images / self.batch_size)
        total = max(min(max(wanted, self.min_iterations), self.max_iterations), fewest)
        return total if cap is None else min(total, cap)


@dataclass(frozen=True)
class ZooEntry:
    """One detector of the zoo.

    Args:
        name: Name by which projects choose it.
        title: One line for people.
        paper: Reference of the detector.
        config: mmdetection config file (absolute).
        head_family: Family of the detection head, e.g. ``anchor``.
        input_size: Longest and shortest image side in pixels that the pipeline resizes to.
        weights: Initial weights, or None when there are none.
        schedule: Training schedule.
        batch_cpu: Images a batch in inference on a CPU.
        batch_cuda: Images a batch in inference on a GPU.
        memory: Remark for people.
        speed: Remark for people.
        aliases: Other names of the same detector.
        coco_ap: Box AP in percent that mmdetection publishes for this detector trained on COCO, or None.
        from_scratch: Whether the detector is small enough to train from random weights when it has no others.
        vocabulary: One word piece a line, for a detector with an open vocabulary: it looks for what prompts say. None
            for all others, whose classes are rows of their heads.
    """

    name: str
    title: str
    paper: str
    config: Path
    head_family: str
    input_size: tuple[int, int]
    weights: Weights | None
    schedule: Schedule
    batch_cpu: int = 1
    batch_cuda: int = 8
    memory: str = ""
    speed: str = ""
    aliases: tuple[str, ...] = ()
    coco_ap: float | None = None
    from_scratch: bool = False
    vocabulary: Weights | None = None

    def __post_init__(self) -> None:
        texts = (self.title, self.paper, self.head_family, self.memory, self.speed)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("expected text as title, paper, head_family, memory and speed")
        sides = [side for side in self.input_size if isinstance(side, int) and side >= 32]
        if not len(sides) == len(self.input_size) == 2:
            raise ValueError(f"expected input_size as two sides of at least 32 px, got {self.input_size}")
        if self.batch_cpu < 1 or self.batch_cuda < 1:
            raise ValueError("expected inference batches of at least 1 image")
        if self.coco_ap is not None and not 0 < self.coco_ap < 100:
            raise ValueError(f"expected coco_ap in percent, got {self.coco_ap}")


def default_zoo_root() -> Path:
    """Folder of the zoo: ``model_zoo/`` next to the package, or inside it where a wheel put it there."""
    package = Path(__file__).resolve().parents[2]
    beside = package.parent / "model_zoo"
    return beside if (beside / ZOO_FILE).is_file() else package / "model_zoo"


def load_zoo(root: Path | None = None) -> dict[str, ZooEntry]:
    """Read every entry of the zoo.

    Args:
        root: Folder that holds ``zoo.toml``; the packaged zoo when None.

    Returns:
        Entries by name, in the order of the file; those of the packaged zoo first where the file includes them.

    Raises:
        DetectorError: The file is missing, an entry is not valid or has a name that the packaged zoo has; the message
            names the entry.
    """
    folder = default_zoo_root() if root is None else Path(root)
    tables = zoo_tables(folder)
    packaged: dict[str, ZooEntry] = {}
    recipes: dict[str, Any] = {}
    if tables.pop(_INCLUDE, False):
        packaged, recipes = load_zoo(), zoo_tables(default_zoo_root()).get(_RECIPES, {})
    own_recipes = tables.pop(_RECIPES, {})
    if not isinstance(own_recipes, dict) or not all(isinstance(recipe, dict) for recipe in own_recipes.values()):
        raise DetectorError(f"expected a table [{_RECIPES}] of tables in {folder / ZOO_FILE}, got {own_recipes!r:.80}")
    recipes = {**recipes, **own_recipes}
    tables.pop(AUTO, None)
    taken = names_in(packaged)
    own = {name: _entry(folder, name, table, recipes) for name, table in tables.items()}
    if twice := sorted(names_in(own) & taken):
        raise DetectorError(
            f"expected names in {folder / ZOO_FILE} that the packaged zoo does not have, got {', '.join(twice)}; "
            f"rename them"
        )
    return {**packaged, **own}


RESERVED = frozenset({AUTO, _RECIPES, _INCLUDE})
"""Names that mean something else in the file."""


def names_in(zoo: Mapping[str, ZooEntry]) -> set[str]:
    """Every name and alias in a zoo."""
    return {name for entry in zoo.values() for name in (entry.name, *entry.aliases)}


def zoo_tables(folder: Path) -> dict[str, Any]:
    """The zoo's file as it is: detectors, named schedules, and the order for ``auto``.

    Raises:
        DetectorError: It is missing or not valid TOML.
    """
    file = folder / ZOO_FILE
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DetectorError(f"expected a model zoo at {file}, found none; give the folder that holds it") from error
    except UnicodeDecodeError as error:
        raise DetectorError(f"expected text in UTF-8 in {file}, got other bytes ({error}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise DetectorError(f"expected valid TOML in {file}: {error}") from error


def toml_value(value: Any) -> str:
    """Text, a number, a truth value or a list of them as TOML, which is nearly what JSON writes.

    Text that is no UTF-8 (names of files may be) gets question marks.
    """
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON may hold it as it is
    return text.encode("utf-8", "replace").decode("utf-8")


def find_entry(name: str, root: Path | None = None) -> ZooEntry:
    """Look one detector up.

    Args:
        name: Its name in the zoo, or one of its aliases.
        root: Folder of the zoo; the packaged one when None.

    Raises:
        UnknownDetector: There is no such name; the message lists the names.
    """
    zoo = load_zoo(root)
    for entry in zoo.values():
        if name in entry.aliases:
            return entry
    if name not in zoo:
        raise UnknownDetector(f"expected a detector of the zoo ({', '.join(sorted(zoo))}), got {name!r}; choose one")
    return zoo[name]


def _entry(folder: Path, name: str, table: Any, recipes: Mapping[str, Any]) -> ZooEntry:
    try:
        if not isinstance(table, dict):
            raise ValueError(f"expected a table, got {table!r:.80}")
        if wrong := [key for key in _TABLES if not isinstance(table.get(key, {}), dict)]:
            raise ValueError(f"expected a table for {wrong[0]}, got {table[wrong[0]]!r:.80}")
        config = folder / table["config"]
        if not config.is_file():
            raise ValueError(f"config file {config} does not exist")
        inference = table.get("inference", {})
        return ZooEntry(
            name=name,
            title=table["title"],
            paper=table["paper"],
            config=config,
            head_family=table["head_family"],
            input_size=tuple(table["input_size"]),
            weights=_weights(folder, table.get("weights")),
            schedule=_schedule(table["schedule"], recipes),
            batch_cpu=inference.get("batch_cpu", 1),
            batch_cuda=inference.get("batch_cuda", 8),
            memory=table.get("memory", ""),
            speed=table.get("speed", ""),
            aliases=_names(table.get("aliases", []), "aliases"),
            coco_ap=table.get("coco_ap"),
            from_scratch=bool(table.get("from_scratch", False)),
            vocabulary=_weights(folder, table.get("vocabulary"), "vocabulary"),
        )
    except KeyError as error:
        raise DetectorError(f"zoo entry {name!r} lacks the key {error.args[0]!r}; add it to {ZOO_FILE}") from error
    except (TypeError, ValueError) as error:
        raise DetectorError(f"zoo entry {name!r} is not valid: {error}") from error


def _schedule(table: Mapping[str, Any], recipes: Mapping[str, Any]) -> Schedule:
    """A schedule of its own, or a named recipe with what the entry adds to it."""
    own = dict(table)
    recipe = own.pop("recipe", None)
    if recipe is None:
        return Schedule(**own)
    if recipe not in recipes:
        raise ValueError(f"expected a recipe among {sorted(recipes)}, got {recipe!r}")
    return Schedule(**{**recipes[recipe], **own})


def _weights(folder: Path, table: Mapping[str, Any] | None, kind: str | None = None) -> Weights | None:
    if table is None:
        return None
    path = table.get("path")
    return Weights(
        kind=kind or table["kind"],
        path=folder / path if path else None,
        url=table.get("url"),
        sha256=table.get("sha256", ""),
        licence=table["licence"],
        source=table.get("source", ""),
        file=table.get("file"),
        classes=_classes(table.get("classes", [])),
    )


def _classes(given: Any) -> tuple[str, ...]:
    if isinstance(given, str) and given in _CLASS_LISTS:
        return _CLASS_LISTS[given]
    return _names(given, "classes", f" or one of {sorted(_CLASS_LISTS)}")


def _names(given: Any, what: str, other: str = "") -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"expected {what} as a list of names{other}, got {given!r:.80}")
    return tuple(given)
