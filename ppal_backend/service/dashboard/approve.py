"""Pre-annotations that people look at together and approve, and the batches that they have approved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ppal_backend.datasets.precision import THRESHOLDS, measured
from ppal_backend.operations.approvals import offer, precision_at, regions_of
from ppal_backend.service.dashboard.drawing import place_labels
from ppal_backend.service.dashboard.project import PoolImage, Project
from ppal_backend.service.dashboard.quality import ShownBox

PAGE = 12
USUAL = 0.8


@dataclass(frozen=True)
class Offered:
    """A task to approve: its image and what would be approved."""

    task_id: int
    least: float
    image: PoolImage | None
    boxes: list[ShownBox]


def approve_page(project: Project, threshold: float, page: int) -> dict[str, Any]:
    """What was measured at each confidence, and the tasks that can be approved at one."""
    facts = project.snapshot[1] if project.snapshot is not None else {}
    threshold = threshold if threshold in THRESHOLDS else USUAL
    settings, store = project.runtime.settings, project.runtime.store
    found = offer(settings, store, project.id, precision_at(facts, threshold))
    pages = max(1, -(-len(found.tasks) // PAGE))
    page = min(max(1, page), pages)
    ids = list(found.tasks)[(page - 1) * PAGE : page * PAGE]
    items: list[Offered] = []
    if found.version is not None and ids:
        regions = regions_of(settings, store, project.id, found.version, ids, threshold)
        pool = project.files(found.version.round_number).pool()
        items = [_offered(project, i, found.tasks[i], regions[i], pool.get(i)) for i in ids if i in regions]
    return {
        "rows": measured(facts.get("precision") or {}), "threshold": threshold, "precision": found.precision,
        "version": found.version, "total": len(found.tasks), "items": items, "page": page, "pages": pages,
        "batches": store.approvals.batches(project.id), "has_snapshot": project.snapshot is not None,
    }  # fmt: skip


def _offered(
    project: Project, task_id: int, least: float, regions: list[dict[str, Any]], image: PoolImage | None
) -> Offered:
    if image is None or not str(image.path).startswith(str(project.runtime.settings.image_folder.resolve())):
        return Offered(task_id, least, None, [])
    boxes, texts = [], []
    for region in regions:
        value = region["value"]
        x, width = value["x"] * image.width / 100, value["width"] * image.width / 100
        y, height = value["y"] * image.height / 100, value["height"] * image.height / 100
        boxes.append((x, y, x + width, y + height))
        texts.append(f"{value['rectanglelabels'][0]} {region['score']:.2f}")
    places = place_labels(boxes, texts, image.width, image.height)
    shown = [
        ShownBox(b[0], b[1], b[2] - b[0], b[3] - b[1], "model", text, place)
        for b, text, place in zip(boxes, texts, places, strict=True)
    ]
    return Offered(task_id, least, image, shown)
