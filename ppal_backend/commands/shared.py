"""What every command does alike: settings, errors, output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from ppal_backend.errors import PPALError
from ppal_backend.logs import configure_logging
from ppal_backend.settings import Settings, load_settings

console = Console()

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """A known error becomes one line and exit code 1."""
    try:
        yield
    except PPALError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None


def settings_and_logging() -> Settings:
    """Read the settings and set up logging as they say."""
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format, settings.secrets)
    return settings
