"""What every command does alike: settings, errors, progress, output.

Answers go to standard output: text for people, or with ``--json`` one JSON document. Logs, progress and, without
``--json``, errors go to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich import progress
from rich.console import Console
from rich.markup import escape

from ppal_backend.errors import PPALError, RoundCancelled
from ppal_backend.logs import configure_logging
from ppal_backend.settings import Settings, load_settings
from ppal_backend.store import Store, open_store
from ppal_backend.structures.progress import OnProgress, Progress

console = Console()
aside = Console(stderr=True)

FAILED, STOPPED = 1, 130
EXIT_CODES = {
    0: "it worked",
    FAILED: "an error, which the message explains; of ppal doctor: a check failed",
    2: "wrong usage: no such command or option, or a value that cannot be one",
    STOPPED: "stopped by Ctrl-C",
    143: "stopped by SIGTERM",
}

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document")]


def print_json(value: Any) -> None:
    """The answer of a command with ``--json``."""
    sys.stdout.write(json.dumps(value, default=str, ensure_ascii=False, indent=1) + "\n")


@contextmanager
def errors_in_one_line(as_json: bool = False) -> Iterator[None]:
    """A known error becomes one line, or the JSON document ``{"error": …, "kind": …}``, and an exit code."""
    try:
        yield
    except PPALError as error:
        if as_json:
            print_json({"error": str(error), "kind": type(error).__name__})
        else:
            aside.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(STOPPED if isinstance(error, RoundCancelled) else FAILED) from None


def settings_and_logging() -> Settings:
    """Read the settings and set up logging as they say."""
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format, settings.secrets)
    return settings


@contextmanager
def opened(as_json: bool = False) -> Iterator[tuple[Settings, Store]]:
    """Settings and state for the duration of a command."""
    with errors_in_one_line(as_json):
        settings = settings_and_logging()
        store = open_store(settings)
        try:
            yield settings, store
        finally:
            store.close()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is being done and for how long, where nothing tells how much is left."""
    columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=aside, transient=True) as bars:
        bars.add_task(what, total=None)
        yield


@contextmanager
def progress_bar(what: str) -> Iterator[OnProgress]:
    """A bar with the time left; give it to what tells its progress."""
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with progress.Progress(*columns, console=aside, transient=True) as bars:
        bar = bars.add_task(what, total=None)
        step = ""

        def told(now: Progress) -> None:
            nonlocal step
            if now.step != step:
                bars.reset(bar, total=None)
                step = now.step
            bars.update(bar, description=f"{what}: {step}", completed=now.done, total=now.total or None)

        yield told
