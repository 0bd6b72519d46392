"""Pre-annotations become annotations without anybody drawing: looked at on a page, approved together, undone together.

Offered are tasks of the queue in force that nobody has labelled, on which every box that people would be shown is as
confident as asked, and which do not measure the detector. Nothing is offered before the precision at that confidence
was measured on enough boxes that people looked at one by one; approved boxes never count for it.

A task is looked at in Label Studio right before its annotation is created, and only a wish that was made on the
version in force is fulfilled. Rounds read annotations when they begin and write predictions, so approving while one
publishes changes neither.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ppal_backend.datasets.precision import Precision, measured
from ppal_backend.errors import StateError
from ppal_backend.files import read_json
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.predictions import detections_to_result
from ppal_backend.label_studio.schema import parse_label_config
from ppal_backend.rounds.detections_store import boxes_of_images, least_sure
from ppal_backend.rounds.evaluation_set import EVALUATION
from ppal_backend.rounds.folder import Rounds
from ppal_backend.settings import Settings
from ppal_backend.store import ModelVersion, SeenAnnotation, Store
from ppal_backend.structures.quality import count

log = logging.getLogger(__name__)

MOST_AT_ONCE = 60
MARK = "approved in bulk, batch {}"
"""What stands in the information of each approved region in Label Studio."""


@dataclass(frozen=True)
class Offer:
    """Tasks that can be approved, the surest first: what their least sure box has, by task id."""

    version: ModelVersion | None
    precision: Precision
    tasks: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Approved:
    """What became of a wish: the batch, its annotated tasks, and why others were left, with how many."""

    batch_id: int
    tasks: tuple[int, ...]
    left: Mapping[str, int]

    @property
    def text(self) -> str:
        """In a sentence."""
        others = "".join(f"; {number} left: {why}" for why, number in self.left.items())
        return f"{count(len(self.tasks), 'task')} approved as batch {self.batch_id}{others}."


@dataclass(frozen=True)
class Undone:
    """What became of a batch: annotations deleted, and those that stay because people changed them."""

    deleted: int
    changed: int

    @property
    def text(self) -> str:
        """In a sentence."""
        stay = f"; {self.changed} stay, people have changed them" if self.changed else ""
        return f"{count(self.deleted, 'approved annotation')} deleted{stay}."


def precision_at(facts: Mapping[str, Any], threshold: float) -> Precision:
    """What was measured at a confidence.

    Args:
        facts: What the newest round noted of the annotations it read.
        threshold: One of ``datasets.precision.THRESHOLDS``.

    Raises:
        StateError: It is none of these.
    """
    rows = {row.threshold: row for row in measured(facts.get("precision") or {})}
    if threshold not in rows:
        known = ", ".join(f"{t:g}" for t in rows)
        raise StateError(f"expected a confidence that is measured ({known}), got {threshold:g}; choose one of them")
    return rows[threshold]


def offer(settings: Settings, store: Store, project_id: int, precision: Precision) -> Offer:
    """What can be approved at a confidence; nothing before its precision is measured.

    Raises:
        StateError: The project is not connected.
    """
    project = store.projects.get(project_id)
    version = store.versions.active(project_id)
    if version is None or not version.checkpoint or not precision.is_measured:
        return Offer(version, precision)
    folder = Rounds(settings).show(project.key, project_id, version.round_number)
    path = folder / "query_set.json"
    if not path.is_file():
        return Offer(version, precision)
    query = read_json(path)
    options = settings.project_options(project.options)
    kept_from = {
        *query.get("reserve", ()),
        *query.get("to_evaluate", ()),
        *store.ledger.labelled_tasks(project_id),
        *(i for i, side in store.sides.of_project(project_id).items() if side == EVALUATION),
        *store.approvals.annotations(project_id),
    }
    schema = parse_label_config(project.label_config, options.from_name)
    ids, least = least_sure(folder / "detections", schema.shown_from(version.labels, options.score_threshold))
    left = np.setdiff1d(np.array(query["queue"], np.int64), np.fromiter(kept_from, np.int64, len(kept_from)))
    offered = (least >= precision.threshold) & np.isin(ids, left)
    ids, least = ids[offered], least[offered]
    order = np.lexsort((ids, -least))
    return Offer(version, precision, dict(zip(ids[order].tolist(), least[order].tolist(), strict=True)))


def regions_of(
    settings: Settings, store: Store, project_id: int, version: ModelVersion, task_ids: Collection[int], least: float
) -> dict[int, list[dict[str, Any]]]:
    """What would be approved on tasks: their pre-annotations, of those that have some and none below ``least``.

    Raises:
        StateError: The round's files are not on this machine any more.
    """
    project = store.projects.get(project_id)
    folder = Rounds(settings).show(project.key, project_id, version.round_number)
    if not (folder / "dataset" / "pool.json").is_file():
        raise StateError(
            f"the files of {version.version}'s round are not on this machine any more; run ppal round --rank"
        )
    options = settings.project_options(project.options)
    schema = parse_label_config(project.label_config, options.from_name)
    found = boxes_of_images(folder / "detections", task_ids)
    sizes = {task_id: one.image_size for task_id, one in found.items()}
    if None in sizes.values():  # this round did not note them with its boxes
        sizes |= {e["image_id"]: (e["width"], e["height"]) for e in read_json(folder / "dataset" / "pool.json")}
    made = {}
    for task_id in task_ids:
        size = sizes.get(task_id)
        if task_id not in found or size is None:
            continue
        regions = detections_to_result(schema, version.labels, found[task_id], *size, options.score_threshold)
        if regions and all(region["score"] >= least for region in regions):
            made[task_id] = regions
    return made


def approve(
    settings: Settings,
    store: Store,
    client: LabelStudioClient,
    project_id: int,
    version_name: str,
    precision: Precision,
    task_ids: Sequence[int],
    annotator: str = "",
) -> Approved:
    """Make annotations of the pre-annotations of tasks.

    Args:
        settings: The operator's settings.
        store: The state.
        client: The project's Label Studio.
        project_id: The project.
        version_name: The version whose boxes were looked at.
        precision: What was measured at the confidence that was asked for.
        task_ids: The tasks.
        annotator: Email of the person in whose name it is done; "" for the model's, by the backend's own user.

    Raises:
        StateError: The precision is not measured, another version is in force by now, there are too many tasks or none,
            or Label Studio has no such person.
        LabelStudioError: Label Studio did not answer; what was approved until then stands, the batch can be undone.
    """
    if not precision.is_measured:
        raise StateError(
            f"expected a precision measured on enough boxes at {precision.threshold:g}, {precision.missing_boxes} "
            f"boxes and {precision.missing_images} images are missing; label more of what is pre-annotated"
        )
    ids = list(dict.fromkeys(task_ids))
    if not 0 < len(ids) <= MOST_AT_ONCE:
        raise StateError(f"expected 1 to {MOST_AT_ONCE} tasks to approve at once, got {len(ids)}; tick some")
    now_offered = offer(settings, store, project_id, precision)
    version = now_offered.version
    if version is None or version.version != version_name:
        raise StateError(
            f"expected the version in force, got the boxes of {version_name[:80]!r}: another one was published; "
            "look at the new boxes"
        )
    offered = [i for i in ids if i in now_offered.tasks]
    regions = regions_of(settings, store, project_id, version, offered, precision.threshold)
    person = _person(client, annotator) if annotator else None
    batch_id = store.approvals.begin(project_id, version.version, precision.threshold, annotator)
    done, left = [], Counter({"not offered any more": len(ids) - len(regions)})
    for task_id, found in regions.items():
        why = _approve_one(store, client, project_id, batch_id, task_id, found, person)
        if why:
            left[why] += 1
        else:
            done.append(task_id)
    if not done:
        store.approvals.undone(batch_id)
    return Approved(batch_id, tuple(done), {why: number for why, number in left.items() if number})


def _approve_one(
    store: Store,
    client: LabelStudioClient,
    project_id: int,
    batch_id: int,
    task_id: int,
    regions: Sequence[Mapping[str, Any]],
    person: int | None,
) -> str:
    """Annotate a task; why not, or ""."""
    if not store.approvals.claim(project_id, batch_id, task_id, _digest(regions)):
        return "approved by somebody else"
    task = client.task(task_id)
    if task is None or any(not a.get("was_cancelled") for a in task.get("annotations") or ()):
        store.approvals.forget(project_id, task_id)
        return "labelled meanwhile" if task is not None else "deleted meanwhile"
    marked = [{**region, "origin": "prediction", "meta": {"text": [MARK.format(batch_id)]}} for region in regions]
    annotation_id = client.create_annotation(task_id, marked, person)
    store.approvals.created(project_id, task_id, annotation_id)
    store.ledger.see(project_id, [SeenAnnotation(annotation_id, task_id)])
    return ""


def undo(store: Store, client: LabelStudioClient, project_id: int, batch_id: int) -> Undone:
    """Delete the annotations of a batch but those that people have changed since: these are theirs from now on.

    Can be done again where Label Studio did not answer.

    Raises:
        StateError: The project has no such batch.
        LabelStudioError: Label Studio did not answer; what is deleted until then stays deleted.
    """
    _, approvals = store.approvals.of_batch(project_id, batch_id)
    deleted, changed = 0, 0
    for approval in approvals:
        found = _annotation_of(client, approval.task_id, approval.annotation_id, batch_id)
        if found is not None and _digest(found.get("result") or ()) != approval.digest:
            changed += 1
        elif found is not None:
            client.delete_annotation(int(found["id"]))
            store.ledger.deleted(project_id, [int(found["id"])])
            deleted += 1
        store.approvals.forget(project_id, approval.task_id)
    store.approvals.undone(batch_id)
    log.info("project %d: batch %d undone, %d deleted, %d changed since", project_id, batch_id, deleted, changed)
    return Undone(deleted, changed)


def _annotation_of(
    client: LabelStudioClient, task_id: int, annotation_id: int | None, batch_id: int
) -> Mapping[str, Any] | None:
    """The annotation of an approval; of one whose answer never came the one that carries the batch's mark."""
    task = client.task(task_id)
    for annotation in (task or {}).get("annotations") or ():
        texts = [text for r in annotation.get("result") or () for text in (r.get("meta") or {}).get("text") or ()]
        if annotation["id"] == annotation_id or (annotation_id is None and MARK.format(batch_id) in texts):
            return dict(annotation)
    return None


def _person(client: LabelStudioClient, email: str) -> int:
    people = client.users()
    if email.strip().lower() not in people:
        raise StateError(
            f"expected the email of somebody in Label Studio, got {email[:80]!r}; correct it, or leave it out"
        )
    return people[email.strip().lower()]


def _digest(regions: Sequence[Mapping[str, Any]]) -> str:
    """Tells boxes from others: labels and places, whatever else Label Studio adds."""
    rows = []
    for region in regions:
        value = region.get("value") or {}
        numbers = [value.get(key) or 0 for key in ("x", "y", "width", "height", "rotation")]
        frame = [round(float(n), 2) if isinstance(n, int | float) else n for n in numbers]
        rows.append(f"{region.get('from_name')} {value.get('rectanglelabels')} {frame}")
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16]
