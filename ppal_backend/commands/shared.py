"""What every command does alike: settings, errors, progress, output.

Answers go to standard output: text for people, or with ``--json`` one JSON document. Logs, progress and, without
``--json``, errors go to standard error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Annotated, Any

import typer
from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ppal_backend.doctor import Finding
from ppal_backend.errors import PPALError, RoundCancelled, StateError
from ppal_backend.logs import configure_logging
from ppal_backend.settings import Settings, load_settings
from ppal_backend.store import Store, find_store, hint_of_another
from ppal_backend.structures.round import OnProgress, Progress

console = Console()
stderr = Console(stderr=True)

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
    """The answer of a command with ``--json``; text that standard output cannot hold is escaped."""
    text = json.dumps(value, default=str, ensure_ascii=False, indent=1)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, default=str, indent=1)
    sys.stdout.write(text + "\n")


@contextmanager
def errors_in_one_line(as_json: bool = False) -> Iterator[None]:
    """A known error, and one of the system about a file, becomes one line, or the JSON document
    ``{"error": …, "kind": …}``, and an exit code."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the answer has seen enough; click ends quietly
    except (PPALError, OSError) as error:
        told = str(error) if isinstance(error, PPALError) else _about_a_file(error)
        if as_json:
            print_json({"error": told, "kind": type(error).__name__})
        else:
            stderr.print(f"[bold red]error:[/] {escape(told)}", highlight=False, soft_wrap=True)
        raise typer.Exit(STOPPED if isinstance(error, RoundCancelled) else FAILED) from None


def _about_a_file(error: OSError) -> str:
    what = " ".join((error.strerror or str(error) or type(error).__name__).split())
    if error.filename is None:
        return f"the system refused a call ({type(error).__name__}): {what}"
    if isinstance(error, PermissionError):
        return (
            f"expected to use {error.filename!s}, got: {what}; choose another path, or let user {os.geteuid()} write "
            f"there (a folder mounted into a container: chown -R {os.geteuid()} it, on the host)"
        )
    return f"expected to use {error.filename!s}, got: {what}; check the path and the space on its disk"


def need_checkout(command: str) -> None:
    """Ask for a checkout: what starts a Label Studio and servers is not in the wheel.

    Raises:
        StateError: this is an installed wheel.
    """
    if importlib.util.find_spec("ppal_backend.rig") is None:
        raise StateError(
            f"expected a checkout for {command}, got an installed wheel, which has no Label Studio to start; "
            "clone the repository and run it there"
        )


def settings_and_logging() -> Settings:
    """Read the settings and set up logging as they say."""
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format, settings.secrets)
    return settings


@contextmanager
def opened(as_json: bool = False, project: int | None = None) -> Iterator[tuple[Settings, Store]]:
    """Settings and the state that a backend keeps, for the duration of a command; see :func:`state_of`."""
    with errors_in_one_line(as_json):
        settings = settings_and_logging()
        with state_of(settings, project) as store:
            yield settings, store


@contextmanager
def state_of(settings: Settings, project: int | None = None) -> Iterator[Store]:
    """The state that a backend keeps. Commands never make it: in the wrong folder they would find it empty.

    Where another folder is the running backend's, that is told on standard error.

    Args:
        settings: where to look.
        project: the project that the command is about.

    Raises:
        StateError: there is none; the text tells where it was looked for and where a running backend's is.
    """
    with closing(find_store(settings, project)) as store:
        hint = hint_of_another(settings, store)
        if hint:
            stderr.print(f"[yellow]note:[/] {escape(hint)}", highlight=False, soft_wrap=True)
        yield store


def folding_table(*names: str, title: str = "", typed: Sequence[str] = ()) -> Table:
    """A table of which nothing is cut off: long cells go on in the next line. What people type or copy, the columns
    ``typed``, stays in one line while the terminal is wide enough for it."""
    table = Table(title=title or None)
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name in typed)
    return table


_MARKS = {"ok": "[green]ok[/]", "note": "note", "warning": "[yellow]warning[/]", "failed": "[bold red]failed[/]"}


def show_finding(finding: Finding, where: Console = console) -> None:
    """A finding in the words of the pages: what, cause, what to do, when the next try is."""
    from ppal_backend.doctor.health import next_try

    name = finding.title or finding.check
    where.print(f"{_MARKS[finding.state]} {escape(f'{name}: {finding.seen}')}", highlight=False, soft_wrap=True)
    advice = " ".join(part for part in (finding.advice, next_try(finding)) if part)
    if advice:
        where.print(f"   -> {advice}", highlight=False, soft_wrap=True, markup=False)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is being done and for how long, where nothing tells how much is left."""
    columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=stderr, transient=True) as bars:
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
    with progress.Progress(*columns, console=stderr, transient=True) as bars:
        bar = bars.add_task(what, total=None)
        step = ""

        def told(now: Progress) -> None:
            nonlocal step
            if now.step != step:
                bars.reset(bar, total=None)
                step = now.step
            bars.update(bar, description=f"{what}: {step}", completed=now.done, total=now.total or None)

        yield told
