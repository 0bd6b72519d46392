"""``ppal …``: thin commands, no logic."""

from __future__ import annotations

import typer

from ppal_backend.commands import demo, export, operations, rounds, running, simulation
from ppal_backend.commands.doctor import connect, doctor
from ppal_backend.commands.export_model import export_model
from ppal_backend.commands.settings import settings
from ppal_backend.commands.shared import EXIT_CODES
from ppal_backend.commands.zoo import zoo

app = typer.Typer(
    help="Plug and Play Active Learning for Label Studio.",
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
    no_args_is_help=True,
    add_completion=False,
)
for command in (
    *demo.COMMANDS,
    *running.COMMANDS,
    doctor,
    connect,
    settings,
    *rounds.COMMANDS,
    *operations.COMMANDS,
    *export.COMMANDS,
    export_model,
    *simulation.COMMANDS,
):
    app.command(command.__name__.replace("_", "-"))(command)
app.command("round")(rounds.start_round)
app.add_typer(zoo, name="zoo")


if __name__ == "__main__":
    app()
