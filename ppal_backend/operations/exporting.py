"""What people annotated in a project, or what its active version predicts, as boxes to be written out."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppal_backend.datasets.categories import CategoryMap
from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.datasets.exporting import BoxExport, file_names
from ppal_backend.errors import DatasetError, StateError
from ppal_backend.files import read_json
from ppal_backend.label_studio.client import LabelStudioClient, read_export
from ppal_backend.label_studio.schema import LabelSchema, parse_label_config
from ppal_backend.label_studio.snapshot import read_pool
from ppal_backend.label_studio.source import LabelStudioSource, image_cache
from ppal_backend.operations.pruning import move_lost_away
from ppal_backend.rounds.detections_store import Box, read_boxes
from ppal_backend.rounds.folder import Rounds
from ppal_backend.settings import Settings
from ppal_backend.store import ModelVersion, Store
from ppal_backend.structures.round import OnProgress


def annotations_of(
    settings: Settings, store: Store, client: LabelStudioClient, project_id: int, on_progress: OnProgress
) -> tuple[BoxExport, Mapping[str, Any]]:
    """The boxes that a training of the project would learn from, and what was left out (``ConversionReport``).

    Raises:
        StateError: the project never connected.
        DatasetError: no task is annotated, or no image of one can be had.
        LabelStudioError: Label Studio refused or stayed away.
    """
    options = settings.project_options(store.projects.get(project_id).options)
    from_name = options.from_name
    with tempfile.TemporaryDirectory(prefix="ppal-export-") as name:
        folder = Path(name)
        images = image_cache(settings, client)
        source = LabelStudioSource(client, images, project_id, from_name, other_shapes=options.other_shapes)
        source.export(folder)
        (folder / "pool.jsonl").write_text("")  # images that nobody annotated are not fetched
        data = source.prepare(folder, on_progress)
        report = data.report["conversion"]
        if not data.labelled.images:
            missing = report["missing_images"]
            got = f"{missing} whose images cannot be had (the log tells why)" if missing else "none"
            raise DatasetError(
                f"expected annotated tasks in project {project_id}, got {got}; there is nothing to export"
            )
        schema = parse_label_config((folder / "label_config.xml").read_text(encoding="utf-8"), from_name)
        urls = {int(t["id"]): schema.image.url(t["data"]) for t in read_export(folder / "annotated.json")}
    return BoxExport(data.labelled, file_names(data.labelled, urls)), report


def predictions_of(settings: Settings, store: Store, project_id: int) -> BoxExport:
    """What the active version detected on the images that were unlabelled then: the boxes shown as pre-annotations.

    Raises:
        StateError: the project never connected, has no trained model yet, or the files of its round were removed.
    """
    record = store.projects.get(project_id)
    options = settings.project_options(record.options)
    version = store.versions.active(project_id)
    if version is None or not version.checkpoint:
        raise StateError(
            f"expected a version of project {project_id} with a trained model, got "
            f"{version.version + ', which has none' if version else 'no version'}; annotate tasks and start a round "
            f"(ppal round {project_id})"
        )
    steps = ("export", "dataset", "infer")
    move_lost_away(settings, store, project_id)
    folder = Rounds(settings).fetch(record.key, project_id, version.round_number, steps)
    if not (folder / "dataset" / "pool.json").is_file() or not (folder / "detections").is_dir():
        raise StateError(
            f"expected the detections of version {version.version} in {folder}, got none: they were removed; order the "
            f"pool again (ppal round {project_id} --rank)"
        )
    schema = parse_label_config(record.label_config, options.from_name)
    return _detected(folder, version, schema, options.score_threshold)


def _detected(folder: Path, version: ModelVersion, schema: LabelSchema, score_threshold: float) -> BoxExport:
    images = [
        CocoImage(entry["image_id"], entry["path"], entry["width"], entry["height"])
        for entry in read_json(folder / "dataset" / "pool.json")
    ]
    found = read_boxes(folder / "detections", [image.id for image in images])
    categories = CategoryMap(schema.labels)
    rows: list[CocoAnnotation] = []
    scores: dict[int, float] = {}
    for image in images:
        for box in found.get(image.id, ()):
            label = schema.label_of_class(version.labels[box.class_index])
            if label is None or box.score < schema.threshold(label, score_threshold):
                continue
            inside = _inside(box, image)
            if inside is not None:
                number = len(rows) + 1
                rows.append(CocoAnnotation(number, image.id, categories.category_id(label), inside))
                scores[number] = box.score
    classes = [CocoCategory(row["id"], row["name"]) for row in categories.coco_categories()]
    dataset = CocoDataset(tuple(images), tuple(rows), tuple(classes))
    pool = folder / "export" / "pool.jsonl"
    urls = {task_id: url for task_id, url, _ in read_pool(pool)} if pool.is_file() else {}
    return BoxExport(dataset, file_names(dataset, urls), scores)


def _inside(box: Box, image: CocoImage) -> tuple[float, float, float, float] | None:
    x1, x2 = (min(max(v, 0.0), float(image.width)) for v in (box.box_xyxy[0], box.box_xyxy[2]))
    y1, y2 = (min(max(v, 0.0), float(image.height)) for v in (box.box_xyxy[1], box.box_xyxy[3]))
    return (x1, y1, x2 - x1, y2 - y1) if x2 > x1 and y2 > y1 else None
