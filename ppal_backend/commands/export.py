"""``ppal export``: annotations or predictions of a project as COCO, YOLO or Pascal VOC."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppal_backend.commands.shared import AsJson, console, opened, print_json, progress_bar
from ppal_backend.settings import Settings

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
    from ppal_backend.label_studio.source import connect
    from ppal_backend.operations.exporting import annotations_of

    record = store.projects.get(project)
    with connect(settings, record.url, record.hostname) as client, progress_bar("reading annotations") as told:
        found, report = annotations_of(settings, store, client, project, told)
    return found, {name: report[name] for name in _LEFT_OUT if report[name]}


COMMANDS = (export,)
