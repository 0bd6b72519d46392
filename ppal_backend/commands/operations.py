"""What people do to projects: ``ppal status``, ``round``, ``pin``, ``cancel``, ``pause``, ``resume``, ``versions``,
``rollback``, ``prune``, ``backup`` and ``restore``."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ppal_backend.commands.shared import (
    AsJson,
    console,
    errors_in_one_line,
    folding_table,
    opened,
    print_json,
    progress_bar,
    settings_and_logging,
    show_finding,
    waiting,
)
from ppal_backend.errors import SettingsError
from ppal_backend.structures.quality import Quality, count

Project = Annotated[int, typer.Argument(help="Label Studio project id")]


def status(
    project: Annotated[int | None, typer.Argument(help="Label Studio project id; all without one")] = None,
    as_json: AsJson = False,
) -> None:
    """Rounds, versions and problems of the connected projects.

    Example: ppal status 1 --json
    """
    from ppal_backend.doctor.health import health
    from ppal_backend.operations.detectors import in_force, known_label_lines
    from ppal_backend.structures.round import KIND_NAMES, describe_slicing

    with opened(as_json, project) as (settings, store):
        projects = store.projects.all() if project is None else [store.projects.get(project)]
        if not projects and not as_json:
            console.print(f"no project is connected in {settings.model_dir.resolve()}", highlight=False, soft_wrap=True)
        found = {p.id: health(settings, store, p) for p in projects}
        detectors = {}
        for p in projects:
            with suppress(SettingsError):  # of a project whose settings cannot be used, which is a finding
                detectors[p.id] = in_force(settings, p)
        if as_json:
            print_json(
                [
                    {
                        "project": p.id,
                        "title": p.title,
                        "detector": asdict(detectors[p.id]) if p.id in detectors else None,
                        "problems": p.problems,
                        "health": [asdict(finding) for finding in found[p.id]],
                        "new_annotations": store.ledger.new_count(p.id),
                        "known_labels": known_label_lines(settings, store, p),
                        "rounds": [asdict(r) for r in store.rounds.of_project(p.id)],
                        "versions": [asdict(v) for v in store.versions.of_project(p.id)],
                    }
                    for p in projects
                ]
            )
            return
        shared = health(settings, store)
        for p in projects:
            title = f"project {p.id}{f' ({escape(p.title)})' if p.title else ''}: "
            title += count(store.ledger.new_count(p.id), "new annotation")
            table = folding_table("round", "kind", "state", "step", "mAP", "why", title=title, typed=("round", "mAP"))
            for r in store.rounds.of_project(p.id):
                state = "waiting" if r.is_waiting else r.state
                table.add_row(
                    str(r.number),
                    KIND_NAMES[r.kind],
                    state,
                    r.step,
                    Quality.of(r.metrics).figure,
                    escape(r.error or r.reason),
                )
            console.print(table)
            if p.id in detectors:
                console.print(f"detector {escape(detectors[p.id].text)}", highlight=False, soft_wrap=True)
            trained = [r for r in store.rounds.of_project(p.id) if r.kind == "train" and r.state == "done"]
            if trained:
                quality = Quality.of(trained[-1].metrics)
                for line in (quality.sentence, quality.comparison_sentence):
                    if line:
                        console.print(line, highlight=False, soft_wrap=True)
            slicing = describe_slicing(trained[-1].metrics) if trained else ""
            if slicing:
                console.print(escape(slicing), highlight=False, soft_wrap=True)
            for line in known_label_lines(settings, store, p):
                console.print(escape(line), highlight=False, soft_wrap=True)
            for finding in found[p.id]:
                if finding not in shared:
                    show_finding(finding)
        for finding in shared:
            show_finding(finding)


def start_round(
    project: Project,
    rank_only: Annotated[bool, typer.Option("--rank", help="order the queue again without training")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask for a round now; a running worker takes it up within seconds.

    Example: ppal round 1 --rank
    """
    from ppal_backend.structures.round import KIND_NAMES

    with opened(as_json, project) as (_, store):
        record = store.rounds.request(project, "rank" if rank_only else "train", "asked for by ppal round")
        if as_json:
            print_json({"project": project, "round": record.number, "kind": record.kind, "state": record.state})
            return
        console.print(f"round {record.number} ({KIND_NAMES[record.kind]}) of project {project} is {record.state}")


def pin(
    project: Project,
    first: Annotated[list[int] | None, typer.Option("--next", help="task to label next; may be given again")] = None,
    last: Annotated[list[int] | None, typer.Option("--last", help="task to label last; may be given again")] = None,
    remove: Annotated[list[int] | None, typer.Option("--remove", help="task whose pin is taken back")] = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(help="'30% label:cat', '20% data:FIELD=VALUE' or '20% storage:PREFIX' of each next query set"),
    ] = None,
    remove_quota: Annotated[list[int] | None, typer.Option(help="number of a quota that is taken back")] = None,
    as_json: AsJson = False,
) -> None:
    """Steer the queue: tasks in front of it or at its end, and quotas; without options, list what is asked of it.

    It takes effect with a ranking, which is asked for, and not only with the next training.

    Example: ppal pin 1 --next 12 --next 7 --last 30
    """
    from ppal_backend.operations import steering

    with opened(as_json, project) as (settings, store):
        store.projects.get(project)
        done = [steering.add_quota(settings, store, project, text) for text in quota or ()]
        done += [steering.remove_quota(store, project, number) for number in remove_quota or ()]
        done += [steering.unpin(store, project, remove)] if remove else []
        done += [steering.pin(store, project, first, "first")] if first else []
        done += [steering.pin(store, project, last, "last")] if last else []
        asked = steering.listing(store, project)
        if as_json:
            print_json({**asked, "done": [asdict(one) for one in done]})
            return
        for one in done:
            console.print(escape(one.text), highlight=False, soft_wrap=True)
        for name, ids in (("next", asked["first"]), ("last", asked["last"])):
            if ids:
                console.print(f"{name}: {', '.join(map(str, ids))}", highlight=False, soft_wrap=True)
        for one in asked["quotas"]:
            console.print(f"quota {one['id']}: {escape(one['text'])}", highlight=False, soft_wrap=True)
        if not any((asked["first"], asked["last"], asked["quotas"])):
            console.print("nothing is asked of the queue")


def cancel(project: Project, as_json: AsJson = False) -> None:
    """Stop a project's rounds for good; the next training uses the same annotations and those to come.

    Example: ppal cancel 1
    """
    from ppal_backend.operations import control

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
    from ppal_backend.operations import control

    with opened(as_json, project) as (_, store):
        changed = control.pause(store, project)
        _report(project, True, changed, f"project {project} is {'now' if changed else 'already'} paused", as_json)


def resume(project: Project, as_json: AsJson = False) -> None:
    """Let a paused project's rounds go on from where they were.

    Example: ppal resume 1
    """
    from ppal_backend.operations import control

    with opened(as_json, project) as (_, store):
        changed = control.resume(store, project)
        _report(project, False, changed, f"project {project} {'goes on' if changed else 'was not paused'}", as_json)


def _local(stored: datetime) -> str:
    """A stored time, which is UTC without a zone, as the clock of the person who asks shows it."""
    return f"{stored.replace(tzinfo=UTC).astimezone():%Y-%m-%d %H:%M}"


def _report(project: int, paused: bool, changed: bool, text: str, as_json: bool) -> None:
    if as_json:
        print_json({"project": project, "paused": paused, "changed": changed})
        return
    console.print(text)


def versions(project: Project, as_json: AsJson = False) -> None:
    """The versions of a project: which is active, how good each is, which can be gone back to.

    Example: ppal versions 1
    """
    from ppal_backend.operations.pruning import move_lost_away
    from ppal_backend.rounds.folder import Rounds

    with opened(as_json, project) as (settings, store):
        key, found = store.projects.get(project).key, store.versions.of_project(project)
        move_lost_away(settings, store, project)
        kept = Rounds(settings).with_queue(key, project, {v.round_number for v in found})
        rows = [{**asdict(v), "files": v.round_number in kept} for v in found]
        if as_json:
            print_json(rows)
            return
        table = folding_table("version", "round", "published", "detector", "mAP", "active", "files", typed=("version",))
        for row in rows:
            table.add_row(row["version"], str(row["round_number"]), _local(row["created_at"]),
                          row["detector"] or "none", Quality.of(row["metrics"]).figure,
                          "yes" if row["active"] else "", "kept" if row["files"] else "removed")  # fmt: skip
        console.print(table)


def rollback(
    project: Project,
    version: Annotated[str, typer.Argument(help="as ppal versions lists it")],
    as_json: AsJson = False,
) -> None:
    """Make an earlier version's queue, predictions and model the active ones again.

    Example: ppal rollback 1 ppal-r2-1c9e5f
    """
    from ppal_backend.label_studio.source import open_client
    from ppal_backend.operations import control

    with (
        opened(as_json, project) as (settings, store),
        open_client(settings, store.projects.get(project).url) as client,
    ):
        with waiting(f"going back to {version}"):
            done = control.roll_back(settings, store, client, project, version)
        still_open = store.rounds.is_open(project)
        if as_json:
            print_json({"project": project, **asdict(done), "open_round": still_open})
            return
        how = f"published again as {done.version}" if done.published_again else "active again"
        console.print(f"version {version} is {how}, {done.predictions} tasks", highlight=False)
        if still_open:
            console.print(f"an open round will publish a newer one; ppal cancel {project} stops it", highlight=False)


def prune(
    project: Annotated[int | None, typer.Argument(help="Label Studio project id; all without one")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only tell what would be removed")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove files of old versions and what was moved away before them (PPAL_KEEP_ARTIFACTS), and fetched images beyond
    PPAL_IMAGE_CACHE_GIB.

    Never those of an active version or of an open round. With a project, its versions' files alone.

    Example: ppal prune 1 --dry-run
    """
    from ppal_backend.operations.pruning import prune_images, prune_project

    with opened(as_json, project) as (settings, store):
        projects = store.projects.all() if project is None else [store.projects.get(project)]
        rows: list[dict[str, Any]] = [
            {"project": p.id, "round": item.round_number, "bytes": item.size_bytes, "replaced": item.is_replaced}
            for p in projects
            for item in prune_project(settings, store, p.id, dry_run)
        ]
        images = prune_images(settings, store, dry_run) if project is None else None
        total = sum(row["bytes"] for row in rows) + (0 if images is None else images.bytes)
        if as_json:
            told = None if images is None else asdict(images)
            print_json({"dry_run": dry_run, "rounds": rows, "images": told, "bytes": total})
            return
        for row in rows:
            what = f" round {row['round']}" if row["round"] is not None else ""
            moved = " (moved away: the state does not know it)" if row["replaced"] else ""
            console.print(f"project {row['project']}{what}{moved}: {row['bytes'] / 2**20:.1f} MiB", soft_wrap=True)
        if images is not None:
            left = images.bytes_left / 2**30
            console.print(f"fetched images: {images.bytes / 2**20:.1f} MiB of {images.images}, {left:.2f} GiB stay")
        console.print(f"{'would free' if dry_run else 'freed'} {total / 2**20:.1f} MiB")


def backup(
    file: Annotated[Path, typer.Argument(help="tar file to write; must not exist")], as_json: AsJson = False
) -> None:
    """Back up the state and what the active versions need, with your own detectors; service and worker may go on.

    Example: ppal backup ppal-monday.tar
    """
    from ppal_backend.operations.backup import back_up

    with opened(as_json) as (settings, store):
        with progress_bar("backup") as told:
            manifest = back_up(settings, store, file, told)
        files, size, whole = len(manifest["sha256"]), file.stat().st_size, manifest["database"] is not None
        if as_json:
            told_too = {name: manifest[name] for name in ("own_zoo", "left_out")}
            print_json({"file": str(file), "files": files, "bytes": size, "with_database": whole, **told_too})
            return
        console.print(f"{file}: {files} files, {size / 2**20:.1f} MiB", soft_wrap=True)
        if zoo := manifest["own_zoo"]:
            mine = f"{zoo['files']} of them, {zoo['bytes'] / 2**20:.1f} MiB"
            console.print(f"your own detectors: {mine}", soft_wrap=True, highlight=False)
        if not whole:
            console.print("the state database is no SQLite: back it up with pg_dump as well", highlight=False)


def restore(
    file: Annotated[Path, typer.Argument(help="tar file that ppal backup wrote")],
    force: Annotated[bool, typer.Option("--force", help="move what is in the data folder aside")] = False,
    as_json: AsJson = False,
) -> None:
    """Restore a backup into the data folder. Stop service and worker first.

    Example: ppal restore ppal-monday.tar --force
    """
    from ppal_backend.operations.backup import restore as run

    with errors_in_one_line(as_json):
        settings = settings_and_logging()
        with progress_bar("restore") as told:
            manifest = run(settings, file, force, told)
        files, whole = len(manifest["sha256"]), manifest["database"] is not None
        if as_json:
            made = manifest["created_at"]
            print_json({"file": str(file), "files": files, "created_at": made, "with_database": whole})
            return
        console.print(f"restored {files} files of {manifest['created_at']}", highlight=False)
        if not whole:
            console.print("the state database was not in it: restore it with pg_restore or psql", highlight=False)


def second_opinion(
    project: Project,
    tasks: Annotated[int, typer.Option("--tasks", min=1, max=1000, help="how many tasks to serve once more")] = 5,
    take_back: Annotated[bool, typer.Option("--take-back", help="take those that wait out of the queue again")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve labelled tasks that measure the detector to another person too, to see how far people agree.

    Example: ppal second-opinion 1 --tasks 10
    """
    from ppal_backend.label_studio.source import open_client
    from ppal_backend.operations import second_opinions

    with opened(as_json, project) as (settings, store):
        record = store.projects.get(project)
        with open_client(settings, record.url, record.hostname) as client:
            if take_back:
                found = second_opinions.take_back(client, store, project)
            else:
                found = second_opinions.serve_again(client, store, project, tasks)
        if as_json:
            print_json({"project": project, "tasks": found, "taken_back": take_back})
            return
        what = "taken out of the queue" if take_back else "served to whoever has not annotated them, in front"
        listed = f": {', '.join(map(str, found))}" if found else ""
        console.print(f"{count(len(found), 'task')} {what}{listed}", highlight=False, soft_wrap=True)


COMMANDS = (status, pin, cancel, pause, resume, versions, rollback, prune, backup, restore, second_opinion)
