"""The labeling queue as published: every task's place, why it has it, and the map of the pool it was chosen from."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from ppal_backend.errors import StateError
from ppal_backend.rounds.detections_store import Box, read_boxes, surest_classes
from ppal_backend.service.dashboard.drawing import LabelPlace, colours_of, place_labels
from ppal_backend.service.dashboard.project import PoolImage, Project, Query
from ppal_backend.structures.quality import count, percent

PAGE = 12
ALIKE = 2.0  # CCMS similarity of an image with itself
RANDOM = "random"
PARTS = ("next to label", "also worth it", "the rest")
TORN = 0.3  # of a box's own class: a second class this likely is named beside it
AS_GOOD_AS_THERE = 0.9  # an image this much alike another one is not called unlike it


@dataclass(frozen=True)
class DrawnBox:
    """A box over an image, in its pixels; ``counts`` where it adds to the image's utility most."""

    x: float
    y: float
    width: float
    height: float
    label: str
    score: float
    counts: bool
    class_index: int = 0
    colour: int = 0
    label_at: LabelPlace | None = None
    row: int = 0
    """Of the box among all that the model saw on the image."""

    @property
    def written(self) -> str:
        """What stands at the box."""
        return self.label


@dataclass(frozen=True)
class Numbers:
    """What was measured of an image: its utility, what share in [0, 1] of the pool has less and how it compares with
    the highest; the classes that make it up by their shares; how much alike its nearest neighbour is, or None."""

    utility: float
    above: float
    of_highest: float
    classes: Sequence[tuple[str, float]] = ()
    alike: float | None = None


@dataclass(frozen=True)
class Item:
    """One place of the queue. ``place`` is 1 for the task to label first; ``numbers`` is None where nothing was
    measured."""

    place: int
    task_id: int
    part: str
    numbers: Numbers | None
    reason: str
    image: PoolImage | None
    boxes: Sequence[DrawnBox]


@dataclass(frozen=True)
class Part:
    """A stretch of the queue: from place to place, both included, and the page it begins on."""

    name: str
    first: int
    last: int
    page: int


def parts_of(query: Query) -> list[Part]:
    """Query set, candidates and the rest, as far as there are any."""
    chosen = len(query.image_ids)
    candidates = len(set(query.candidate_ids) - set(query.image_ids))
    ends = (chosen, chosen + candidates, len(query.queue))
    starts = (0, *ends)
    return [
        Part(name, start + 1, end, start // PAGE + 1)
        for name, start, end in zip(PARTS, starts, ends, strict=False)
        if end > start
    ]


def pages_of(query: Query) -> int:
    """How many pages the queue has, at least one."""
    return max(1, -(-len(query.queue) // PAGE))


def ids_on(query: Query, page: int) -> tuple[int, ...]:
    """Tasks on a page, 1 the first."""
    return query.queue[(page - 1) * PAGE : page * PAGE]


def without(query: Query, done: Collection[int]) -> Query:
    """The queue without tasks that are labelled by now."""
    gone = frozenset(done)

    def left(ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(i for i in ids if i not in gone)

    return replace(
        query, image_ids=left(query.image_ids), candidate_ids=left(query.candidate_ids), queue=left(query.queue)
    )


def items_on(
    query: Query,
    page: int,
    labels: Sequence[str],
    pool: Mapping[int, PoolImage],
    boxes: Mapping[int, Sequence[Box]],
    least_score: float,
    *,
    left: Query | None = None,
    page_size: int = PAGE,
) -> list[Item]:
    """The places on a page.

    Args:
        query: the round's queue.
        page: 1 the first.
        labels: of the model that ranked, by class index.
        pool: the pool's images by task id.
        boxes: what the model saw on them.
        least_score: boxes below are drawn only where they count towards the utility.
        left: what is still to be labelled of the queue; all of it by default. Places stay those of the queue.
        page_size: places on a page.
    """
    left = left or query
    made, parts = [], parts_of(left)
    places = {task_id: place for place, task_id in enumerate(query.queue, start=1)}
    ranked = sorted(query.utilities.values())
    start = (page - 1) * page_size
    for number, task_id in enumerate(left.queue[start : start + page_size], start=start + 1):
        why = query.explanations.get(task_id)
        image = pool.get(task_id)
        seen = boxes.get(task_id, ())
        made.append(
            Item(
                place=places.get(task_id, 0),
                task_id=task_id,
                part=next((p.name for p in parts if number <= p.last), PARTS[-1]),
                numbers=_numbers(query, task_id, ranked, labels),
                reason=reason_of(query, task_id, labels),
                image=image,
                boxes=_drawn(seen, why, labels, least_score, image),
            )
        )
    colours = colours_of([box.class_index for item in made for box in item.boxes])
    return [replace(item, boxes=[replace(box, colour=colours[box.class_index]) for box in item.boxes]) for item in made]


def _numbers(query: Query, task_id: int, ranked: Sequence[float], labels: Sequence[str]) -> Numbers | None:
    utility = query.utilities.get(task_id)
    if utility is None or query.strategy == RANDOM or not ranked:
        return None
    why = query.explanations.get(task_id) or {}
    classes = why.get("classes") or ()
    total = sum(c["contribution"] for c in classes)
    shares = [(labels[c["class_index"]], c["contribution"] / total) for c in classes[:3]] if total > 0 else []
    similarity = why.get("nearest_similarity")
    return Numbers(
        utility=utility,
        above=bisect_left(ranked, utility) / len(ranked),
        of_highest=max(0.0, utility / ranked[-1]) if ranked[-1] > 0 else 0.0,
        classes=shares,
        alike=None if similarity is None else similarity / ALIKE,
    )


def reason_of(query: Query, task_id: int, labels: Sequence[str]) -> str:
    """Why a task stands where it does, in words; ``labels`` are those of the model that ranked, by class index."""
    why = query.explanations.get(task_id)
    if task_id in query.first:
        return "Pinned: somebody wants it labelled next."
    if task_id in query.last:
        return "Put at the end by hand."
    if task_id in query.to_evaluate:
        return "Picked at random to measure the detector; it is never trained on."
    if task_id in query.reserve:
        return "Kept to measure the detector with: a later query set asks for it."
    if query.strategy == RANDOM:
        drawn = "Drawn at random: there was no model yet." if not labels else "Drawn at random."
        return f"{_for_quotas(query, task_id)} {drawn}".strip()
    if why is None:
        return _unchosen(query, task_id)
    parts = [_for_quotas(query, task_id), _unlike(query, why), _unsure(why, labels)]
    others = (why.get("cluster_size") or 1) - 1
    if others:
        parts.append(f"Stands for {count(others, 'similar image')}.")
    return " ".join(part for part in parts if part) or "The model is unsure of this image as a whole."


def _for_quotas(query: Query, task_id: int) -> str:
    """Which quotas brought a task into the query set, or count it; "" for none."""
    here = [q["text"] for q in query.quotas if task_id in q["entered"]]
    counts = [q["text"] for q in query.quotas if task_id in q["image_ids"] and task_id not in q["entered"]]
    parts = [f"Here for a quota: {'; '.join(here)}."] if here else []
    return " ".join([*parts, f"Counts for a quota: {'; '.join(counts)}."] if counts else parts)


def _unlike(query: Query, why: Mapping[str, Any]) -> str:
    """How it differs from what is labelled or comes before it; "" where nothing was compared."""
    nearest, similarity = why.get("nearest_chosen"), why.get("nearest_similarity")
    if nearest is None:
        return ""
    is_before = nearest in query.image_ids
    which = f"task {nearest}" if nearest >= 0 else "a labelled image"
    alike = "" if similarity is None else f", {percent(similarity / ALIKE)} alike"
    what = "what comes before it" if is_before else "what is labelled"
    if similarity is not None and similarity / ALIKE >= AS_GOOD_AS_THERE:
        return f"Adds to {what} (nearest: {which}{alike})."
    return f"Unlike {what} (nearest: {which}{alike})."


def _unsure(why: Mapping[str, Any], labels: Sequence[str]) -> str:
    """What the model cannot tell apart, or of which classes it is unsure; "" where that is none."""
    torn: list[str] = []
    for box in why["boxes"]:
        second, share = box.get("second_class"), box.get("second_share")
        if second is not None and share >= TORN and max(second, box["class_index"]) < len(labels):
            text = " or ".join(labels[c] for c in sorted((box["class_index"], second)))
            torn += [text] if text not in torn else []
    if torn:
        return f"Not sure: {'; '.join(torn[:2])}."
    classes = [labels[c["class_index"]] for c in why["classes"][:3]]
    return f"Not sure of {_and(classes)}." if classes else ""


def _unchosen(query: Query, task_id: int) -> str:
    if task_id in query.older:
        return "Not looked at by this model yet: it keeps its last place."
    if task_id not in query.utilities:
        return "Its image could not be read."
    if task_id in query.candidate_ids:
        return "The model is unsure here too, but images like it come before."
    return "The model is surer here than on the images before."


def _drawn(
    boxes: Sequence[Box],
    why: Mapping[str, Any] | None,
    labels: Sequence[str],
    least_score: float,
    image: PoolImage | None,
) -> list[DrawnBox]:
    counting = {box["box_index"] for box in why["boxes"]} if why else set()
    shown = [(i, box) for i, box in enumerate(boxes) if i in counting or box.score >= least_score]
    names = [labels[box.class_index] if box.class_index < len(labels) else "?" for _, box in shown]
    places: Sequence[LabelPlace | None] = [None] * len(shown)
    if image is not None:
        texts = [name if row in counting else "" for (row, _), name in zip(shown, names, strict=True)]
        places = place_labels([box.box_xyxy for _, box in shown], texts, image.width, image.height)
    drawn = []
    for (row, box), name, place in zip(shown, names, places, strict=True):
        x1, y1, x2, y2 = box.box_xyxy
        size = (x2 - x1, y2 - y1)
        drawn.append(
            DrawnBox(x1, y1, *size, name, box.score, row in counting, box.class_index, label_at=place, row=row)
        )
    return drawn


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


LISTED = 100
LABELLED, SINCE, PICK, CANDIDATE, REST = "l", "s", "p", "c", "r"
_DECIMALS = 3


@dataclass(frozen=True)
class Layer:
    """One kind of points: its letter, its name, how many there are."""

    kind: str
    name: str
    count: int


@dataclass(frozen=True)
class Listed:
    """A chosen task in the list beside the map."""

    place: int
    task_id: int
    reason: str
    is_labelled: bool


@dataclass(frozen=True)
class Summary:
    """What the page tells of the map. ``explained`` is the share of variance in [0, 1] that the map holds; of the
    ``labelled_images`` and ``pool_images`` there are, ``drawn_labelled`` and ``drawn_pool`` are on it."""

    explained: tuple[float, float]
    layers: Sequence[Layer]
    labelled_images: int
    drawn_labelled: int
    pool_images: int
    drawn_pool: int
    listed: Sequence[Listed]


def kinds_of(query: Query, drawn: Mapping[str, Any], since: Collection[int]) -> str:
    """A letter for every point, first those of the pool, then those that were labelled before the round.

    Args:
        query: the round's queue.
        drawn: the round's map.
        since: tasks labelled since the round.
    """
    chosen, candidates, done = set(query.image_ids), set(query.candidate_ids), set(since)
    letters = [
        SINCE if i in done else PICK if i in chosen else CANDIDATE if i in candidates else REST for i in drawn["ids"]
    ]
    return "".join(letters) + LABELLED * len(drawn["labelled"])


def summary_of(query: Query, drawn: Mapping[str, Any], since: Collection[int], labels: Sequence[str]) -> Summary:
    """What stands beside the map; ``labels`` are those of the model that ranked."""
    kinds, done = kinds_of(query, drawn, since), set(since)
    names = {
        PICK: PARTS[0],
        CANDIDATE: PARTS[1],
        REST: "the rest",
        LABELLED: "labelled before",
        SINCE: "labelled since",
    }
    first, second = drawn["explained"]
    return Summary(
        explained=(first, second),
        layers=[Layer(kind, name, kinds.count(kind)) for kind, name in names.items()],
        labelled_images=drawn["labelled_images"],
        drawn_labelled=len(drawn["labelled"]),
        pool_images=drawn.get("pool_images", len(drawn["ids"])),  # maps of earlier releases hold all of the pool
        drawn_pool=len(drawn["ids"]),
        listed=[
            Listed(place, task_id, reason_of(query, task_id, labels), task_id in done)
            for place, task_id in enumerate(query.image_ids[:LISTED], start=1)
        ],
    )


def points_of(
    query: Query,
    drawn: Mapping[str, Any],
    since: Collection[int],
    labels: Sequence[str],
    surest: Mapping[int, tuple[int, float]] | None = None,
    least_score: float = 0.0,
) -> dict[str, Any]:
    """The points for the script: equally long lists, and texts.

    ``place`` is 1 for the task to label first and 0 for one that was labelled before; ``utility`` is None where
    nothing measured it; ``classes`` are those of the surest boxes, by class index, -1 where none is sure enough.
    ``reasons`` are those of single tasks, ``said`` is what goes for all others of a kind.
    """
    classes = {i: c for i, (c, score) in (surest or {}).items() if score >= least_score and c < len(labels)}
    labelled, kinds = drawn["labelled"], kinds_of(query, drawn, since)
    place = {task_id: number for number, task_id in enumerate(query.queue, start=1)}
    utilities = {} if query.strategy == RANDOM else query.utilities
    said = {LABELLED: "Labelled before this round.", SINCE: "Labelled since this round."}
    for task_id, kind in zip(drawn["ids"], kinds, strict=False):
        if kind in (CANDIDATE, REST) and kind not in said and task_id not in query.reserve | query.last:
            said[kind] = reason_of(query, task_id, labels)
    return {
        "ids": [*drawn["ids"], *(entry["image_id"] for entry in labelled)],
        "x": [*drawn["x"], *(entry["x"] for entry in labelled)],
        "y": [*drawn["y"], *(entry["y"] for entry in labelled)],
        "kinds": kinds,
        "place": [place.get(i, 0) for i in drawn["ids"]] + [0] * len(labelled),
        "utility": [_rounded(utilities.get(i)) for i in drawn["ids"]] + [None] * len(labelled),
        "reasons": {str(i): reason_of(query, i, labels) for i in (*query.image_ids, *query.reserve, *query.last)},
        "said": said,
        "classes": [classes.get(i, -1) for i in drawn["ids"]] + [-1] * len(labelled),
        "labels": list(labels),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DECIMALS)


LONGEST_PX = 320
_QUALITY = 80


def small_jpeg(path: Path) -> bytes:
    """A JPEG of an image that is no longer than ``LONGEST_PX`` on either side.

    Args:
        path: An image of the cache: RGB or grey, upright.

    Raises:
        StateError: the file cannot be read.
    """
    from ppal_backend.datasets.images import open_image  # Pillow: 40 ms that no page but the map needs

    try:
        with open_image(path) as image:
            image.draft("RGB", (LONGEST_PX, LONGEST_PX))
            image.thumbnail((LONGEST_PX, LONGEST_PX))
            file = BytesIO()
            image.convert("RGB").save(file, "JPEG", quality=_QUALITY)
    except (OSError, SyntaxError, ValueError) as error:
        raise StateError(f"expected a readable image in {path.name}, got {type(error).__name__}; run a round") from None
    return file.getvalue()


def queue_page(project: Project, page: int) -> dict[str, Any]:
    """A page of the queue of the version in force; what is labelled by now has left it."""
    version = project.active
    files = project.files(version.round_number) if version is not None else None
    query = files.query() if files is not None else None
    if version is None or files is None or query is None:
        return {"version": version, "items": [], **steering_of(project)}
    since = project.labelled_since(version.round_number)
    left = without(query, since)
    pages = pages_of(left)
    page = min(max(1, page), pages)
    boxes = read_boxes(files.folder / "detections", ids_on(left, page))
    threshold = project.options.score_threshold
    items = items_on(query, page, version.labels, files.pool(), boxes, threshold, left=left)
    drawn = files.map() if page == 1 else None
    mark = files.marks().get("publish")
    front = int(mark.facts.get("published", len(query.queue))) if mark is not None else len(query.queue)
    return {"version": version, "query": query, "items": [servable(project, i) for i in items], "page": page,
            "front": front, "pages": pages, "parts": parts_of(left), "threshold": threshold,
            "labelled": len(query.queue) - len(left.queue), "key": key_of(items), **steering_of(project),
            "map": summary_of(query, drawn, since, version.labels) if drawn is not None else None}  # fmt: skip


def steering_of(project: Project) -> dict[str, Any]:
    """What people ask of the queue, and the round that will take it up; None where none is open."""
    pending = next((r.number for r in reversed(project.opened) if r.state == "pending"), None)
    return {"steering": project.steering, "steered_by": pending}


def key_of(items: Sequence[Item]) -> list[tuple[int, str]]:
    """Colours of the classes that are drawn on a page, as rows of colour and label, in the order of the labels."""
    drawn = {(box.class_index, box.colour, box.label) for item in items for box in item.boxes}
    return [(colour, label) for _, colour, label in sorted(drawn)]


def map_points(project: Project, number: int) -> dict[str, Any]:
    """The points of a round's map.

    Raises:
        StateError: the round has no map.
    """
    files, version = project.files(number), next((v for v in project.versions if v.round_number == number), None)
    query, drawn = files.query(), files.map()
    if version is None or query is None or drawn is None:
        raise StateError(f"round {number} of project {project.id} has no map; the next round draws one")
    surest = surest_classes(files.folder / "detections")
    since, least_score = project.labelled_since(number), project.options.score_threshold
    return points_of(query, drawn, since, version.labels, surest, least_score)


def servable(project: Project, item: Item) -> Item:
    """The item without its image where the cache no longer has it."""
    cache = project.runtime.settings.image_folder.resolve()
    return item if item.image and str(item.image.path).startswith(str(cache)) else replace(item, image=None)
