"""What each page of a project shows, ready for its template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from ppal_backend.errors import PPALError, StateError
from ppal_backend.rounds.boxes import read_boxes
from ppal_backend.service import readiness
from ppal_backend.service.dashboard import learning, now, origins, pool_map, quality, queue
from ppal_backend.service.dashboard.charts import Band, Chart, Mark, Series, chart, sparkline
from ppal_backend.service.dashboard.classes import ClassRow, class_rows
from ppal_backend.service.dashboard.forecast import COVERED, Forecast
from ppal_backend.service.dashboard.learning import Point
from ppal_backend.service.dashboard.project import Project
from ppal_backend.store import RoundRecord

CURVE_STEPS = 40
LOOK_AHEAD = 2.0
ROUNDS_SHOWN = 12
MEASURED = "95% of resamples of the held-out images"


def overview(projects: Sequence[Project]) -> list[dict[str, Any]]:
    """A row for each project; what is wrong with one does not hide the others."""
    return [_overview_row(p) for p in projects]


def _overview_row(project: Project) -> dict[str, Any]:
    metrics = project.trained.metrics if project.trained else {}
    troubles = list(project.record.problems.values())
    row = {
        "project": project,
        "open": project.opened[0] if project.opened else None,
        "map": metrics.get("map"),
        "images": metrics.get("labelled_images"),
        "labels": (),
        "budget": None,
        "trouble": troubles,
    }
    try:
        return {**row, "labels": project.labels, "budget": project.options.budget}
    except PPALError as error:  # the labeling config or an extra parameter is not usable any more
        return {**row, "trouble": [*troubles, str(error)]}


def now_page(project: Project) -> dict[str, Any]:
    """The round at work, the ones before it, and what hinders."""
    record = project.opened[0] if project.opened else None
    time = datetime.now(UTC).replace(tzinfo=None)
    shown: dict[str, Any] = {"record": record, "line": [], "left_s": None, "log": []}
    if record is not None:
        usual = now.usual_seconds(project.rounds, record.kind)
        line = now.step_line(record, project.files(record.number).marks(), usual, time)
        shown.update(line=line, left_s=now.left_s(line), log=project.log_lines(record.number))
    return {
        **shown,
        "waiting": project.opened[1:],
        "last": [r for r in reversed(project.rounds) if r.finished_at is not None][:ROUNDS_SHOWN],
        "missing": max(0, project.options.budget - project.new_annotations),
        "worker_problem": readiness.worker(project.runtime.store),
    }


def learning_page(project: Project, goal: int | None) -> dict[str, Any]:
    """mAP over labels, the forecast, the advice."""
    points = learning.points_of(project.rounds)
    if not points:
        return {"points": []}
    forecast = learning.forecast_of(points)
    last, budget = points[-1], project.options.budget
    total = last.images + _pool_size(project.rounds)
    goal = goal or total
    pace = learning.pace_per_hour(points)
    missing = max(0, budget - project.new_annotations)
    return {
        "points": points,
        "by_images": _map_chart(points, forecast, budget),
        "by_boxes": _boxes_chart(points),
        "class_rows": _class_lines(points),
        "forecast": forecast,
        "covered": COVERED,
        "next": forecast.at(last.images + budget) if forecast else None,
        "ceiling": forecast.ceiling() if forecast else None,
        "why_none": "" if forecast else learning.why_no_forecast(points),
        "advice": learning.advice_of(points, forecast, budget, goal, _uncertainty(project)),
        "goal": goal,
        "total": total,
        "missing": missing,
        "hours": missing / pace if pace else None,
    }


def classes_page(project: Project) -> dict[str, Any]:
    """Difficulty beside AP."""
    version = project.trained
    if version is None:
        return {"version": None, "rows": []}
    marks = project.files(version.round_number).marks()
    boxes, weights = (
        marks[step].facts.get(fact) if step in marks else None
        for step, fact in (("dataset", "labelled_per_class"), ("candidates", "class_weights"))
    )
    rows = class_rows(version.labels, version.difficulty, version.metrics.get("per_class") or {}, boxes, weights)
    return {
        "version": version,
        "rows": rows,
        "most_boxes": max((r.boxes or 0 for r in rows), default=0),
        "rare": [r.label for r in rows if r.is_rare],
        "hard": [r.label for r in rows if r.is_hard],
        "scatter": _scatter(rows),
    }


def queue_page(project: Project, page: int) -> dict[str, Any]:
    """A page of the queue of the version in force."""
    version = project.active
    files = project.files(version.round_number) if version is not None else None
    query = files.query() if files is not None else None
    if version is None or files is None or query is None:
        return {"version": version, "items": []}
    pages = queue.pages_of(query)
    page = min(max(1, page), pages)
    boxes = read_boxes(files.folder / "detections", queue.ids_on(query, page))
    threshold = project.options.score_threshold
    items = queue.items_on(query, page, version.labels, files.pool(), boxes, threshold)
    drawn = files.map() if page == 1 else None
    since = project.labelled_since(version.round_number) if drawn is not None else ()
    return {"version": version, "query": query, "items": [_servable(project, i) for i in items], "page": page,
            "pages": pages, "parts": queue.parts_of(query), "threshold": threshold,
            "map": pool_map.summary_of(query, drawn, since, version.labels) if drawn is not None else None}  # fmt: skip


def map_points(project: Project, number: int) -> dict[str, Any]:
    """The points of a round's map.

    Raises:
        StateError: the round has no map.
    """
    files, version = project.files(number), next((v for v in project.versions if v.round_number == number), None)
    query, drawn = files.query(), files.map()
    if version is None or query is None or drawn is None:
        raise StateError(f"round {number} of project {project.id} has no map; the next round draws one")
    return pool_map.points_of(query, drawn, project.labelled_since(number), version.labels)


def quality_page(project: Project, page: int) -> dict[str, Any]:
    """What the newest snapshot of the annotations tells."""
    for record in reversed(project.rounds):
        files = project.files(record.number)
        mark = files.marks().get("dataset")
        if mark is not None:
            break
    else:
        return {"number": None, "rows": [], "review": None}
    versions = [v.version for v in project.versions]
    rows = quality.agreement_rows(mark.facts.get("agreement") or {}, versions)
    shown: dict[str, Any] = {"number": record.number, "rows": rows, "total": quality.total_of(rows)}
    review = files.review()
    if review is None:
        return {**shown, "review": None}
    pages = quality.pages_of(review)
    page = min(max(1, page), pages)
    on_disk = [n for n in {task["round"] for task in review["tasks"]} if project.files(n).has_images()]
    items = quality.doubtful_on(review, page, on_disk)
    return {**shown, "review": review, "items": items, "page": page, "pages": pages}


def settings_page(project: Project) -> dict[str, Any]:
    """Settings in force."""
    settings = project.runtime.settings
    return {
        "options": origins.project_options(settings, project.record.options),
        "operator": origins.operator_settings(settings),
    }


def _servable(project: Project, item: queue.Item) -> queue.Item:
    """The item without its image where the cache no longer has it."""
    cache = (project.runtime.settings.model_dir / "images").resolve()
    return item if item.image and str(item.image.path).startswith(str(cache)) else replace(item, image=None)


def _pool_size(rounds: Sequence[RoundRecord]) -> int:
    done = [r for r in rounds if r.state == "done" and "pool_images" in r.metrics]
    return int(done[-1].metrics["pool_images"]) if done else 0


def _uncertainty(project: Project) -> tuple[float, float] | None:
    """Mean utility of the query set of the first and of the last round that had a model and a strategy."""
    numbers = [v.round_number for v in project.versions if v.checkpoint]
    if len(numbers) < 2:
        return None
    first, last = (learning.mean_utility(project.files(n).query()) for n in (numbers[0], numbers[-1]))
    return None if first is None or last is None else (first, last)


def _map_chart(points: Sequence[Point], forecast: Forecast | None, budget: int) -> Chart:
    marks = [Mark(p.images, p.value, _told(p, f"{p.images} images, {p.boxes} boxes"), "", p.interval) for p in points]
    last = points[-1]
    summary = f"mAP of {len(points)} rounds, from {points[0].value:.3f} to {last.value:.3f}"
    measured = _bands(points, "images")
    if forecast is None:
        return chart("mAP by labelled images", summary, "labelled images", "mAP", [Series(marks)], measured)
    first = points[0].images
    end = max(last.images * LOOK_AHEAD, last.images + budget)
    at = [first + (end - first) * i / CURVE_STEPS for i in range(CURVE_STEPS + 1)]
    ranges = [forecast.at(n) for n in at]
    curve = [Mark(n, max(0.0, r.middle), "") for n, r in zip(at, ranges, strict=True)]
    rows = [(n, max(0.0, r.low), min(1.0, r.high)) for n, r in zip(at, ranges, strict=True)]
    bands = [Band(rows, f"{COVERED:.0%} of the curves that fit"), *measured]
    series = [Series(curve, "forecast"), Series(marks)]
    return chart("mAP by labelled images", summary + ", with forecast", "labelled images", "mAP", series, bands)


def _boxes_chart(points: Sequence[Point]) -> Chart:
    marks = [Mark(p.boxes, p.value, _told(p, f"{p.boxes} boxes"), "", p.interval) for p in points]
    summary = f"mAP of {len(points)} rounds by labelled boxes"
    bands = _bands(points, "boxes")
    return chart("mAP by labelled boxes", summary, "labelled boxes", "mAP", [Series(marks)], bands)


def _bands(points: Sequence[Point], by: str) -> list[Band]:
    return [
        Band([(getattr(p, by), *p.interval) for p in stretch if p.interval is not None], MEASURED, "measured")
        for stretch in learning.stretches_of(points)
    ]


def _told(point: Point, having: str) -> str:
    spread = "" if point.interval is None else " ({:.3f} to {:.3f})".format(*point.interval)
    return f"round {point.number}: mAP {point.value:.3f}{spread} with {having}"


def _class_lines(points: Sequence[Point]) -> list[dict[str, Any]]:
    """AP by class over the rounds, the classes that gained least in front."""
    rows = []
    for label in dict.fromkeys(label for p in points for label in p.per_class):
        values = [p.per_class[label] for p in points if label in p.per_class]
        gain = values[-1] - values[-2] if len(values) > 1 else None
        rows.append({"label": label, "path": sparkline(values), "first": values[0], "last": values[-1], "gain": gain})
    return sorted(rows, key=lambda row: row["last"])


def _scatter(rows: Sequence[ClassRow]) -> Chart | None:
    marks = [
        Mark(
            r.difficulty, r.ap, f"{r.label}: difficulty {r.difficulty:.2f}, AP {r.ap:.3f}", r.label if r.is_hard else ""
        )
        for r in rows
        if r.difficulty is not None and r.ap is not None
    ]
    if not marks:
        return None
    summary = f"{len(marks)} classes: AP on held-out images by training difficulty"
    return chart("Difficulty and AP", summary, "difficulty", "AP", [Series(marks, "points", joined=False)])
