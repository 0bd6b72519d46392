"""``ppal bench …``: each benchmark in a process of its own, which prints its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated, Any

import typer

from ppal_backend.commands.shared import AsJson, print_json

bench = typer.Typer(help="Benchmarks; docs/benchmarks.md tells what they measure.", no_args_is_help=True)

OTHERS = ("acquisition", "detector", "dashboard", "load")
Quick = Annotated[bool, typer.Option("--quick", help="small sizes, to see whether it runs")]


@bench.command("acquisition")
def acquisition(as_json: AsJson = False, quick: Quick = False) -> None:
    """CCMS, selection and whole queries over pool sizes.

    Example: ppal bench acquisition --quick
    """
    _run("acquisition", *_options(as_json, quick))


@bench.command("service")
def service(as_json: AsJson = False) -> None:
    """Latency of /webhook and /health, first idle, then while a detector is in training.

    Example: ppal bench service
    """
    if as_json:
        print_json(_service())
        return
    _run("service")
    _run("service", "--load")


@bench.command("detector")
def detector(as_json: AsJson = False, quick: Quick = False) -> None:
    """What the difficulty hook adds to a training step, and the one pass to plain inference.

    Example: ppal bench detector --quick
    """
    _run("detector", *_options(as_json, quick))


@bench.command("dashboard")
def dashboard(as_json: AsJson = False, quick: Quick = False) -> None:
    """How fast every page opens with 20,000 tasks and 50 rounds.

    Example: ppal bench dashboard --quick
    """
    _run("dashboard", *_options(as_json, quick))


@bench.command("load")
def load(as_json: AsJson = False, quick: Quick = False) -> None:
    """Webhooks and predictions while a round trains, and a project of 20,000 tasks, on a real Label Studio.

    Example: ppal bench load --quick
    """
    _run("load", *_options(as_json, quick))


@bench.command("gpu")
def gpu(
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option("--quick", help="sizes of seconds, no round")] = False,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, or cpu to try the measurement itself")] = "cuda",
) -> None:
    """Training, inference, CCMS and a round on a GPU beside plain mmdet; docs/gpu.md.

    Example: ppal bench gpu --device cuda:0 --json
    """
    _run("gpu", "--device", device, *_options(as_json, quick))


@bench.command("all")
def all_(as_json: AsJson = False) -> None:
    """Every benchmark that needs no GPU, one after the other.

    Example: ppal bench all --json
    """
    if as_json:
        print_json({"service": _service(), **{name: _figures(name, "--json") for name in OTHERS}})
        return
    service()
    acquisition()
    detector()
    dashboard()
    load()


def _options(as_json: bool, quick: bool) -> list[str]:
    return [*(["--json"] if as_json else []), *(["--quick"] if quick else [])]


def _service() -> dict[str, Any]:
    return {"idle": _figures("service"), "training": _figures("service", "--load")}


def _run(name: str, *options: str, read: bool = False) -> str:
    command = [sys.executable, "-m", f"ppal_backend.benchmarks.{name}", *options]
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE if read else None)
    if done.returncode:
        raise typer.Exit(done.returncode)
    return done.stdout or ""


def _figures(name: str, *options: str) -> Any:
    return json.loads(_run(name, *options, read=True))
