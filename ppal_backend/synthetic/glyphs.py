"""The glyphs: families of classes with their weights and difficulties, and the shipped sprite sheet.

Three families share one sprite sheet and no class: ``demo`` (twenty classes, ten look-alike pairs whose rarer half is
hard to tell from the common half), ``second`` (hard classes that are *not* rare: small, faint, camouflaged or hidden,
beside rare classes that are easy) and ``pretrain`` (sixty other glyphs, only for the zoo's initial weights).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from io import BytesIO
from pathlib import Path
from types import MappingProxyType

from PIL import Image

from ppal_backend.errors import DatasetError, SettingsError

SCENE_KINDS = ("empty", "easy", "busy", "rare")
RARE_BELOW = 0.2
"""A class is rare when its weight is below this share of the family's largest weight."""


@dataclass(frozen=True)
class ClassSpec:
    """One class of a family.

    Attributes:
        label: Sprite name and class label.
        weight: Relative frequency, > 0.
        looks_like: Label of the class it is easily mistaken for.
        scale: Range of the factor on the scene's object size.
        opacity: Range of the sprite's opacity, in (0, 1].
        camouflage: Range in [0, 1] of how far its colours move towards the background's behind it.
        occluded: Probability in [0, 1] that something is laid over a part of it.
    """

    label: str
    weight: float = 1.0
    looks_like: str | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    opacity: tuple[float, float] = (1.0, 1.0)
    camouflage: tuple[float, float] = (0.0, 0.0)
    occluded: float = 0.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise SettingsError(f"expected weight > 0 for class {self.label!r}, got {self.weight}; use a positive one")


@dataclass(frozen=True)
class GlyphFamily:
    """Classes, the clutter strewn around them, and the mix of scenes they appear in."""

    name: str
    classes: tuple[ClassSpec, ...]
    clutter: tuple[str, ...]
    scene_shares: Mapping[str, float] = field(default_factory=dict)
    burst_share: float = 0.5

    def __post_init__(self) -> None:
        labels = [spec.label for spec in self.classes]
        if len(set(labels)) != len(labels) or set(labels) & set(self.clutter):
            raise SettingsError(f"family {self.name!r}: expected distinct labels, none of them clutter; rename one")
        unknown = sorted(set(self.scene_shares) - set(SCENE_KINDS))
        if unknown or abs(sum(self.scene_shares.values()) - 1.0) > 1e-9:
            raise SettingsError(
                f"family {self.name!r}: expected scene shares over {SCENE_KINDS} that add up to 1, "
                f"got {dict(self.scene_shares)}; correct them"
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """Class labels in category order (category_id = position + 1)."""
        return tuple(spec.label for spec in self.classes)

    @property
    def rare(self) -> tuple[ClassSpec, ...]:
        """Classes whose weight is below ``RARE_BELOW`` of the largest."""
        top = max(spec.weight for spec in self.classes)
        return tuple(spec for spec in self.classes if spec.weight < RARE_BELOW * top)

    def spec(self, label: str) -> ClassSpec:
        """The class of that label; KeyError when it is not in this family."""
        for spec in self.classes:
            if spec.label == label:
                return spec
        raise KeyError(label)


_CLUTTER = ("leaf_fluttering", "seedling", "shamrock", "rock", "wood", "cloud", "star", "droplet", "fire", "snowflake")
_CLUTTER_TOO = ("puzzle_piece", "sponge", "cookie", "moon")
_LEAFY = ("leaf_fluttering", "seedling", "shamrock", "clover", "sheaf", "rock", "wood", "feather", "cloud", "broccoli")

# (common, its weight, look-alike, its weight)
_DEMO_PAIRS = (
    ("dog", 630, "wolf", 60),
    ("apple", 520, "tomato", 75),
    ("car", 450, "taxi", 50),
    ("soccer_ball", 390, "volleyball", 95),
    ("cat", 340, "tiger", 40),
    ("bus", 300, "trolleybus", 85),
    ("tangerine", 270, "peach", 45),
    ("sunflower", 240, "blossom", 70),
    ("football", 215, "rugby_ball", 36),
    ("watch", 190, "stopwatch", 55),
)

_PRETRAIN = """
bear panda koala frog pig cow_face horse_face chicken fish whale octopus snail butterfly bee turtle banana grapes
cherries strawberry pineapple watermelon eggplant corn carrot bread cheese hamburger pizza doughnut cake ice_cream
coffee beer guitar trumpet drum alarm_clock phone camera laptop bulb key lock hammer scissors umbrella balloon gift
rocket airplane helicopter sailboat bicycle locomotive tent house tree cactus mushroom basketball
"""


def _demo() -> GlyphFamily:
    classes = []
    for common, weight, rare, rare_weight in _DEMO_PAIRS:
        classes.append(ClassSpec(common, float(weight), looks_like=rare))
        classes.append(ClassSpec(rare, float(rare_weight), looks_like=common))
    shares = {"empty": 0.20, "easy": 0.45, "busy": 0.20, "rare": 0.15}
    return GlyphFamily("demo", tuple(classes), _CLUTTER + _CLUTTER_TOO, MappingProxyType(shares))


def _second() -> GlyphFamily:
    small, faint, hidden = (0.42, 0.6), (0.4, 0.65), 0.8
    classes = (
        ClassSpec("fox", 500.0, looks_like="raccoon"),
        ClassSpec("pumpkin", 400.0),
        ClassSpec("teddy_bear", 260.0),
        ClassSpec("duck", 200.0),
        ClassSpec("ladybug", 420.0, scale=small),
        ClassSpec("ant", 300.0, looks_like="fly", scale=small),
        ClassSpec("fly", 55.0, looks_like="ant", scale=small),
        ClassSpec("ghost", 380.0, opacity=faint, camouflage=(0.2, 0.5)),
        ClassSpec("ice", 220.0, opacity=faint, camouflage=(0.2, 0.5)),
        ClassSpec("herb", 340.0, camouflage=(0.2, 0.5), scale=(0.6, 1.0)),
        ClassSpec("fallen_leaf", 210.0, camouflage=(0.3, 0.6), scale=(0.6, 1.0)),
        ClassSpec("raccoon", 280.0, looks_like="fox", occluded=hidden),
        ClassSpec("owl", 190.0, occluded=hidden),
        ClassSpec("fire_engine", 45.0),
        ClassSpec("parrot", 60.0),
        ClassSpec("crystal_ball", 36.0),
    )
    shares = {"empty": 0.15, "easy": 0.50, "busy": 0.25, "rare": 0.10}
    return GlyphFamily("second", classes, _LEAFY, MappingProxyType(shares))


def _pretrain() -> GlyphFamily:
    classes = tuple(ClassSpec(label) for label in _PRETRAIN.split())
    shares = {"empty": 0.04, "easy": 0.40, "busy": 0.56}
    return GlyphFamily("pretrain", classes, _CLUTTER + _CLUTTER_TOO, MappingProxyType(shares), burst_share=0.0)


def family_names() -> tuple[str, ...]:
    """Names that ``glyph_family`` knows."""
    return ("demo", "second", "pretrain")


def glyph_family(name: str) -> GlyphFamily:
    """The family of that name.

    Raises:
        SettingsError: No such family; the message lists those there are.
    """
    makers = {"demo": _demo, "second": _second, "pretrain": _pretrain}
    if name not in makers:
        raise SettingsError(f"expected a glyph family of {', '.join(makers)}, got {name!r}; use one of these")
    return makers[name]()


class GlyphSheet:
    """Sprites by name, cropped to their visible pixels, longer side 96 px."""

    def __init__(self, sprites: Mapping[str, Image.Image], sha256: str) -> None:
        self._sprites = dict(sprites)
        self.sha256 = sha256

    @classmethod
    def load(cls, folder: Path | None = None) -> GlyphSheet:
        """Read the sheet that ships with the package, or another one.

        Raises:
            DatasetError: The sheet is damaged (its checksum differs from the index).
        """
        place = folder if folder is not None else resources.files("ppal_backend.synthetic") / "assets"
        index = json.loads((place / "glyphs.json").read_text(encoding="utf-8"))
        content = (place / "glyphs.webp").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != index["sheet_sha256"]:
            raise DatasetError(
                f"expected sprite sheet {index['sheet_sha256'][:12]}, got {digest[:12]}; reinstall the package"
            )
        with Image.open(BytesIO(content)) as sheet:
            picture = sheet.convert("RGBA")
        sprites = {}
        for name, cell in index["glyphs"].items():
            x, y = cell["x"], cell["y"]
            sprites[name] = picture.crop((x, y, x + cell["width"], y + cell["height"]))
        return cls(sprites, digest)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all sprites, in the order of the sheet."""
        return tuple(self._sprites)

    def sprite(self, name: str) -> Image.Image:
        """The sprite of that name (RGBA).

        Raises:
            DatasetError: The sheet has no such sprite.
        """
        if name not in self._sprites:
            raise DatasetError(f"expected a sprite of the sheet, got {name!r}; see assets/glyphs.json for the names")
        return self._sprites[name]
