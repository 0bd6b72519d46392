"""The shipped sprite sheet: one RGBA picture and an index, no system font needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from io import BytesIO
from pathlib import Path

from PIL import Image

from ppal_backend.errors import DatasetError


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
        place = folder if folder is not None else resources.files("ppal_backend.demo") / "assets"
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
