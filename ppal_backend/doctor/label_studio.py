"""Checks of Label Studio itself: there, known version, token, clock."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime

from ppal_backend.doctor.finding import Finding, failed, ok, split, warning
from ppal_backend.errors import LabelStudioAuthError, LabelStudioError
from ppal_backend.label_studio.client import LabelStudioClient

TESTED = (1, 23)
MOST_SKEW_S = 60.0


def reachable(client: LabelStudioClient) -> Finding:
    """Whether it answers, and as which version."""
    try:
        version = client.version()
    except LabelStudioAuthError as error:
        return split("label studio", str(error))
    except LabelStudioError as error:
        return split("label studio", str(error))
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
        return split("token", str(error))
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
        return split("clock", str(error))
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
