"""``ppal …``: thin commands, no logic."""

from __future__ import annotations

import typer

from ppal_backend.commands import doctor, export, operations, running, simulation
from ppal_backend.commands.shared import EXIT_CODES
from ppal_backend.commands.zoo import zoo

app = typer.Typer(
    help="Plug and Play Active Learning for Label Studio.",
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
    no_args_is_help=True,
    add_completion=False,
)
for command in (
    *running.COMMANDS,
    *doctor.COMMANDS,
    *operations.COMMANDS,
    *export.COMMANDS,
    *simulation.COMMANDS,
):
    app.command(command.__name__.replace("_", "-"))(command)
app.command("round")(operations.start_round)
app.add_typer(zoo, name="zoo")


if __name__ == "__main__":
    app()
