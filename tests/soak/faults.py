"""The faults: each strikes, lasts for a while and is over when its function returns."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import time
from collections.abc import Callable

import psutil

from ppal_backend.store import database_file
from tests.servers import wait_for
from tests.soak.site import WORKERS, Site

LASTS_S = (6.0, 14.0)
LOCK_S = (3.0, 8.0)
LONGER_THAN_ANYBODY_WAITS_S = 35.0
BACK_WITHIN_S = 120.0
ROUND_S = 300.0  # for a round to begin, or to reach its export, behind another one
ENOUGH = 20  # annotated tasks; below, a training may have too few when some are deleted
SEVERAL_IMAGES = "expected one image a task"  # what the refusal of the bad labeling config says

Fault = Callable[[Site, random.Random], str]


def kill_worker(site: Site, dice: random.Random) -> str:
    return _kill_started(site, dice.choice(WORKERS))


def kill_service(site: Site, dice: random.Random) -> str:
    return _kill_started(site, "service")


def kill_serving_process(site: Site, dice: random.Random) -> str:
    master = psutil.Process(site.group.processes["service"].pid)
    children = master.children()
    _kill(children[0]) if children else None
    return "killed" if children else "there was none at that moment"


def kill_round(site: Site, dice: random.Random) -> str:
    rounds = [p for p in site.ours() if "ppal_backend.worker.round_process" in _command(p)]
    for process in rounds:
        _kill(process)
    return f"{len(rounds)} killed"


def restart_label_studio(site: Site, dice: random.Random) -> str:
    hard = dice.random() < 0.5
    site.label_studio.go_down(hard)
    time.sleep(dice.uniform(*LASTS_S))
    site.label_studio.come_back()
    return "kill -9" if hard else "SIGTERM"


def restart_redis(site: Site, dice: random.Random) -> str:
    if site.redis is None:
        return "not installed"
    site.redis.kill()
    time.sleep(dice.uniform(*LASTS_S))
    site.redis.start()
    return "kill -9, started empty"


def lock_sqlite(site: Site, dice: random.Random) -> str:
    return _lock(site, dice.uniform(*LOCK_S))


def lock_sqlite_for_long(site: Site, dice: random.Random) -> str:
    return _lock(site, LONGER_THAN_ANYBODY_WAITS_S)


def delete_tasks(site: Site, dice: random.Random) -> str:
    """Somebody deletes tasks in the Data Manager, annotated ones too, while a round that may know them runs."""
    project_id = dice.choice(site.projects)
    annotated = {task for task in site.store.ledger.usable(project_id).values() if task is not None}
    many = len(annotated & site.tasks(project_id)) >= ENOUGH
    if not site.store.rounds.is_open(project_id):
        if many:
            site.start_training(project_id)
        else:
            site.store.rounds.request(project_id, "rank", "tasks will be deleted")
    wait_for(lambda: site.store.rounds.running(project_id), "a round runs", ROUND_S)
    time.sleep(dice.uniform(0.0, LASTS_S[1]))  # whatever it does then
    chosen = dice.sample(sorted(site.tasks(project_id) - annotated), 2)
    chosen += dice.sample(sorted(annotated & site.tasks(project_id)), 2) if many else []
    step = getattr(site.store.rounds.running(project_id), "step", "") or "no step"
    site.delete_tasks(project_id, chosen)
    return f"{len(chosen)} of project {project_id}, {2 if many else 0} of them annotated, in {step}"


def break_config(site: Site, dice: random.Random) -> str:
    """A labeling config that no round can use, until a round has failed by it and people are told; then the old one."""
    project_id, rounds = dice.choice(site.projects), site.store.rounds
    good = site.label_config(project_id)
    known = {r.id for r in rounds.of_project(project_id) if r.state == "failed"}

    def failed() -> set[int]:
        return {r.id for r in rounds.of_project(project_id) if r.state == "failed"} - known

    bad = good.replace("</View>", '<Image name="second" value="$image"/></View>')
    site.set_label_config(project_id, bad.replace('toName="image"', 'toName="image,second"'))
    try:
        site.start_training(project_id)
        wait_for(failed, "a round has failed by the labeling config", ROUND_S)
        wait_for(lambda: site.problems(project_id).get("round"), "people are told", BACK_WITHIN_S)
        time.sleep(dice.uniform(*LASTS_S))  # the failure is no reason to try again
        times = len(failed())
    finally:
        site.set_label_config(project_id, good)
    wait_for(lambda: not site.problems(project_id).get("round"), "a round is asked for again", BACK_WITHIN_S)
    return f"{times} rounds of project {project_id} failed"


def _proxied(proxy_name: str, mode: str) -> Fault:
    def strike(site: Site, dice: random.Random) -> str:
        proxy = getattr(site, proxy_name)
        before, proxy.mode = proxy.touched, mode
        time.sleep(dice.uniform(*LASTS_S))
        proxy.mode = "pass"
        return f"{proxy.touched - before} requests"

    return strike


FAULTS: dict[str, Fault] = {
    "worker killed": kill_worker,
    "service killed": kill_service,
    "serving process killed": kill_serving_process,
    "round processes killed": kill_round,
    "Label Studio restarted": restart_label_studio,
    "Redis restarted": restart_redis,
    "SQLite locked": lock_sqlite,
    "SQLite locked for 35 s": lock_sqlite_for_long,
    "Label Studio answers 500": _proxied("to_label_studio", "error"),
    "Label Studio slow": _proxied("to_label_studio", "slow"),
    "requests to Label Studio lost": _proxied("to_label_studio", "lose request"),
    "answers of Label Studio lost": _proxied("to_label_studio", "lose answer"),
    "token refused": _proxied("to_label_studio", "refuse"),
    "webhooks twice": _proxied("to_service", "twice"),
    "webhooks lost": _proxied("to_service", "lose request"),
    "tasks deleted while a round runs": delete_tasks,
    "labeling config bad, then good": break_config,
}


def _kill_started(site: Site, name: str) -> str:
    """kill -9 of what the launcher started; over when the launcher has started it again."""
    old = site.group.processes[name]
    _kill(psutil.Process(old.pid))
    moment = time.monotonic()
    wait_for(lambda: site.group.processes[name].pid != old.pid, f"{name} is started again", BACK_WITHIN_S)
    if name == "service":
        wait_for(site.is_up, "the service answers again", BACK_WITHIN_S)
    return f"{name}, back after {time.monotonic() - moment:.1f} s"


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def _lock(site: Site, seconds: float) -> str:
    connection = sqlite3.connect(database_file(site.settings.state_url), isolation_level=None, timeout=30)
    try:
        connection.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        connection.rollback()
    finally:
        connection.close()
    return f"{seconds:.0f} s"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
