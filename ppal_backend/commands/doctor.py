"""``ppal doctor``, ``connect`` and ``settings``: whether all is set up as it should be, and how it is."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from ppal_backend.commands.shared import (
    FAILED,
    AsJson,
    console,
    errors_in_one_line,
    folding_table,
    print_json,
    settings_and_logging,
    show_finding,
    state_of,
    waiting,
)
from ppal_backend.errors import StateError, StoreUnavailable
from ppal_backend.logs import configure_logging
from ppal_backend.settings import Settings, config_file, load_settings


def doctor(as_json: AsJson = False) -> None:
    """Check Label Studio, the connected projects and this machine; exit code 1 when something failed.

    Example: ppal doctor
    """
    from ppal_backend.doctor.run import cause_first, diagnose
    from ppal_backend.store import Database, Store, find_store

    with errors_in_one_line(as_json):
        settings = _settings()
        found = []
        try:
            store = find_store(settings)
        except (StateError, StoreUnavailable):  # which is one of the findings
            store = Store(Database("sqlite://"))
        with closing(store), waiting("checking"):
            found = list(diagnose(settings, store))
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        for finding in cause_first(found):
            show_finding(finding)
    if any(finding.state == "failed" for finding in found):
        raise typer.Exit(FAILED)


def connect(
    url: Annotated[str, typer.Argument(help="Label Studio's address, such as http://localhost:8080")],
    project: Annotated[int, typer.Option(help="project id: the number in its address")],
    backend: Annotated[str, typer.Option(help="the backend as Label Studio reaches it; PPAL_PUBLIC_URL without")] = "",
    extra_params: Annotated[str, typer.Option(help="the project's own options: '{\"budget\": 100}'")] = "",
    as_json: AsJson = False,
) -> None:
    """Connect a project: the model connection, its webhook with credentials, and the sampling.

    Does what the dialog under Settings ▸ Model does, and what that leaves out. The backend must run.

    Example: ppal connect http://localhost:8080 --project 1 --extra-params '{"budget": 100}'
    """
    from ppal_backend.doctor.connecting import connect_project
    from ppal_backend.label_studio.source import open_client

    with errors_in_one_line(as_json), waiting("connecting"):
        settings = _settings().model_copy(update={"label_studio_url": url.rstrip("/")})
        address = backend or settings.public_url or f"http://localhost:{settings.port}"
        with open_client(settings) as client:
            steps = connect_project(client, settings, project, address, extra_params)
    if as_json:
        print_json([asdict(step) for step in steps])
        return
    for step in steps:
        console.print(f"{step.what}: [bold]{step.done}[/] {escape(step.detail)}", highlight=False, soft_wrap=True)
    console.print(f"Project {project} is connected. Press Label All Tasks in Label Studio.", highlight=False)


def settings(
    project: Annotated[int | None, typer.Argument(help="project id, for what its extra parameters say")] = None,
    as_json: AsJson = False,
) -> None:
    """Settings in force, and where each came from: environment, ppal.toml, extra parameters or default.

    Secrets are told as set or not set.

    Example: ppal settings 1 --json
    """
    from ppal_backend.operations.detectors import in_force
    from ppal_backend.service.dashboard.origins import operator_settings, project_options

    with errors_in_one_line(as_json):
        found = settings_and_logging()
        overrides, detector = {}, None
        if project is not None:
            with state_of(found, project) as store:
                record = store.projects.get(project)
                overrides, detector = record.options, in_force(found, record)
        parts = {"operator": operator_settings(found), "projects": project_options(found, overrides, detector)}
        file = config_file()
        if as_json:
            print_json({"file": file, **{name: [asdict(row) for row in rows] for name, rows in parts.items()}})
            return
        console.print(f"settings file: {file or 'none'}", highlight=False, soft_wrap=True)
        whose = "every project, unless it says otherwise" if project is None else f"project {project}"
        for title, rows in (("this backend", parts["operator"]), (whose, parts["projects"])):
            table = folding_table("name", "value", "from", "", title=title, typed=("name",))
            for row in rows:
                table.add_row(row.name.replace(", ", "\n"), escape(row.value), row.origin, row.text)
            console.print(table)


def _settings() -> Settings:
    """The settings; of the log only errors, since what is wrong is told as a finding."""
    settings = load_settings()
    configure_logging("ERROR", settings.log_format, settings.secrets)
    return settings


COMMANDS = (doctor, connect, settings)
