"""The soak: people work, faults strike from a seed, then everything has to settle and be whole.

    python scripts/soak.py --minutes 30 --seed 0 --out soak-run

needs ``make setup``; Redis is used where it is installed. Writes ``report.json`` into the folder given.
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections import Counter
from pathlib import Path

import psutil

from ppal_backend.errors import PPALError
from tests.servers import wait_for
from tests.soak import checks
from tests.soak.faults import FAULTS
from tests.soak.people import PAUSE_S, Annotator, Visitor
from tests.soak.site import Site
from tests.soak.watching import Watcher

REST_S = (12.0, 26.0)
FIRST_QUEUE_S, SETTLE_S = 1500.0, 1800.0
BUDGET, ITERATIONS = 30, 12


def run(out: Path, minutes: float, seed: int, told=print, pause_s=PAUSE_S, rest_s=REST_S) -> dict:
    """Run the soak; its report. ``report["ok"]`` tells whether every check held."""
    images = max(60, int(0.8 * minutes * 60 / (sum(pause_s) / 2)))
    site = Site(out.absolute(), seed, images, BUDGET, ITERATIONS)
    started = time.monotonic()
    try:
        told(f"{len(site.projects)} projects of {images} tasks; the soak begins")
        for project_id in site.projects:
            wait_for(lambda p=project_id: site.store.versions.active(p), "the first queue", FIRST_QUEUE_S)
        watcher, visitor = Watcher(site), Visitor(site, seed)
        annotators = [Annotator(site, p, seed + p, pause_s) for p in site.projects]
        for thread in (watcher, visitor, *annotators):
            thread.start()
        struck = _strike(site, minutes * 60, random.Random(seed), told, rest_s)
        alive = all(thread.is_alive() for thread in (*annotators, visitor, watcher))
        for thread in (*annotators, visitor):
            thread.finish()
        site.write("struck.json", struck)
        settled_s = _settle(site, visitor, told)
        watcher.finish()
        watcher.look()
        found = {f"project {p}": checks.of_project(site, p) for p in site.projects}
        found |= {"events": checks.of_events(site), "processes": checks.of_processes(site, watcher)}
        found["the soak itself"] = checks.of_itself(alive, struck)
        site.stop_backend()
        found["after the end"] = checks.after_stop(site)
        report = {
            "ok": all(check["ok"] for part in found.values() for check in part),
            "minutes": minutes,
            "seed": seed,
            "seconds": round(time.monotonic() - started, 1),
            "settled_s": settled_s,
            "faults": dict(Counter(fault["what"] for fault in struck)),
            "annotators": [_of_annotator(a) for a in annotators],
            "predictions_asked": visitor.figures,
            "rounds": {p: _rounds(site, p) for p in site.projects},
            "processes": watcher.figures(),
            "checks": found,
            "load_average": os.getloadavg(),
            "struck": struck,
        }
        told(f"report: {site.write('report.json', report)}")
        return report
    finally:
        site.stop()


def _strike(site: Site, seconds: float, dice: random.Random, told, rest_s: tuple[float, float]) -> list[dict]:
    """Every fault once in an order of its own, then again, until the time is over."""
    began, struck, deck = time.monotonic(), [], []
    while time.monotonic() - began < seconds:
        time.sleep(dice.uniform(*rest_s))
        if not deck:
            deck = sorted(FAULTS)
            dice.shuffle(deck)
        what, at = deck.pop(), time.monotonic()
        over = True
        try:
            detail = FAULTS[what](site, dice)
        except (AssertionError, PPALError, OSError, psutil.Error, sqlite3.Error) as error:  # it was to be over by then
            detail, over = str(error), False
        lasted = round(time.monotonic() - at, 1)
        struck.append({"at_s": round(at - began, 1), "what": what, "for_s": lasted, "detail": detail, "over": over})
        told(f"{at - began:6.0f} s  {what}: {detail}")
    return struck


def _settle(site: Site, visitor: Visitor, told) -> float:
    """Nothing strikes any more: what was begun ends, then each project trains once more. The seconds it took."""
    started = time.monotonic()
    _wait_idle(site)
    told(f"idle after {time.monotonic() - started:.0f} s; a last training each")
    for project_id in site.projects:
        before = len(site.store.rounds.of_project(project_id))
        site.start_training(project_id)
        wait_for(lambda p=project_id, n=before: len(site.store.rounds.of_project(p)) > n, "the training is asked for")
    _wait_idle(site)
    wait_for(lambda: visitor.look().ok, "a live prediction", 180)
    told(f"settled after {time.monotonic() - started:.0f} s")
    return round(time.monotonic() - started, 1)


def _wait_idle(site: Site) -> None:
    def idle() -> bool:
        nothing_open = not any(site.store.rounds.is_open(p) for p in site.projects)
        polled = not any(site.store.projects.get(p).problems.get("poll") for p in site.projects)
        return nothing_open and polled and not site.store.events.counts().get("pending")

    wait_for(lambda: idle() and (time.sleep(15) or idle()), "everything is idle", SETTLE_S)  # a poll lies between


def _of_annotator(annotator: Annotator) -> dict:
    waits = sorted(annotator.waits) or [0.0]
    return {
        **annotator.figures,
        "submit_s": {"median": round(waits[len(waits) // 2], 2), "highest": round(waits[-1], 2)},
        "refused": len(annotator.refused),
        "refusals": dict(Counter(text.split("/api")[0][:60] for text in annotator.refused)),
    }


def _rounds(site: Site, project_id: int) -> dict:
    rounds = site.store.rounds.of_project(project_id)
    return {
        "states": dict(Counter(r.state for r in rounds)),
        "trainings": sum(r.kind == "train" for r in rounds),
        "attempts": [r.attempts for r in rounds],
        "annotations_in_the_last": rounds[-1].metrics.get("labelled_images"),
    }
