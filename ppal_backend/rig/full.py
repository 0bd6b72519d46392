"""``ppal up --profile full``: Label Studio on PostgreSQL, Redis, the service and two workers, for testing.

The folder keeps data, logs, ports and passwords, so that the next start finds everything as it was left.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from ppal_backend.errors import StateError
from ppal_backend.files import read_json
from ppal_backend.launcher import up
from ppal_backend.rig.label_studio_server import LabelStudioServer
from ppal_backend.rig.servers import PostgresServer, RedisServer

LABEL_STUDIO = Path(".venv-label-studio/bin/label-studio")
KEPT, ENVIRONMENT = "topology.json", "backend.env"
USER = "admin@example.com"
WORKERS = 2
_LABEL_STUDIO_START_S = 900.0  # the first time it makes its tables


@dataclass(frozen=True)
class Kept:
    """Ports and passwords, chosen at the first start."""

    postgres_port: int
    redis_port: int
    label_studio_port: int
    service_port: int
    postgres_password: str
    label_studio_db_password: str
    ppal_db_password: str
    redis_password: str
    label_studio_password: str
    basic_auth_pass: str


def run_full(folder: Path, console: Console, label_studio: Path = LABEL_STUDIO) -> None:
    """Start everything, and stop everything at Ctrl-C or SIGTERM.

    Args:
        folder: for data, logs and passwords; one that was used before is gone on with.
        console: where to say what is being done.
        label_studio: the ``label-studio`` command.

    Raises:
        SettingsError: PostgreSQL or Redis is not installed.
        StateError: the folder is in use, or a server did not start.
        LabelStudioUnavailable: Label Studio is not installed, or did not start.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # until everything runs
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), ExitStack() as running:
        kept = keep(folder)
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        with console.status("starting PostgreSQL and Redis"):
            postgres = PostgresServer(
                folder / "postgres", kept.postgres_port, kept.postgres_password, logs / "postgres.log"
            )
            redis = RedisServer(folder / "redis", kept.redis_port, kept.redis_password, logs / "redis.log")
            for server in (postgres, redis):
                running.callback(server.stop)
                server.start()
            postgres.ensure_database("labelstudio", "labelstudio", kept.label_studio_db_password)
            state_url = postgres.ensure_database("ppal", "ppal", kept.ppal_db_password)
        with console.status("starting Label Studio; the first time takes a minute or more") as status:
            studio = LabelStudioServer(
                label_studio, folder / "label-studio", port=kept.label_studio_port, username=USER,
                password=kept.label_studio_password, start_timeout_s=_LABEL_STUDIO_START_S,
                environment=_database_of_label_studio(kept),
                on_wait=lambda seconds: status.update(f"starting Label Studio: {seconds:.0f} s"),
            )  # fmt: skip
            running.enter_context(studio)
        environment = _backend(folder, kept, studio, state_url, redis.url)
        write_secret(
            folder / ENVIRONMENT, "".join(f"{name}={shlex.quote(value)}\n" for name, value in environment.items())
        )
        _print_addresses(console, folder, studio, environment)
        up(environment, workers=WORKERS)
        console.print("stopping")


def keep(folder: Path) -> Kept:
    """The ports and passwords of a folder; new ones, readable for their owner alone, where there are none.

    Raises:
        StateError: the file cannot be read.
    """
    path = folder / KEPT
    if not path.is_file():
        names = [field.name for field in fields(Kept)]
        ports = iter(_free_ports(len(names)))
        values = {name: next(ports) if name.endswith("_port") else secrets.token_hex(16) for name in names}
        write_secret(path, json.dumps(values, indent=1))
    try:
        return Kept(**read_json(path))
    except (ValueError, TypeError) as error:
        raise StateError(f"expected ports and passwords in {path}, got {error}; take another folder") from None


def write_secret(path: Path, text: str) -> None:
    """Write a file that its owner alone may read, atomically."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).replace(path)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in sockets]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                f"expected {folder} to be free, got one in use by another ppal up; stop it or name another folder"
            ) from None
        yield


def _database_of_label_studio(kept: Kept) -> dict[str, Any]:
    return {"DJANGO_DB": "default", "POSTGRE_NAME": "labelstudio", "POSTGRE_USER": "labelstudio",
            "POSTGRE_PASSWORD": kept.label_studio_db_password, "POSTGRE_HOST": "127.0.0.1",
            "POSTGRE_PORT": str(kept.postgres_port)}  # fmt: skip


def _backend(folder: Path, kept: Kept, studio: LabelStudioServer, state_url: str, queue_url: str) -> dict[str, str]:
    return {
        "LABEL_STUDIO_URL": studio.url,
        "LABEL_STUDIO_API_KEY": studio.token,
        "MODEL_DIR": str(folder / "data"),
        "BASIC_AUTH_USER": "label-studio",
        "BASIC_AUTH_PASS": kept.basic_auth_pass,
        "PPAL_HOST": "127.0.0.1",
        "PPAL_PORT": str(kept.service_port),
        "PPAL_PUBLIC_URL": f"http://127.0.0.1:{kept.service_port}",
        "PPAL_DATABASE_URL": state_url,
        "PPAL_QUEUE_URL": queue_url,
    }


def _print_addresses(console: Console, folder: Path, studio: LabelStudioServer, environment: Mapping[str, str]) -> None:
    lines = (
        f"Label Studio  {studio.url}   login {USER}, password in {folder / KEPT} (label_studio_password)",
        f"backend       {environment['PPAL_PUBLIC_URL']}   dashboard at /ui, user label-studio, password as above "
        "(basic_auth_pass)",
        f"connect       set -a; . {shlex.quote(str(folder / ENVIRONMENT))}; set +a; "
        f"ppal connect {studio.url} --project 1",
        "Ctrl-C stops all of them; the next start goes on from here.",
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
