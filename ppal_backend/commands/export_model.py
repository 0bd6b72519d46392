"""``ppal export-model``: a trained detector as ONNX or TorchScript."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ppal_backend.commands.shared import (
    AsJson,
    console,
    errors_in_one_line,
    print_json,
    settings_and_logging,
    state_of,
    waiting,
)
from ppal_backend.errors import SettingsError, StateError
from ppal_backend.settings import Settings
from ppal_backend.structures.round import ModelRef


class ModelFormat(StrEnum):
    """A format of the exported model."""

    onnx = "onnx"
    torchscript = "torchscript"


def export_model(
    out: Annotated[Path, typer.Option(help="file to write; FILE.json beside it describes the model")],
    project: Annotated[int | None, typer.Argument(help="Label Studio project id: its active version's model")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="instead of a project: a trained detector's file")] = None,
    detector: Annotated[str | None, typer.Option(help="name in the zoo, if the checkpoint does not say")] = None,
    classes: Annotated[str | None, typer.Option(help="labels in order, where the checkpoint has none: cat,dog")] = None,
    layout: Annotated[ModelFormat, typer.Option("--format", help="format of the file")] = ModelFormat.onnx,
    as_json: AsJson = False,
) -> None:
    """Write a trained detector as one file that runs without mmdetection, and check that it computes the same.

    Detectors with a dense head can be exported. Threshold and suppression of boxes are left to whoever runs it.

    Example: ppal export-model 1 --out cells.onnx

    Example: ppal export-model --checkpoint final.pth --detector retinanet_tiny --format torchscript --out cells.pt
    """
    with errors_in_one_line(as_json):
        if (project is None) == (checkpoint is None):
            raise SettingsError("expected a project or --checkpoint, got both or neither; name one")
        settings = settings_and_logging()
        with tempfile.TemporaryDirectory(prefix="ppal-export-") as work, waiting("exporting"):
            from ppal_backend.detector.exporting_model import export_model as run

            if checkpoint is None:
                model, zoo = _active(settings, int(project or 0)), settings.model_zoo
            else:
                from ppal_backend.engines.foreign import adopt_checkpoint

                labels = [part.strip() for part in classes.split(",")] if classes else None
                model, zoo = adopt_checkpoint(
                    checkpoint, Path(work), detector=detector, classes=labels, zoo_root=settings.model_zoo
                )
            done = run(model.detector, Path(model.checkpoint), model.labels, out, layout.value, zoo)
    if as_json:
        print_json(done.as_dict())
        return
    _, _, height, width = done.input_shape
    console.print(f"{done.file}: {done.detector}, images of {width} × {height} px, {done.boxes} boxes before "
                  f"suppression; {done.description} describes it", soft_wrap=True, highlight=False)  # fmt: skip
    console.print(f"as the detector itself up to {done.box_difference_px:.1g} px and {done.score_difference:.1g} in "
                  "scores", soft_wrap=True, highlight=False)  # fmt: skip


def _active(settings: Settings, project: int) -> ModelRef:
    """The model of a project's active version."""
    with state_of(settings, project) as store:
        store.projects.get(project)
        version = store.versions.active(project, with_model=True)
    if version is None:
        raise StateError(
            f"expected a version of project {project} with a trained model, got none; annotate tasks and start a round "
            f"(ppal round {project})"
        )
    checkpoint = settings.model_dir.resolve() / version.checkpoint
    return ModelRef(version.detector, str(checkpoint), version.labels, version.difficulty)
