"""Checks of what all projects share: this machine and its service, the backend's address, and Label Studio itself."""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Callable
from contextlib import closing
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx

from ppal_backend.doctor import Finding, failed, from_problem, ok, warning
from ppal_backend.errors import (
    ArtifactsUnavailable,
    DetectorError,
    LabelStudioAuthError,
    LabelStudioError,
    QueueUnavailable,
    SettingsError,
    StateError,
    StoreUnavailable,
)
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.image_source import is_public, resolve
from ppal_backend.operations.detectors import default_here
from ppal_backend.rounds.bucket import Bucket
from ppal_backend.service import auth, readiness
from ppal_backend.settings import Settings
from ppal_backend.store import Store, find_store, hint_of_another
from ppal_backend.worker.queue import open_queue

HEALTH_TIMEOUT_S = 3.0
TESTED = (1, 23)
MOST_SKEW_S = 60.0
SWITCHES = (
    "start Label Studio with ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false (both are needed), "
    "or with USE_DEFAULT_BANNED_SUBNETS=false"
)


def credentials(settings: Settings) -> Finding:
    """Whether callers must identify themselves."""
    try:
        if auth.is_on(settings):
            return ok("credentials", "callers must know BASIC_AUTH_USER and BASIC_AUTH_PASS")
    except SettingsError as error:
        return from_problem("credentials", str(error))
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
        return [from_problem("state", str(error))]
    except StoreUnavailable as error:
        away = str(error)
    problems = readiness.problems(settings, store)
    if away and not problems["database"]:
        problems = {"database": away, "disk": problems["disk"]}  # of the worker nobody knows
    found += [from_problem(name, problem) if problem else ok(name, _WELL[name]) for name, problem in problems.items()]
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
        return from_problem("artifacts", str(error))
    return ok("artifacts", f"{bucket.name} takes and gives objects")


_WELL = {"database": "answers", "worker": "has shown a sign of life", "disk": "has room"}


def detector_stack(settings: Settings) -> list[Finding]:
    """torch, the device and mmcv's operators; and, where these are well, the weights that trainings begin with."""
    try:
        from ppal_backend.detector.environment import check_environment

        found = check_environment(settings.device)
    except ImportError as error:
        return [failed("detector", f"the detector's packages cannot be imported ({error})", "run make setup")]
    except DetectorError as error:
        return [from_problem("detector", str(error))]
    seen = f"torch {found.torch}, mmcv's operators run on {found.device} ({found.device_name})"
    if settings.device == "auto" and found.device == "cpu":
        stack = warning("detector", seen, "training on real images wants a GPU; DEVICE=cpu says that this is meant")
    else:
        stack = ok("detector", seen)
    return [stack, detector_weights(settings, found.device)]


def detector_weights(settings: Settings, device: str) -> Finding:
    """What new projects train unless they say otherwise, and whether its initial weights can be had here.

    Args:
        settings: the operator's settings.
        device: where detectors run on this machine, such as ``cpu``.
    """
    try:
        found = default_here(settings, device.split(":")[0])
    except DetectorError as error:
        return from_problem("weights", str(error))
    if found.advice:
        seen = f"new projects would get {found.name}, which is for trying out and not for photographs ({found.reason})"
        return warning("weights", seen, found.advice)
    return ok("weights", f"new projects train {found.text}")


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


def usable_host(url: str) -> str:
    """Why Label Studio makes no webhook to an address, "" if it does: it wants a dot in the host name."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or ("." in host and "_" not in host) or _is_ip(host):
        return ""
    return (
        f"the host name {host!r} has no dot (or an underscore): Label Studio connects it, but silently makes no webhook"
    )


def address(url: str, resolver: Callable[[str, int], list[str]] = resolve) -> Finding:
    """The backend's address as Label Studio reaches it."""
    if not url:
        return warning(
            "address",
            "PPAL_PUBLIC_URL is not set, so the backend knows only its one connection's address",
            "set it to this backend's address as Label Studio reaches it, such as http://ppal.local:9090",
        )
    problem = usable_host(url)
    if problem:
        return failed(
            "address", problem, "give the backend a name with a dot, such as ppal.local, or use an IP address"
        )
    host = urlsplit(url).hostname or ""
    try:
        found = resolver(host, urlsplit(url).port or 80)
    except (OSError, UnicodeError):
        return warning(
            "address",
            f"{host} cannot be resolved from here",
            "fine if Label Studio can resolve it; otherwise correct PPAL_PUBLIC_URL",
        )
    if not all(is_public(ip) for ip in found):
        return ok("address", f"{url} lies in a private network: Label Studio needs its switches for that ({SWITCHES})")
    return ok("address", url)


def _is_ip(host: str) -> bool:
    try:
        socket.inet_aton(host) if "." in host else ipaddress.ip_address(host)
    except (OSError, ValueError):
        return False
    return True


def reachable(client: LabelStudioClient) -> Finding:
    """Whether it answers, and as which version."""
    try:
        version = client.version()
    except LabelStudioAuthError as error:
        return from_problem("label studio", str(error))
    except LabelStudioError as error:
        return from_problem("label studio", str(error))
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        return failed(
            "label studio", f"{client.url} answers, but tells no version", "check that LABEL_STUDIO_URL is Label Studio"
        )
    seen = f"version {version} at {client.url}"
    if (int(match[1]), int(match[2])) < TESTED:
        wanted = ".".join(map(str, TESTED))
        return warning("label studio", seen, f"this backend is tested with {wanted}; upgrade if something goes wrong")
    return ok("label studio", seen)


def token(client: LabelStudioClient) -> Finding:
    """Whether the token is taken, and of which kind it is."""
    try:
        user = client.whoami()
    except LabelStudioError as error:
        return from_problem("token", str(error))
    kind = "personal access token" if client.token_kind == "pat" else "legacy token"
    seen = f"{kind} of {user.get('email') or user.get('id')}"
    if client.token_kind == "legacy":
        return warning("token", seen, "legacy tokens are off by default in new versions; make a personal access token")
    return ok("token", seen)


def clock(client: LabelStudioClient, now: Callable[[], float] = time.time) -> Finding:
    """How far this machine's clock is from Label Studio's, by the Date header of an answer."""
    try:
        before = now()
        with client.transport.stream("/api/version") as answer:
            told = answer.headers.get("Date", "")
        here = (before + now()) / 2
        skew_s = parsedate_to_datetime(told).timestamp() - here
    except LabelStudioError as error:
        return from_problem("clock", str(error))
    except ValueError:
        return warning("clock", "Label Studio's answers carry no date", "compare the clocks by hand")
    if abs(skew_s) > MOST_SKEW_S:
        which = "ahead of" if skew_s < 0 else "behind"
        return failed(
            "clock",
            f"this machine's clock is {abs(skew_s):.0f} s {which} Label Studio's",
            "synchronise both machines by NTP: signed image addresses and log times depend on it",
        )
    return ok("clock", "agrees with Label Studio's")
