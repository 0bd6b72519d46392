"""``ppal simulate``, ``ppal report`` and ``ppal rank``: active learning without Label Studio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppal_backend.commands.shared import (
    AsJson,
    console,
    errors_in_one_line,
    print_json,
    progress_bar,
    stderr,
    waiting,
)
from ppal_backend.errors import SettingsError
from ppal_backend.files import read_json
from ppal_backend.logs import configure_logging


def simulate(
    out: Annotated[Path, typer.Option(help="folder of the simulation; an unfinished one is gone on with")],
    preset: Annotated[str | None, typer.Option(help="aquarium, emoji-tiny, smoke, voc-retinanet …")] = None,
    data: Annotated[Path | None, typer.Option(help="COCO file of the pool, or the folder of VOC or COCO")] = None,
    images: Annotated[Path | None, typer.Option(help="folder of the pool's images")] = None,
    test: Annotated[Path | None, typer.Option(help="COCO file of the test images")] = None,
    test_images: Annotated[Path | None, typer.Option(help="folder of the test images")] = None,
    classes: Annotated[str | None, typer.Option(help="of a VOC folder with classes of its own: a,b,c")] = None,
    detector: Annotated[str | None, typer.Option(help="a name of ppal zoo")] = None,
    strategies: Annotated[str | None, typer.Option(help="ppal,random,ppal:delta=2,random:match=ppal … or JSON")] = None,
    start: Annotated[str | None, typer.Option(help="images labelled at the start: 75 or 5%")] = None,
    budget: Annotated[str | None, typer.Option(help="images labelled a round: 38 or 2.5%")] = None,
    rounds: Annotated[int | None, typer.Option(help="queries, after the start")] = None,
    seeds: Annotated[str | None, typer.Option(help="how many, or a list: 3 or 0,1,2")] = None,
    delta: Annotated[
        float | None, typer.Option(help="images that the next ones are chosen from: delta x budget")
    ] = None,
    max_iterations: Annotated[int | None, typer.Option(help="cap on the training")] = None,
    init_weights: Annotated[str | None, typer.Option(help="the zoo's weights or none: zoo or random")] = None,
    difficulty: Annotated[
        bool | None, typer.Option("--difficulty/--no-difficulty", help="whether to follow how hard classes are")
    ] = None,
    slices: Annotated[str | None, typer.Option(help="tiles for small objects: off, auto or their side in px")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    device: Annotated[list[str] | None, typer.Option(help="auto, cpu, cuda:0; several are shared out")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a process")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="keep checkpoints and detections")] = False,
    as_json: AsJson = False,
) -> None:
    """Replay active learning on data whose boxes are known, and report.

    Example: ppal simulate --preset smoke --out sim

    Example: ppal simulate --data pool.json --images photos --test test.json --strategies random,ppal --out sim
    """
    from ppal_backend.simulation.report import SUMMARY
    from ppal_backend.simulation.run import SimulationOptions
    from ppal_backend.simulation.run import simulate as run

    with errors_in_one_line(as_json):
        configure_logging("WARNING")
        options = SimulationOptions(
            out,
            preset,
            {"data": data, "images": images, "test": test, "test_images": test_images, "classes": classes},
            {
                "detector": detector,
                "strategies": strategies,
                "start": start,
                "budget": budget,
                "rounds": rounds,
                "seeds": seeds,
                "delta": delta,
                "max_iterations": max_iterations,
                "init_weights": init_weights,
                "difficulty": difficulty,
                "slices": slices,
                "threads": threads,
            },
            jobs,
            tuple(device or ("auto",)),
            keep,
        )
        path = run(options, stderr if as_json else console)
        if as_json:
            print_json({"report": str(path), "summary": read_json(path.with_name(SUMMARY))})
            return
        console.print(str(path), soft_wrap=True, highlight=False)


def report(
    folders: Annotated[list[Path], typer.Argument(help="folders of simulations, finished or not")],
    out: Annotated[Path | None, typer.Option(help="where to write; FOLDER/report without")] = None,
    as_json: AsJson = False,
) -> None:
    """Write Markdown, CSV, plots and summary.json of a simulation, or compare the detectors of several.

    Example: ppal report sim

    Example: ppal report sim-retinanet sim-fcos --out detectors
    """
    from ppal_backend.simulation.report import SUMMARY, write_detectors, write_report

    with errors_in_one_line(as_json):
        if len(folders) > 1 and out is None:
            raise SettingsError("expected --out with several simulations, got none; name a folder for their comparison")
        with waiting("drawing"):
            path = write_report(folders[0], out) if len(folders) == 1 else write_detectors(folders, Path(out or "."))
        if as_json:
            summary = read_json(path.with_name(SUMMARY)) if len(folders) == 1 else None
            print_json({"report": str(path), "summary": summary})
            return
        console.print(str(path), soft_wrap=True, highlight=False)


def rank(
    data: Annotated[Path, typer.Option(help="COCO file of the pool")],
    checkpoint: Annotated[Path, typer.Option(help="trained detector: ours, or an mmdetection checkpoint")],
    budget: Annotated[int, typer.Option(min=1, help="images to choose")],
    out: Annotated[Path, typer.Option(help="folder for ranking.csv and ranking.json")],
    images: Annotated[Path | None, typer.Option(help="folder of the images")] = None,
    strategy: Annotated[str, typer.Option(help="with options: ppal:delta=2")] = "ppal",
    labelled: Annotated[Path | None, typer.Option(help="COCO file of images labelled already")] = None,
    detector: Annotated[str | None, typer.Option(help="name in the zoo, if the checkpoint does not say")] = None,
    config: Annotated[Path | None, typer.Option(help="mmdetection config, for detectors outside the zoo")] = None,
    classes: Annotated[str | None, typer.Option(help="labels in order, where the checkpoint has none: cat,dog")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="of strategies that draw")] = 0,
    as_json: AsJson = False,
) -> None:
    """Order a pool of images for labeling, without Label Studio.

    Example: ppal rank --data pool.json --images photos --checkpoint final.pth --budget 50 --out ranking
    """
    from ppal_backend.simulation.rank import JSON, RankOptions
    from ppal_backend.simulation.rank import rank as run

    with errors_in_one_line(as_json):
        configure_logging("WARNING")
        labels = tuple(part.strip() for part in classes.split(",")) if classes else ()
        options = RankOptions(
            data, checkpoint, budget, out, images, strategy, labelled, detector, config, labels, device, seed
        )
        with progress_bar("ranking") as told:
            path = run(options, told)
        if as_json:
            found = read_json(path.with_name(JSON))
            chosen = [row["image_id"] for row in found["queue"] if row["chosen"]]
            print_json({"csv": str(path), "json": str(path.with_name(JSON)), "strategy": found["strategy"],
                        "images": len(found["queue"]), "chosen": chosen})  # fmt: skip
            return
        console.print(str(path), soft_wrap=True, highlight=False)


COMMANDS = (simulate, report, rank)
