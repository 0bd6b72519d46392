"""``ppal up``, ``serve``, ``worker`` and ``migrate``: the processes, and the database they need. ``ppal demo`` runs all
of it with a Label Studio; ``ppal demo-data`` makes its images."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ppal_backend.commands.shared import (
    AsJson,
    console,
    errors_in_one_line,
    need_checkout,
    opened,
    print_json,
    progress_bar,
    settings_and_logging,
    show_finding,
    stderr,
)
from ppal_backend.doctor import from_problem
from ppal_backend.errors import DetectorError, SettingsError, StateError, StoreUnavailable
from ppal_backend.files import read_json
from ppal_backend.logs import configure_logging
from ppal_backend.settings import Settings
from ppal_backend.store import ALIVE_WITHIN_S, Lease, announce, database_file, open_store
from ppal_backend.structures.round import Progress

Gpus = Annotated[int | None, typer.Option(min=1, help="GPUs that train one detector together (PPAL_GPUS)")]


TOKEN_CHECK_S = 10.0


class Profile(StrEnum):
    """What ``ppal up`` starts."""

    small = "small"
    full = "full"


def up(
    gpus: Gpus = None,
    profile: Annotated[
        Profile, typer.Option(help="small: service and worker; full: what docker-compose.yml starts, for testing")
    ] = Profile.small,
    folder: Annotated[Path, typer.Option(help="of --profile full: its data, logs and passwords")] = Path("full-run"),
) -> None:
    """Run the service and the worker together, until Ctrl-C.

    With --profile full also PostgreSQL, Redis and Label Studio, and two workers.

    Example: ppal up --profile full --folder full-run
    """
    with errors_in_one_line():
        _for_children(gpus)
        if profile is Profile.full:
            need_checkout("ppal up --profile full")
            from ppal_backend.rig.full import run_full

            settings_and_logging()
            run_full(folder, stderr)
        else:
            from ppal_backend.launcher import up as run_up

            _print_addresses(_starting("up"))
            run_up()


def _print_addresses(settings: Settings) -> None:
    """Where people go now: dashboard and connect address, whether the token is taken, and what comes next."""
    here = f"http://localhost:{settings.port}"
    lines = [
        f"dashboard: {settings.public_url or here}/ui/",
        f"address to connect in Label Studio (Settings > Model): {settings.public_url or here}",
    ]
    for line in lines:
        stderr.print(line, highlight=False, soft_wrap=True, markup=False)
    threading.Thread(target=_check_token, args=(settings,), daemon=True).start()  # a start waits for nobody


def _check_token(settings: Settings) -> None:
    from ppal_backend.doctor import installation
    from ppal_backend.errors import LabelStudioError
    from ppal_backend.label_studio.source import open_client

    try:
        with open_client(settings, tries=1, timeout_s=TOKEN_CHECK_S) as client:
            found = [installation.reachable(client)]
            if found[0].state != "failed":
                found.append(installation.token(client))
    except SettingsError as error:
        found = [from_problem("settings", str(error))]
    except LabelStudioError as error:
        found = [from_problem("token", str(error))]
    for finding in found:
        show_finding(finding, stderr)
    if any(finding.state == "failed" for finding in found):
        after = "next: correct that; the backend starts all the same, and ppal doctor tells more"
    else:
        after = "next: connect a project, on the dashboard or by ppal connect; then Label All Tasks in Label Studio"
    stderr.print(after, highlight=False, soft_wrap=True, markup=False)


def serve() -> None:
    """Run the HTTP service alone.

    Example: ppal serve
    """
    from ppal_backend.launcher import serve as run_serve

    with errors_in_one_line():
        _starting("serve")
        run_serve()


def worker(
    rounds: Annotated[int, typer.Option(min=1, help="projects that may run a round at the same time")] = 1,
    gpus: Gpus = None,
    alive: Annotated[
        bool, typer.Option("--alive", help="only tell whether a worker lives on this machine: exit code 0 or 1")
    ] = False,
) -> None:
    """Run the worker alone: it handles events and runs rounds.

    Example: ppal worker --rounds 2
    """
    from ppal_backend.worker.worker import run_worker

    if alive:
        return _need_worker()
    with errors_in_one_line():
        _for_children(gpus)
        run_worker(_starting("worker"), parallel_rounds=rounds)


def migrate(as_json: AsJson = False) -> None:
    """Bring the state database to this release's schema; service and worker do so at their start as well.

    Example: ppal migrate
    """
    from ppal_backend.store.database import SCHEMA_VERSION

    with errors_in_one_line(as_json), closing(open_store(settings_and_logging())) as store:
        kind = "SQLite" if store.database.is_sqlite else "PostgreSQL"
    if as_json:
        print_json({"database": kind, "schema": SCHEMA_VERSION})
        return
    console.print(f"the {kind} state database is at schema {SCHEMA_VERSION}", highlight=False)


def _need_worker() -> None:
    with opened() as (_, store):
        ages = [age for name, age in store.workers.ages_s().items() if Lease.parse(name).is_here]
        if min(ages, default=ALIVE_WITHIN_S) >= ALIVE_WITHIN_S:
            raise StateError(
                f"expected a worker of this machine within {ALIVE_WITHIN_S:.0f} s, got none; start ppal worker"
            )
        console.print(f"a worker was last heard of {min(ages):.0f} s ago", highlight=False)


def _starting(command: str) -> Settings:
    """The settings of a process that stays, after what would hinder it has been looked for, and its note.

    ``ppal up`` starts its processes again and again, so what cannot work is an error before. A database or queue on
    another machine may come up later.
    """
    from ppal_backend.service.backend import checked_options

    settings = settings_and_logging()
    try:
        checked_options(settings, {})
    except (SettingsError, DetectorError) as error:
        raise SettingsError(f"settings: PPAL_DETECTOR or PPAL_STRATEGY, the defaults of projects: {error}") from None
    try:
        open_store(settings).close()
    except StoreUnavailable:
        if database_file(settings.state_url) is not None:
            raise
    announce(settings, command)
    return settings


def _for_children(gpus: int | None) -> None:
    """Rounds run in processes of their own, which read the environment."""
    if gpus is not None:
        os.environ["PPAL_GPUS"] = str(gpus)


def demo(
    exit_: Annotated[bool, typer.Option("--exit", help="stop after the second round")] = False,
    coco: Annotated[Path | None, typer.Option(help="your own data: a COCO file …")] = None,
    images: Annotated[Path | None, typer.Option(help="… and the folder its images lie in")] = None,
    out: Annotated[Path, typer.Option(help="where the demo keeps its files")] = Path("demo-run"),
    as_json: AsJson = False,
) -> None:
    """Start Label Studio and the backend, label with a scripted annotator, run two rounds.

    With --json the figures of summary.json are printed at the end.

    Example: ppal demo --exit --out demo-run
    """
    with errors_in_one_line(as_json):
        need_checkout("ppal demo")
        from ppal_backend.demo.run import DemoOptions, run_demo

        configure_logging("WARNING")
        options = DemoOptions(out=out, stay=not exit_, coco=coco, images_dir=images)
        run_demo(options, stderr if as_json else console, _evaluate)
        if as_json:
            print_json(read_json(out / "summary.json"))


def _evaluate(detector: str, checkpoint: Path, labels: tuple[str, ...], test: Path) -> float | None:
    from ppal_backend.detector.infer.evaluation import evaluate  # imports torch, which takes seconds

    return evaluate(detector, checkpoint, labels, test).map


def demo_data(
    out: Annotated[Path, typer.Argument(help="folder to write to")],
    images: Annotated[int, typer.Option(min=1, help="how many images")] = 360,
    seed: Annotated[int, typer.Option(min=0, help="another number makes other images")] = 0,
    glyphs: Annotated[str, typer.Option(help="family of glyphs: demo, pretrain or second")] = "demo",
    as_json: AsJson = False,
) -> None:
    """Generate the demo's detection data set: COCO and images.

    Example: ppal demo-data pool --images 100
    """
    from ppal_backend.synthetic.scenes import generate

    with errors_in_one_line(as_json):
        with progress_bar("generating") as told:
            path = generate(
                out, images=images, seed=seed, glyphs=glyphs,
                on_progress=lambda done, total: told(Progress("images", done, total)),
            )  # fmt: skip
        if as_json:
            print_json({"annotations": str(path), "images": images, "seed": seed, "glyphs": glyphs})
            return
        console.print(str(path), soft_wrap=True, highlight=False)


COMMANDS = (demo, demo_data, up, serve, worker, migrate)
