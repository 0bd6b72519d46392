"""``ppal status``, ``round``, ``cancel``, ``pause`` and ``resume``: what the projects' rounds do."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ppal_backend.commands.shared import AsJson, console, opened, print_json
from ppal_backend.operations import control

Project = Annotated[int, typer.Argument(help="Label Studio project id")]


def status(
    project: Annotated[int | None, typer.Argument(help="Label Studio project id; all without one")] = None,
    as_json: AsJson = False,
) -> None:
    """Rounds, versions and problems of the connected projects.

    Example: ppal status 1 --json
    """
    from ppal_backend.service import readiness

    with opened(as_json, project) as (settings, store):
        projects = store.projects.all() if project is None else [store.projects.get(project)]
        if not projects and not as_json:
            console.print(f"no project is connected in {settings.model_dir.resolve()}", highlight=False, soft_wrap=True)
        if as_json:
            print_json(
                [
                    {
                        "project": p.id,
                        "problems": p.problems,
                        "new_annotations": store.ledger.new_count(p.id),
                        "rounds": [asdict(r) for r in store.rounds.of_project(p.id)],
                        "versions": [asdict(v) for v in store.versions.of_project(p.id)],
                    }
                    for p in projects
                ]
            )
            return
        for p in projects:
            title = f"project {p.id}: {store.ledger.new_count(p.id)} new annotations"
            table = Table("round", "kind", "state", "step", "mAP", "why", title=title)
            for r in store.rounds.of_project(p.id):
                table.add_row(
                    str(r.number), r.kind, r.state, r.step, figure(r.metrics.get("map")), escape(r.error or r.reason)
                )
            console.print(table)
            for text in p.problems.values():
                console.print(f"[bold red]problem:[/] {escape(text)}", highlight=False)
        silent = readiness.worker(store)
        if silent:
            console.print(f"[bold red]problem:[/] {escape(silent)}", highlight=False)


def start_round(
    project: Project,
    rank_only: Annotated[bool, typer.Option("--rank", help="order the queue again without training")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask for a round now; a running worker takes it up within seconds.

    Example: ppal round 1 --rank
    """
    with opened(as_json, project) as (_, store):
        record = store.rounds.request(project, "rank" if rank_only else "train", "asked for by ppal round")
        if as_json:
            print_json({"project": project, "round": record.number, "kind": record.kind, "state": record.state})
            return
        console.print(f"round {record.number} ({record.kind}) of project {project} is {record.state}")


def cancel(project: Project, as_json: AsJson = False) -> None:
    """Stop a project's rounds for good; the next training uses the same annotations and those to come.

    Example: ppal cancel 1
    """
    with opened(as_json, project) as (_, store):
        stopped = [{"round": record.number, "state": record.state} for record in control.cancel(store, project)]
        if as_json:
            print_json({"project": project, "rounds": stopped})
            return
        for row in stopped:
            state = "being stopped" if row["state"] == "running" else row["state"]
            console.print(f"round {row['round']} is {state}")


def pause(project: Project, as_json: AsJson = False) -> None:
    """Hold a project's rounds: the running one saves what it has and leaves, no other starts.

    Example: ppal pause 1
    """
    with opened(as_json, project) as (_, store):
        changed = control.pause(store, project)
        _tell(project, True, changed, f"project {project} is {'now' if changed else 'already'} paused", as_json)


def resume(project: Project, as_json: AsJson = False) -> None:
    """Let a paused project's rounds go on from where they were.

    Example: ppal resume 1
    """
    with opened(as_json, project) as (_, store):
        changed = control.resume(store, project)
        _tell(project, False, changed, f"project {project} {'goes on' if changed else 'was not paused'}", as_json)


def figure(value: Any) -> str:
    """A score for a table; empty where there is none."""
    return "" if value is None else f"{value:.3f}"


def _tell(project: int, paused: bool, changed: bool, text: str, as_json: bool) -> None:
    if as_json:
        print_json({"project": project, "paused": paused, "changed": changed})
        return
    console.print(text)


COMMANDS = (status, cancel, pause, resume)
