"""A Label Studio project as the source of a round: a snapshot on disk, then images and COCO."""

from __future__ import annotations

import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ppal_backend.datasets.consensus import annotator_of
from ppal_backend.datasets.corrections import agreement_of, corrections_of, labeling_times
from ppal_backend.datasets.images import ImageCache, ImageInfo
from ppal_backend.datasets.label_studio_json import (
    REGION_TYPE,
    SHAPES,
    ConversionReport,
    annotations_to_coco,
    choose_annotation,
    people_of,
)
from ppal_backend.datasets.precision import precision_of
from ppal_backend.errors import ImageError, SettingsError
from ppal_backend.label_studio.client import LabelStudioClient, read_export
from ppal_backend.label_studio.image_source import ImageSource
from ppal_backend.label_studio.schema import LabelSchema, parse_label_config
from ppal_backend.label_studio.shapes import hull_of
from ppal_backend.label_studio.snapshot import earlier_snapshot, read_pool, take_snapshot
from ppal_backend.rounds.ports import PoolEntry, PreparedData
from ppal_backend.settings import Settings
from ppal_backend.structures.round import OnProgress, Progress

log = logging.getLogger(__name__)

PARALLEL_FETCHES = 8
FETCHES_AHEAD = 256  # so that a project of any size has no more fetches waiting
MAX_REPORTED_PROBLEMS = 20


def open_client(
    settings: Settings, url: str = "", hostname: str = "", tries: int = 4, timeout_s: float = 120.0
) -> LabelStudioClient:
    """A client for the Label Studio that the operator set, else for ``url``.

    Args:
        settings: the operator's settings.
        url: where Label Studio is, unless the settings say so.
        hostname: what Label Studio calls itself, "" when it has not told.
        tries: how often a read is sent in all.
        timeout_s: limit for a read.

    Raises:
        SettingsError: there is no address or no token.
    """
    address = settings.label_studio_url or url
    key = settings.label_studio_api_key.get_secret_value()
    if not address or not key:
        missing = "LABEL_STUDIO_URL" if not address else "LABEL_STUDIO_API_KEY"
        raise SettingsError(f"expected {missing} in the backend's environment, got none; set it and start again")
    others = [a for a in (settings.label_studio_public_url, hostname) if a.startswith(("http://", "https://"))]
    return LabelStudioClient(address, key, timeout_s, tries=tries, other_urls=others)


def image_cache(settings: Settings, client: LabelStudioClient) -> ImageCache:
    """The verified images of one Label Studio, shared by the worker and the service."""
    return ImageCache(
        settings.image_folder,
        ImageSource(client, settings.image_hosts),
        max_pixels=settings.max_image_megapixels * 1_000_000,
        namespace=client.url,
    )


class LabelStudioSource:
    """Annotated and unlabelled tasks of one project.

    Args:
        client: its Label Studio.
        images: where images are fetched to.
        project_id: the project.
        from_name: the RectangleLabels control to use; None for the first one on an Image.
        times_by_annotator: whether the report tells of each annotator how long an image took.
        approved: annotations that were approved in bulk: what people did to boxes is not read off them.
        takes_over: whether an earlier round's snapshot is gone on from.
        other_shapes: whether polygons, ellipses and brush masks are learned as the boxes around them.
    """

    def __init__(
        self,
        client: LabelStudioClient,
        images: ImageCache,
        project_id: int,
        from_name: str | None = None,
        times_by_annotator: bool = False,
        approved: Callable[[], Collection[int]] = frozenset,
        takes_over: bool = False,
        other_shapes: bool = False,
    ) -> None:
        self._hull_of = hull_of if other_shapes else None
        self._client, self._images, self._times_by_annotator = client, images, times_by_annotator
        self._project_id, self._from_name, self._approved = project_id, from_name, approved
        self._takes_over = takes_over

    def export(self, folder: Path) -> Sequence[int]:
        """Write a snapshot of the project into ``folder`` (see ``snapshot``); the ids of all annotations in it."""
        earlier = earlier_snapshot(folder) if self._takes_over else None
        return take_snapshot(self._client, self._project_id, folder, self._from_name, earlier)

    def prepare(self, folder: Path, on_progress: OnProgress) -> PreparedData:
        """Fetch and verify the images of the snapshot, convert its annotations."""
        schema = parse_label_config((folder / "label_config.xml").read_text(encoding="utf-8"), self._from_name)
        annotated, annotators = self._annotated(folder, schema)
        unlabelled = [row for row in read_pool(folder / "pool.jsonl") if row[0] not in annotated]
        pool = [(i, url) for i, url, _ in unlabelled]
        wanted = [*annotated.items(), *pool]
        found: dict[int, ImageInfo] = {}
        unusable: dict[int, str] = {}
        for done, (task_id, result) in enumerate(self._fetch(wanted, schema.image.keys), start=1):
            if isinstance(result, ImageInfo):
                found[task_id] = result
            else:
                unusable[task_id] = result
                log.warning("%s", result)
            on_progress(Progress("dataset", done, len(wanted), "images"))
        labelled, report = annotations_to_coco(read_export(folder / "annotated.json"), schema, found, self._hull_of)
        approved = frozenset(self._approved())
        corrections = corrections_of(_looked_at(folder, approved), schema.from_name)
        people = people_of(_looked_at(folder, approved), schema, found, self._hull_of)
        entries = [_entry(found[i]) for i, _ in pool if i in found]
        return PreparedData(
            labelled=labelled,
            pool=entries,
            labels=schema.labels,
            report={
                "conversion": report.as_dict(),
                "agreement": agreement_of(corrections),
                "precision": precision_of(corrections),
                "times": labeling_times(corrections, self._times_by_annotator),
                "people": people,
                "image_problems": list(unusable.values())[:MAX_REPORTED_PROBLEMS],
            },
            unreadable=[i for i, _ in pool if i in unusable],
            problems={
                "images": images_problem(len(wanted), unusable, annotated),
                "annotations": annotations_problem(report),
            },
            annotators=annotators,
            data={i: data for i, _, data in unlabelled},
        )

    def _annotated(self, folder: Path, schema: LabelSchema) -> tuple[dict[int, str | None], dict[int, int]]:
        """By annotated task the address of its image, and who made the annotation that training uses, where known."""
        urls: dict[int, str | None] = {}
        annotators: dict[int, int] = {}
        for task in read_export(folder / "annotated.json"):
            annotation = choose_annotation(task)
            if annotation is not None:
                task_id, who = int(task["id"]), annotator_of(annotation)
                urls[task_id] = schema.image.url(task["data"])
                if isinstance(who, int):
                    annotators[task_id] = who
        return urls, annotators

    def _fetch(self, wanted: Sequence[tuple[int, str | None]], keys: str) -> Iterator[tuple[int, ImageInfo | str]]:
        """Images in the order asked for; in place of an image that cannot be used, the reason."""

        def get(item: tuple[int, str | None]) -> tuple[int, ImageInfo | str]:
            task_id, url = item
            if url is None:
                return task_id, (
                    f"task {task_id}: expected the address of an image under {keys} of the task's data, got "
                    "none; correct the data, or the Image's value in the labeling config"
                )
            try:
                return task_id, self._images.get(task_id, url)
            except ImageError as error:
                return task_id, str(error)

        pool = ThreadPoolExecutor(PARALLEL_FETCHES, thread_name_prefix="images")
        under_way: deque[Future[tuple[int, ImageInfo | str]]] = deque()
        try:
            for item in wanted:
                under_way.append(pool.submit(get, item))
                if len(under_way) >= FETCHES_AHEAD:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _looked_at(folder: Path, approved: Collection[int]) -> Iterator[dict[str, Any]]:
    """The annotated tasks, with those of their annotations that people made box by box."""
    for task in read_export(folder / "annotated.json"):
        yield {**task, "annotations": [a for a in task.get("annotations") or () if a.get("id") not in approved]}


def _entry(image: ImageInfo) -> PoolEntry:
    return PoolEntry(image.task_id, str(image.path), image.width, image.height, image.checksum)


def images_problem(total: int, unusable: Mapping[int, str], annotated: Collection[int]) -> str:
    """One sentence about images that cannot be used, "" when all can.

    Args:
        total: Images of the project.
        unusable: Task id -> why its image cannot be used.
        annotated: Ids of the annotated tasks.
    """
    if not unusable:
        return ""
    count = f"none of the {total} images" if len(unusable) == total else f"{len(unusable)} of {total} images"
    verb = "can" if len(unusable) == total else "cannot"
    lost = sum(task_id in annotated for task_id in unusable)
    of_these = f", {lost} of them annotated" if lost else ""
    reasons = Counter(re.sub(r"^task \d+: ", "", reason) for reason in unusable.values())
    first = next(iter(unusable))
    why = " | ".join(f"{reason[:200]} ({n} x)" for reason, n in reasons.most_common(2))
    return f"{count} {verb} be used{of_these}: {why}; the first is task {first}, make them readable and run a round"


_WITHOUT_BOXES = frozenset({
    "choices", "textarea", "rating", "number", "taxonomy", "datetime", "pairwise", "ranker", "relation", "labels",
    "hypertextlabels", "paragraphlabels", "timeserieslabels", "timelinelabels", "chatmessage",
})  # fmt: skip
"""What has no place on an image, or (labels) names a region that is told of under its own kind."""


def annotations_problem(report: ConversionReport) -> str:
    """One sentence about what people drew and no training sees, "" when all is learned from."""
    parts = []
    if report.unknown_labels:
        names = ", ".join(f"{name[:40]!r} ({n})" for name, n in list(report.unknown_labels.items())[:5])
        parts.append(f"{sum(report.unknown_labels.values())} boxes of labels that the labeling config lacks: {names}")
    if report.degenerate:
        parts.append(f"{report.degenerate} boxes of less than a pixel inside the image")
    if report.malformed:
        parts.append(f"{report.malformed} regions without usable numbers or labels")
    others = {kind: n for kind, n in report.other_regions.items() if kind not in _WITHOUT_BOXES}
    if others:
        kinds = ", ".join(f"{kind[:40]} ({n})" for kind, n in others.items())
        shapes = "; other_shapes learns the boxes around them" if set(others) & set(SHAPES) and not report.hulls else ""
        several = "; of several RectangleLabels one is learned, the option from_name names it"
        controls = several if REGION_TYPE in others else ""
        parts.append(f"{sum(others.values())} regions of other kinds or controls: {kinds}{shapes}{controls}")
    if not parts:
        return ""
    return f"left out of the training: {' | '.join(parts)}; correct these annotations, or the labeling config"
