"""``ppal versions``, ``rollback``, ``cancel``, ``pause``, ``resume``, ``prune``, ``backup`` and ``restore``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ppal_backend.commands.shared import AsJson, console, errors_in_one_line, settings_and_logging
from ppal_backend.errors import StateError
from ppal_backend.settings import Settings
from ppal_backend.store import Store, open_store

Project = Annotated[int, typer.Argument(help="Label Studio project id")]
PAUSED = "its rounds are paused; ppal resume {} lets them go on"


@contextmanager
def _opened() -> Iterator[tuple[Settings, Store]]:
    with errors_in_one_line():
        settings = settings_and_logging()
        store = open_store(settings)
        try:
            yield settings, store
        finally:
            store.close()


def versions(project: Project, as_json: AsJson = False) -> None:
    """The versions of a project: which is active, how good each is, which can be gone back to."""
    from ppal_backend.operations.rollback import has_artifacts

    with _opened() as (settings, store):
        store.projects.get(project)
        rows = [{**asdict(v), "files": has_artifacts(settings, v)} for v in store.versions.of_project(project)]
        if as_json:
            sys.stdout.write(json.dumps(rows, default=str, indent=1) + "\n")
            return
        table = Table("version", "round", "published", "detector", "mAP", "active", "files")
        for row in rows:
            score = row["metrics"].get("map")
            table.add_row(row["version"], str(row["round_number"]), f"{row['created_at']:%Y-%m-%d %H:%M}",
                          row["detector"] or "none", "" if score is None else f"{score:.3f}",
                          "yes" if row["active"] else "", "kept" if row["files"] else "removed")  # fmt: skip
        console.print(table)


def rollback(project: Project, version: Annotated[str, typer.Argument(help="as ppal versions lists it")]) -> None:
    """Make an earlier version's queue, predictions and model the active ones again."""
    from ppal_backend.label_studio.source import connect
    from ppal_backend.operations.rollback import roll_back

    with _opened() as (settings, store), connect(settings, store.projects.get(project).url) as client:
        done = roll_back(settings, store, client, project, version)
        how = f"published again as {done.version}" if done.published_again else "active again"
        console.print(f"version {version} is {how}, {done.predictions} tasks", highlight=False)
        if store.rounds.is_open(project):
            console.print(f"an open round will publish a newer one; ppal cancel {project} stops it", highlight=False)


def cancel(project: Project) -> None:
    """Stop a project's rounds for good; the next training uses the same annotations and those to come."""
    with _opened() as (_, store):
        store.projects.get(project)
        opened = [r for r in store.rounds.of_project(project) if r.finished_at is None]
        if not opened:
            raise StateError(f"project {project} has no open round, so there is nothing to cancel")
        for record in opened:
            store.rounds.ask_cancel(record.id)
            if record.kind == "train":
                store.ledger.put_off(project, record.number)
            state = store.rounds.get(record.id).state
            console.print(f"round {record.number} is {'being stopped' if state == 'running' else state}")


def pause(project: Project) -> None:
    """Hold a project's rounds: the running one saves what it has and leaves, no other starts."""
    with _opened() as (_, store):
        changed = store.projects.set_paused(project, True)
        store.projects.set_problem(project, "pause", PAUSED.format(project))
        console.print(f"project {project} is {'now' if changed else 'already'} paused")


def resume(project: Project) -> None:
    """Let a paused project's rounds go on from where they were."""
    with _opened() as (_, store):
        changed = store.projects.set_paused(project, False)
        store.projects.set_problem(project, "pause", "")
        console.print(f"project {project} {'goes on' if changed else 'was not paused'}")


def prune(
    project: Annotated[int | None, typer.Argument(help="Label Studio project id; all without one")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only tell what would be removed")] = False,
) -> None:
    """Remove the files of old versions (PPAL_KEEP_ARTIFACTS), never of the active one or of an open round."""
    from ppal_backend.operations.pruning import prune_project

    with _opened() as (settings, store):
        projects = store.projects.all() if project is None else [store.projects.get(project)]
        total = 0
        for p in projects:
            for item in prune_project(settings, store, p.id, dry_run):
                total += item.size_bytes
                console.print(f"project {p.id} round {item.round_number}: {item.size_bytes / 2**20:.1f} MiB")
        console.print(f"{'would free' if dry_run else 'freed'} {total / 2**20:.1f} MiB")


def backup(file: Annotated[Path, typer.Argument(help="tar file to write; must not exist")]) -> None:
    """Back up the state and what the active versions need; service and worker may go on."""
    from ppal_backend.operations.backup import back_up

    with _opened() as (settings, store):
        manifest = back_up(settings, store, file)
        console.print(f"{file}: {len(manifest['sha256'])} files, {file.stat().st_size / 2**20:.1f} MiB", soft_wrap=True)
        if manifest["database"] is None:
            console.print("the state database is no SQLite: back it up with pg_dump as well", highlight=False)


def restore(
    file: Annotated[Path, typer.Argument(help="tar file that ppal backup wrote")],
    force: Annotated[bool, typer.Option("--force", help="move what is in the data folder aside")] = False,
) -> None:
    """Restore a backup into the data folder. Stop service and worker first."""
    from ppal_backend.operations.backup import restore as run

    with errors_in_one_line():
        settings = settings_and_logging()
        manifest = run(settings, file, force)
        console.print(f"restored {len(manifest['sha256'])} files of {manifest['created_at']}", highlight=False)
        if manifest["database"] is None:
            console.print("the state database was not in it: restore it with pg_restore or psql", highlight=False)


COMMANDS = (versions, rollback, cancel, pause, resume, prune, backup, restore)
