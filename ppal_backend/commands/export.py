"""``ppal export`` and ``export-model``: a project's boxes as COCO, YOLO or Pascal VOC, its detector as one file."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppal_backend.commands.shared import (
    AsJson,
    console,
    errors_in_one_line,
    opened,
    print_json,
    progress_bar,
    settings_and_logging,
    state_of,
    waiting,
)
from ppal_backend.errors import SettingsError, StateError
from ppal_backend.settings import Settings
from ppal_backend.structures.round import ModelRef

if TYPE_CHECKING:
    from ppal_backend.datasets.exporting import BoxExport
    from ppal_backend.store import Store

_LEFT_OUT = ("missing_images", "unknown_labels", "degenerate", "malformed", "other_regions")


class Layout(StrEnum):
    """A format of the export."""

    coco = "coco"
    yolo = "yolo"
    voc = "voc"


def export(
    project: Annotated[int, typer.Argument(help="Label Studio project id")],
    out: Annotated[Path, typer.Option(help="folder to write to; new or empty")],
    layout: Annotated[Layout, typer.Option("--format", help="layout of the files")] = Layout.coco,
    predictions: Annotated[
        bool, typer.Option("--predictions", help="what the active version detects, instead")
    ] = False,
    images: Annotated[bool, typer.Option("--images", help="copy the images too")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a project's annotations as COCO, YOLO or VOC, or its active version's predictions.

    Example: ppal export 1 --format yolo --out boxes --images
    """
    from ppal_backend.datasets.exporting import write_export
    from ppal_backend.operations.exporting import predictions_of

    left_out: dict[str, Any] = {}
    with opened(as_json, project) as (settings, store):
        if predictions:
            found = predictions_of(settings, store, project)
        else:
            found, left_out = _annotated(settings, store, project)
        write_export(found, layout.value, out, images)
    summary = {
        "format": layout.value,
        "out": str(out),
        "images": len(found.dataset.images),
        "boxes": len(found.dataset.annotations),
        "left_out": left_out,
    }
    if as_json:
        print_json(summary)
        return
    console.print(f"{out}: {summary['images']} images, {summary['boxes']} boxes", soft_wrap=True, highlight=False)
    for name, count in left_out.items():
        console.print(f"left out, {name.replace('_', ' ')}: {count}", soft_wrap=True, highlight=False)


def _annotated(settings: Settings, store: Store, project: int) -> tuple[BoxExport, dict[str, Any]]:
    from ppal_backend.label_studio.source import open_client
    from ppal_backend.operations.exporting import annotations_of

    record = store.projects.get(project)
    with open_client(settings, record.url, record.hostname) as client, progress_bar("reading annotations") as told:
        found, report = annotations_of(settings, store, client, project, told)
    return found, {name: report[name] for name in _LEFT_OUT if report[name]}


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
            from ppal_backend.detector.infer.exporting_model import export_model as run

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
    """The model of a project's active version, fetched where this machine lacks it."""
    from ppal_backend.operations.pruning import move_lost_away
    from ppal_backend.rounds.folder import Rounds, need_intact

    with state_of(settings, project) as store:
        key = store.projects.get(project).key
        version = store.versions.active(project, with_model=True)
        move_lost_away(settings, store, project)
    if version is None:
        raise StateError(
            f"expected a version of project {project} with a trained model, got none; annotate tasks and start a round "
            f"(ppal round {project})"
        )
    checkpoint = Rounds(settings).fetch_checkpoint(key, version.checkpoint)
    need_intact(checkpoint, version.version)
    return ModelRef(version.detector, str(checkpoint), version.labels, version.difficulty)


COMMANDS = (export, export_model)
