"""Checks of this machine: settings, database, worker, disk, the detector's stack, and the service itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import httpx

from ppal_backend.doctor.finding import Finding, failed, ok, split, warning
from ppal_backend.errors import (
    ArtifactsUnavailable,
    DetectorError,
    QueueUnavailable,
    SettingsError,
    StateError,
    StoreUnavailable,
)
from ppal_backend.rounds.bucket import Bucket
from ppal_backend.service import auth, readiness
from ppal_backend.settings import Settings
from ppal_backend.store import Store, find_store, hint_of_another
from ppal_backend.worker.queue import open_queue

HEALTH_TIMEOUT_S = 3.0


def credentials(settings: Settings) -> Finding:
    """Whether callers must identify themselves."""
    try:
        if auth.is_on(settings):
            return ok("credentials", "callers must know BASIC_AUTH_USER and BASIC_AUTH_PASS")
    except SettingsError as error:
        return split("credentials", str(error))
    return warning(
        "credentials",
        "anybody who reaches this backend may use it",
        "set BASIC_AUTH_USER and BASIC_AUTH_PASS unless only Label Studio can reach it",
    )


def state(settings: Settings, store: Store) -> list[Finding]:
    """Database, worker and disk, as ``/ready`` sees them; and events that could not be used. Where no backend has kept
    state yet, that alone, and where a running one keeps its own."""
    found: list[Finding] = []
    away = ""
    try:
        with closing(find_store(settings)) as kept:
            seen, _, advice = hint_of_another(settings, kept).partition("; ")
            found += [warning("state", seen, advice)] if seen else []
    except StateError as error:
        return [split("state", str(error))]
    except StoreUnavailable as error:
        away = str(error)
    problems = readiness.problems(settings, store)
    if away and not problems["database"]:
        problems = {"database": away, "disk": problems["disk"]}  # of the worker nobody knows
    found += [split(name, problem) if problem else ok(name, _WELL[name]) for name, problem in problems.items()]
    parked = 0 if any(f.check == "database" and f.state != "ok" for f in found) else store.events.counts().get("parked")
    if parked:
        found.append(
            warning("events", f"{parked} events could not be used and were parked", "the worker's log has the reasons")
        )
    return found


def queue(settings: Settings) -> Finding:
    """Whether the job queue answers."""
    there = bool(settings.queue_url.get_secret_value()) or settings.jobs_file.is_file()  # a file comes with the backend
    try:
        waiting = open_queue(settings).pending() if there else 0
    except SettingsError as error:
        return failed("queue", str(error), "correct PPAL_QUEUE_URL, or leave it empty for a queue in MODEL_DIR")
    except QueueUnavailable as error:
        return failed("queue", str(error), "check that Redis is up and PPAL_QUEUE_URL is right; events wait meanwhile")
    return ok("queue", f"answers, {waiting} jobs wait")


def artifacts(settings: Settings) -> Finding:
    """Whether the bucket takes, gives back and deletes an object."""
    try:
        bucket = Bucket(settings.artifacts)
        bucket.check()
    except (SettingsError, ArtifactsUnavailable) as error:
        return split("artifacts", str(error))
    return ok("artifacts", f"{bucket.name} takes and gives objects")


_WELL = {"database": "answers", "worker": "has shown a sign of life", "disk": "has room"}


def detector_stack(settings: Settings) -> Finding:
    """torch, the device and mmcv's operators."""
    try:
        from ppal_backend.detector.environment import check_environment

        found = check_environment(settings.device)
    except ImportError as error:
        return failed("detector", f"the detector's packages cannot be imported ({error})", "run make setup")
    except DetectorError as error:
        return split("detector", str(error))
    seen = f"torch {found.torch}, mmcv's operators run on {found.device} ({found.device_name})"
    if settings.device == "auto" and found.device == "cpu":
        return warning("detector", seen, "training on real images wants a GPU; DEVICE=cpu says that this is meant")
    return ok("detector", seen)


def service(settings: Settings, get: Callable[..., httpx.Response] = httpx.get) -> Finding:
    """Whether the service answers, at the address that Label Studio uses if that is known."""
    url = (settings.public_url or f"http://127.0.0.1:{settings.port}") + "/health"
    try:
        answer = get(url, timeout=HEALTH_TIMEOUT_S)
        well = answer.status_code == 200 and answer.json().get("model_class") == "PPALBackend"
    except (httpx.HTTPError, ValueError, AttributeError) as error:
        return failed(
            "service", f"nothing answers at {url} ({type(error).__name__})", "start ppal up, or correct PPAL_PUBLIC_URL"
        )
    if not well:
        return failed(
            "service", f"something else answers at {url} (status {answer.status_code})", "correct PPAL_PUBLIC_URL"
        )
    return ok("service", f"answers at {url}")
