"""``ppal zoo …``: list, show, fetch and try the detectors of the model zoo, and add one's own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ppal_backend.commands.shared import (
    AsJson,
    console,
    errors_in_one_line,
    folding_table,
    print_json,
    progress_bar,
    settings_and_logging,
    waiting,
)

zoo = typer.Typer(help="The detectors of the model zoo.", no_args_is_help=True)
WIDE = 110
"""Columns of a terminal that has room for everything in ``ppal zoo list``."""
Name = Annotated[str, typer.Argument(help="a detector's name, as in ppal zoo list")]


@zoo.command("list")
def list_(as_json: AsJson = False) -> None:
    """Every detector, with its input size and what mmdetection publishes for it on COCO.

    Example: ppal zoo list
    """
    from ppal_backend.detector.zoo import load_zoo

    with errors_in_one_line(as_json):
        entries = load_zoo(settings_and_logging().model_zoo)
        if as_json:
            print_json({name: asdict(entry) for name, entry in entries.items()})
            return
        more = ("head", "input") if console.width >= WIDE else ()
        one_line = ("name", "COCO AP", "weights", *more)
        table = folding_table("name", "title", *more, "COCO AP", "weights", typed=one_line)
        for name, entry in entries.items():
            start = entry.weights.kind if entry.weights else "from scratch" if entry.from_scratch else "none"
            extra = (entry.head_family, _size(entry.input_size)) if more else ()
            table.add_row(name, entry.title, *extra, _ap(entry.coco_ap), start)
        console.print(table)
        if not more:
            console.print(f"head and input size: from {WIDE} columns on, or ppal zoo show NAME", highlight=False)


@zoo.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Everything the zoo knows of one detector.

    Example: ppal zoo show retinanet_r50_fpn
    """
    from ppal_backend.detector.zoo import find_entry

    with errors_in_one_line(as_json):
        entry = find_entry(name, settings_and_logging().model_zoo)
        if as_json:
            print_json(asdict(entry))
            return
        console.print(_two_columns(entry.name, _flat(asdict(entry))))


@zoo.command()
def fetch(
    name: Name,
    to: Annotated[Path | None, typer.Option(help="folder for the file; the usual one without it")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="a file that you have, instead of a download")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download a detector's initial weights and check them; a download that was cut off goes on.

    Where there is no network or no address, --from checks a file that you have and puts a copy in place.

    Example: ppal zoo fetch retinanet_r50_fpn
    """
    from ppal_backend.detector.zoo import find_entry
    from ppal_backend.detector.zoo.fetch import place_weights, vocabulary_file, weights_file

    with errors_in_one_line(as_json):
        settings = settings_and_logging()
        entry, to = find_entry(name, settings.model_zoo), to or settings.weights_dir
        if source is not None:
            path = place_weights(entry, source, to)
        else:
            with progress_bar(entry.name) as told:
                path = weights_file(entry, to, told)
            if entry.vocabulary is not None:
                vocabulary_file(entry, to)
        if as_json:
            print_json({"detector": entry.name, "weights": str(path)})
            return
        console.print(f"{entry.name}: {path}", soft_wrap=True, highlight=False)


@zoo.command()
def check(
    name: Name,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    no_difficulty: Annotated[
        bool, typer.Option("--no-difficulty", help="for heads whose training is not read")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="the detector's own batch and input size")] = False,
    as_json: AsJson = False,
) -> None:
    """Try a detector: build it, train two steps on generated images, run it over them as a pool.

    Example: ppal zoo check retinanet_tiny --device cpu
    """
    from ppal_backend.detector.zoo.check import check as run_check

    with errors_in_one_line(as_json):
        settings = settings_and_logging()
        with waiting(f"trying {name}"):
            report = run_check(
                name, device, settings.model_zoo, difficulty=not no_difficulty, full=full,
                weights_dir=settings.weights_dir,
            )  # fmt: skip
        if as_json:
            print_json(report.as_dict())
            return
        console.print(_two_columns(report.detector, report.as_dict()))


@zoo.command()
def add(
    config: Annotated[Path, typer.Argument(help="mmdetection config file; it is run as Python")],
    weights: Annotated[Path | None, typer.Option(help="checkpoint of the detector or of its backbone")] = None,
    name: Annotated[str | None, typer.Option(help="what projects call it; by the file's name without it")] = None,
    device: Annotated[str, typer.Option(help="where to try it: auto, cpu, cuda or cuda:N")] = "auto",
    no_difficulty: Annotated[
        bool, typer.Option("--no-difficulty", help="for heads whose training is not read")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Add a detector of your own: build it, put its weights in, try it, and keep a copy in your zoo.

    Example: ppal zoo add my_config.py --weights my.pth --name my_detector
    """
    from ppal_backend.detector.zoo.add import add as add_to_zoo

    with errors_in_one_line(as_json):
        settings = settings_and_logging()
        with waiting(f"trying {config.name}"):
            added = add_to_zoo(
                config, weights, settings.own_zoo, name=name, difficulty=not no_difficulty, device=device
            )
        if as_json:
            print_json(
                {
                    "entry": asdict(added.entry),
                    "tensors": added.tensors,
                    "report": added.report.as_dict(),
                    "remarks": list(added.remarks),
                }
            )
            return
        console.print(_two_columns(added.entry.name, added.report.as_dict()))
        start = "no weights: ask for random ones" if added.tensors is None else f"{added.tensors} tensors fit"
        console.print(
            f"added {added.entry.name} ({start}); its schedule is in {settings.own_zoo / 'zoo.toml'}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
        for remark in added.remarks:
            console.print(remark, highlight=False)
        if no_difficulty:
            console.print(f"projects with {added.entry.name} need difficulty: false", highlight=False)


def _two_columns(title: str, rows: dict[str, Any]) -> Table:
    table = Table("", "", title=title, show_header=False)
    for key, value in rows.items():
        table.add_row(key.replace("_", " "), f"{value:.1f}" if isinstance(value, float) else str(value))
    return table


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = f"{value:g}" if isinstance(value, float) else value
    return flat


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def _ap(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
