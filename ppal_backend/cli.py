"""``ppal …``: thin commands, no logic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ppal_backend.commands.doctor import connect, doctor
from ppal_backend.commands.export import export
from ppal_backend.commands.operations import COMMANDS
from ppal_backend.commands.shared import AsJson, console, errors_in_one_line, settings_and_logging
from ppal_backend.commands.simulation import rank, report, simulate
from ppal_backend.commands.zoo import zoo
from ppal_backend.logs import configure_logging

app = typer.Typer(help="Plug and Play Active Learning for Label Studio.", no_args_is_help=True, add_completion=False)
bench = typer.Typer(help="Benchmarks; docs/benchmarks.md tells what they measure.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(zoo, name="zoo")
app.command()(simulate)
app.command()(report)
app.command()(rank)
for operation in COMMANDS:
    app.command()(operation)
app.command()(doctor)
app.command()(connect)
app.command()(export)


@app.command()
def demo(
    exit_: Annotated[bool, typer.Option("--exit", help="stop after the second round")] = False,
    coco: Annotated[Path | None, typer.Option(help="your own data: a COCO file …")] = None,
    images: Annotated[Path | None, typer.Option(help="… and the folder its images lie in")] = None,
    out: Annotated[Path, typer.Option(help="where the demo keeps its files")] = Path("demo-run"),
) -> None:
    """Start Label Studio and the backend, label with a scripted annotator, run two rounds."""
    from ppal_backend.demo.run import DemoOptions, run_demo

    with errors_in_one_line():
        configure_logging("WARNING")
        run_demo(DemoOptions(out=out, stay=not exit_, coco=coco, images_dir=images), console)


@app.command("demo-data")
def demo_data(
    out: Annotated[Path, typer.Argument(help="folder to write to")],
    images: Annotated[int, typer.Option(min=1, help="how many images")] = 360,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    glyphs: Annotated[str, typer.Option(help="family of glyphs: demo, pretrain or second")] = "demo",
) -> None:
    """Generate the demo's detection data set: COCO and images."""
    from ppal_backend.demo.scenes import generate

    with errors_in_one_line():
        console.print(str(generate(out, images=images, seed=seed, glyphs=glyphs)))


Gpus = Annotated[int | None, typer.Option(min=1, help="GPUs that train one detector together (PPAL_GPUS)")]


@app.command()
def up(gpus: Gpus = None) -> None:
    """Run the service and the worker together, until Ctrl-C."""
    from ppal_backend.launcher import up as run_up

    with errors_in_one_line():
        _for_children(gpus)
        settings_and_logging()
        run_up()


@app.command()
def serve() -> None:
    """Run the HTTP service alone."""
    from ppal_backend.launcher import serve as run_serve

    with errors_in_one_line():
        settings_and_logging()
        run_serve()


@app.command()
def worker(
    rounds: Annotated[int, typer.Option(min=1, help="projects that may run a round at the same time")] = 1,
    gpus: Gpus = None,
) -> None:
    """Run the worker alone: it handles events and runs rounds."""
    from ppal_backend.worker import run_worker

    with errors_in_one_line():
        _for_children(gpus)
        run_worker(settings_and_logging(), parallel_rounds=rounds)


@app.command("round")
def start_round(
    project: Annotated[int, typer.Argument(help="Label Studio project id")],
    rank_only: Annotated[bool, typer.Option("--rank", help="order the queue again without training")] = False,
) -> None:
    """Ask for a round now; a running worker takes it up within seconds."""
    from ppal_backend.store import open_store

    with errors_in_one_line():
        store = open_store(settings_and_logging())
        record = store.rounds.request(project, "rank" if rank_only else "train", "asked for by ppal round")
        console.print(f"round {record.number} ({record.kind}) of project {project} is {record.state}")


@app.command()
def status(
    project: Annotated[int | None, typer.Argument(help="Label Studio project id; all without one")] = None,
    as_json: AsJson = False,
) -> None:
    """Rounds and versions of the connected projects."""
    from ppal_backend.store import open_store

    with errors_in_one_line():
        store = open_store(settings_and_logging())
        projects = store.projects.all() if project is None else [store.projects.get(project)]
        if as_json:
            shown = [
                {
                    "project": p.id,
                    "problems": p.problems,
                    "new_annotations": store.ledger.new_count(p.id),
                    "rounds": [asdict(r) for r in store.rounds.of_project(p.id)],
                    "versions": [asdict(v) for v in store.versions.of_project(p.id)],
                }
                for p in projects
            ]
            sys.stdout.write(json.dumps(shown, default=str, indent=1) + "\n")
            return
        for p in projects:
            title = f"project {p.id}: {store.ledger.new_count(p.id)} new annotations"
            table = Table("round", "kind", "state", "step", "mAP", "why", title=title)
            for r in store.rounds.of_project(p.id):
                table.add_row(
                    str(r.number), r.kind, r.state, r.step, _figure(r.metrics.get("map")), r.error or r.reason
                )
            console.print(table)
            for text in p.problems.values():
                console.print(f"[bold red]problem:[/] {text}", highlight=False)


@bench.command("acquisition")
def bench_acquisition(as_json: AsJson = False, quick: bool = False) -> None:
    """CCMS, selection and whole queries over pool sizes."""
    _benchmark("acquisition", *(["--json"] if as_json else []), *(["--quick"] if quick else []))


@bench.command("service")
def bench_service() -> None:
    """Latency of /webhook and /health, first idle, then while a detector is in training."""
    _benchmark("service")
    _benchmark("service", "--load")


@bench.command("detector")
def bench_detector(as_json: AsJson = False, quick: bool = False) -> None:
    """What the difficulty hook adds to a training step, and the one pass to plain inference."""
    _benchmark("detector", *(["--json"] if as_json else []), *(["--quick"] if quick else []))


@bench.command("gpu")
def bench_gpu(
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option("--quick", help="sizes of seconds, no round")] = False,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, or cpu to try the measurement itself")] = "cuda",
) -> None:
    """Training, inference, CCMS and a round on a GPU beside plain mmdet; docs/gpu.md."""
    _benchmark("gpu", "--device", device, *(["--json"] if as_json else []), *(["--quick"] if quick else []))


@bench.command("all")
def bench_all() -> None:
    """Every benchmark that needs no GPU, one after the other."""
    bench_service()
    bench_acquisition()
    bench_detector()


def _for_children(gpus: int | None) -> None:
    """Rounds run in processes of their own, which read the environment."""
    if gpus is not None:
        os.environ["PPAL_GPUS"] = str(gpus)


def _benchmark(name: str, *options: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"ppal_backend.benchmarks.{name}", *options], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    app()
