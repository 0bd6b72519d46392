"""Simulations with a name: the paper's protocols and the built-in benchmarks, as TOML beside this file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from ppal_backend.errors import SettingsError

FOLDER = Path(__file__).parent / "presets"


def preset_names() -> tuple[str, ...]:
    """Names of the presets."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load_preset(name: str) -> dict[str, Any]:
    """A preset's tables: ``title``, ``data`` and ``plan``.

    Raises:
        SettingsError: There is no such preset (the message lists those there are), or its file is broken.
    """
    if name not in preset_names():
        raise SettingsError(f"expected a preset of {', '.join(preset_names())}, got {name!r}; choose one of these")
    try:
        tables = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"preset {name!r} is not valid TOML: {error}") from None
    missing = [key for key in ("title", "data", "plan") if key not in tables]
    if missing:
        raise SettingsError(f"preset {name!r} lacks {', '.join(missing)}; add it")
    return tables
