"""``ppal settings``: what is in force and where each value came from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ppal_backend.commands.shared import AsJson, console, errors_in_one_line, print_json, settings_and_logging, state_of
from ppal_backend.settings import config_file


def settings(
    project: Annotated[int | None, typer.Argument(help="project id, for what its extra parameters say")] = None,
    as_json: AsJson = False,
) -> None:
    """Settings in force, and where each came from: environment, ppal.toml, extra parameters or default.

    Secrets are told as set or not set.

    Example: ppal settings 1 --json
    """
    from ppal_backend.service.dashboard.origins import operator_settings, project_options

    with errors_in_one_line(as_json):
        found = settings_and_logging()
        overrides = {}
        if project is not None:
            with state_of(found, project) as store:
                overrides = store.projects.get(project).options
        parts = {"operator": operator_settings(found), "projects": project_options(found, overrides)}
        file = config_file()
        if as_json:
            print_json({"file": file, **{name: [asdict(row) for row in rows] for name, rows in parts.items()}})
            return
        console.print(f"settings file: {file or 'none'}", highlight=False, soft_wrap=True)
        whose = "every project, unless it says otherwise" if project is None else f"project {project}"
        for title, rows in (("this backend", parts["operator"]), (whose, parts["projects"])):
            table = Table("name", "value", "from", "", title=title)
            for row in rows:
                table.add_row(row.name, escape(row.value), row.origin, row.text)
            console.print(table)
