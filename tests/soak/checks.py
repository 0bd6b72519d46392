"""What must hold when the faults are over and all is settled."""

from __future__ import annotations

from collections import Counter

import psutil

from ppal_backend.files import read_json
from ppal_backend.label_studio.publish import SAMPLING, TAB_TITLE
from ppal_backend.structures.round import VERSION_PREFIX
from tests.soak.faults import SEVERAL_IMAGES
from tests.soak.site import Site
from tests.soak.watching import Watcher

MOST_GROWTH_MIB = 48.0
MOST_DESCRIPTORS = 16
KEPT_BY_TORCH = "torchinductor_"  # its cache, one folder for each user

Check = dict[str, object]


def of_project(site: Site, project_id: int) -> list[Check]:
    """Annotations, queue, versions, webhook and rounds of a project."""
    session, store = site.label_studio.session, site.store
    tasks = session.get(f"/api/projects/{project_id}/export", params={"exportType": "JSON"})
    annotations = {int(a["id"]) for t in tasks for a in t["annotations"]}
    usable = {int(t["id"]) for t in tasks if any(not a["was_cancelled"] for a in t["annotations"])}
    rounds = store.rounds.of_project(project_id)
    last = next(r for r in reversed(rounds) if r.kind == "train")
    folder = site.settings.project_folder(project_id) / "rounds" / str(last.number)
    exported = {int(a["id"]) for t in read_json(folder / "export" / "annotated.json") for a in t["annotations"]}
    images = [read_json(folder / "dataset" / name)["images"] for name in ("train.json", "val.json")]
    used = {int(image["id"]) for part in images for image in part}
    project = session.get(f"/api/projects/{project_id}/")
    active = store.versions.active(project_id)
    predictions = session.get("/api/predictions", params={"project": project_id})
    per_version = Counter((p["model_version"], p["task"]) for p in predictions)
    queue = {p["task"] for p in predictions if p["model_version"] == project["model_version"]}
    all_tasks = site.tasks(project_id)
    counted = set(store.ledger.usable(project_id))
    not_skipped = {int(a["id"]) for t in tasks for a in t["annotations"] if not a["was_cancelled"]}
    failed = [r for r in rounds if r.state == "failed"]
    unasked = [(r.reason, r.edits) for r in failed if "by hand" not in r.reason]
    versions = {p["model_version"] for p in predictions if str(p["model_version"]).startswith(VERSION_PREFIX)}
    known = {v.version for v in store.versions.of_project(project_id)}
    titles = [v["data"]["title"] for v in session.get("/api/dm/views", params={"project": project_id})]
    hooks = [h for h in site.client.webhooks(project_id) if h["url"].startswith(site.to_service.url)]
    return [
        _check("the last round is a finished training", last.state == "done" and rounds[-1].finished_at, last.state),
        _check("every annotation is in its snapshot", exported == annotations, _differ(annotations, exported)),
        _check("every annotated task is in its data", used == usable, _differ(usable, used)),
        _check("no annotation counts as new", store.ledger.new_count(project_id) == 0),
        _check("annotations of deleted tasks do not count", counted == not_skipped, _differ(not_skipped, counted)),
        _check("no deleted task is in Label Studio's export", {int(t["id"]) for t in tasks} <= all_tasks),
        _check("Label Studio serves that round", active is not None and active.round_number == last.number
               and (project["model_version"], project["sampling"]) == (active.version, SAMPLING)),
        # a labelled task that somebody opens gets a live prediction, so the queue may hold more
        _check("the queue holds every task to label", queue >= all_tasks - usable, _differ(all_tasks - usable, queue)),
        _check("no task has two predictions of a version", max(per_version.values(), default=0) == 1),
        _check("no version is left half done", versions <= known, sorted(versions - known)),
        _check("old versions are removed", len(versions) <= site.settings.keep_versions, len(versions)),
        _check("one webhook, one queue tab", len(hooks) == 1 and titles.count(TAB_TITLE) == 1, [len(hooks), titles]),
        _check("no round failed but by a bad config", all(SEVERAL_IMAGES in r.error for r in failed),
               [r.error for r in failed]),
        _check("what failed was tried again only with a reason", len(set(unasked)) == len(unasked), unasked),
        _check("no problem is shown", not any(site.problems(project_id).values()), site.problems(project_id)),
    ]  # fmt: skip


def of_events(site: Site) -> list[Check]:
    """Nothing pending, nothing parked."""
    counts = dict(site.store.events.counts())
    return [_check("every event is done", set(counts) <= {"done"}, counts)]


def of_itself(alive: bool, struck: list[dict]) -> list[Check]:
    """Everybody worked to the end, and every fault was over when it should have been."""
    late = [fault for fault in struck if not fault["over"]]
    return [_check("everybody worked to the end", alive), _check("what was killed came back", not late, late)]


def of_processes(site: Site, watcher: Watcher) -> list[Check]:
    """While all is idle: no process beside those that belong there, and none has grown."""
    launched = {p.pid for p in site.group.processes.values()}
    children = {c.pid for pid in launched for c in psutil.Process(pid).children(recursive=True)}
    strays = [p for p in site.ours() if p.pid not in launched | children]
    rounds = [p for p in site.ours() if "ppal_backend.worker.round_process" in p.cmdline()]
    grown = watcher.figures()
    return [
        _check("no stray process", not strays, [p.cmdline() for p in strays]),
        _check("no round process", not rounds, [p.cmdline() for p in rounds]),
        *(_check(f"{role}: memory", f["grown_mib"] <= MOST_GROWTH_MIB, f["grown_mib"]) for role, f in grown.items()),
        *(_check(f"{role}: descriptors", f["grown_descriptors"] <= MOST_DESCRIPTORS, f["grown_descriptors"])
          for role, f in grown.items()),
    ]  # fmt: skip


def after_stop(site: Site) -> list[Check]:
    """Service and workers have ended: nothing of them runs, no temporary file is left."""
    running = site.ours()
    left = sorted(p.name for p in site.temporary.iterdir() if not p.name.startswith(KEPT_BY_TORCH))
    parts = sorted(str(p.relative_to(site.out)) for p in site.settings.model_dir.rglob("*.part"))
    return [
        _check("no process is left", not running, [p.cmdline() for p in running]),
        _check("no temporary file is left", not left, left[:20]),
        _check("no half-written file is left", not parts, parts[:20]),
    ]


def _check(what: str, holds: object, found: object = None) -> Check:
    return {"what": what, "ok": bool(holds), **({} if holds or found is None else {"found": found})}


def _differ(wanted: set[int], got: set[int]) -> dict[str, list[int]]:
    return {"missing": sorted(wanted - got)[:20], "too many": sorted(got - wanted)[:20]}
