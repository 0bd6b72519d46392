"""``ppal demo`` and ``ppal demo-data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppal_backend.commands.shared import (
    AsJson,
    aside,
    console,
    errors_in_one_line,
    need_checkout,
    print_json,
    progress_bar,
)
from ppal_backend.files import read_json
from ppal_backend.logs import configure_logging
from ppal_backend.structures.progress import Progress


def demo(
    exit_: Annotated[bool, typer.Option("--exit", help="stop after the second round")] = False,
    coco: Annotated[Path | None, typer.Option(help="your own data: a COCO file …")] = None,
    images: Annotated[Path | None, typer.Option(help="… and the folder its images lie in")] = None,
    out: Annotated[Path, typer.Option(help="where the demo keeps its files")] = Path("demo-run"),
    as_json: AsJson = False,
) -> None:
    """Start Label Studio and the backend, label with a scripted annotator, run two rounds.

    With --json the figures of summary.json are printed at the end.

    Example: ppal demo --exit --out demo-run
    """
    with errors_in_one_line(as_json):
        need_checkout("ppal demo")
        from ppal_backend.demo.run import DemoOptions, run_demo

        configure_logging("WARNING")
        options = DemoOptions(out=out, stay=not exit_, coco=coco, images_dir=images)
        run_demo(options, aside if as_json else console, _evaluate)
        if as_json:
            print_json(read_json(out / "summary.json"))


def _evaluate(detector: str, checkpoint: Path, labels: tuple[str, ...], test: Path) -> float | None:
    from ppal_backend.detector.infer.evaluation import evaluate  # imports torch, which takes seconds

    return evaluate(detector, checkpoint, labels, test).map


def demo_data(
    out: Annotated[Path, typer.Argument(help="folder to write to")],
    images: Annotated[int, typer.Option(min=1, help="how many images")] = 360,
    seed: Annotated[int, typer.Option(min=0, help="another number makes other images")] = 0,
    glyphs: Annotated[str, typer.Option(help="family of glyphs: demo, pretrain or second")] = "demo",
    as_json: AsJson = False,
) -> None:
    """Generate the demo's detection data set: COCO and images.

    Example: ppal demo-data pool --images 100
    """
    from ppal_backend.synthetic.scenes import generate

    with errors_in_one_line(as_json):
        with progress_bar("generating") as told:
            path = generate(
                out, images=images, seed=seed, glyphs=glyphs,
                on_progress=lambda done, total: told(Progress("images", done, total)),
            )  # fmt: skip
        if as_json:
            print_json({"annotations": str(path), "images": images, "seed": seed, "glyphs": glyphs})
            return
        console.print(str(path), soft_wrap=True, highlight=False)


COMMANDS = (demo, demo_data)
