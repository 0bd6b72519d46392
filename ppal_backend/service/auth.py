"""Who may call: HTTP Basic for people and Label Studio, one token per project for its webhook.

Label Studio sends Basic credentials with every call that it makes for a model connection, but none with
the webhook that it sets up itself. The backend therefore writes a bearer token into the headers of that
webhook: ``webhook_token`` makes it, and it opens ``/webhook`` for that one project and nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache

from flask import Flask, Response, g, request

from ppal_backend.errors import SettingsError
from ppal_backend.service.problems import RequestError, answer
from ppal_backend.settings import Settings

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})
WEBHOOK_PATH = "/webhook"
MOST_FAILURES = 10
WINDOW_S = 60.0
MOST_ADDRESSES = 4096
KEY_ROUNDS = 100_000


def is_on(settings: Settings) -> bool:
    """Whether callers have to identify themselves.

    Raises:
        SettingsError: only one of user and password is set.
    """
    user, password = settings.basic_auth_user, settings.basic_auth_pass.get_secret_value()
    if bool(user) != bool(password):
        raise SettingsError("expected BASIC_AUTH_USER and BASIC_AUTH_PASS to be both set or both unset; set both")
    return bool(user)


def webhook_token(settings: Settings, project_id: int) -> str | None:
    """The bearer token for a project's webhook; None when no authentication is set up.

    It starts with the project's id, so it can be checked before the request's body is read, and cannot be
    used for another project. The password cannot be told from it.
    """
    if not is_on(settings):
        return None
    return f"{project_id}.{_signature(settings.basic_auth_pass.get_secret_value(), project_id)}"


def _signature(password: str, project_id: int) -> str:
    return hmac.new(_signing_key(password), f"webhook {project_id}".encode(), hashlib.sha256).hexdigest()


@lru_cache(maxsize=8)
def _signing_key(password: str) -> bytes:
    # Stretched, because whoever may read a project's webhooks sees the token and could guess at leisure.
    return hashlib.pbkdf2_hmac("sha256", password.encode(), b"ppal webhook token", KEY_ROUNDS)


def install(app: Flask, settings: Settings) -> None:
    """Check every request to ``app`` except those to ``OPEN_PATHS``; nothing to do when auth is not set up.

    Raises:
        SettingsError: only one of user and password is set.
    """
    if is_on(settings):
        guard = Guard(settings.basic_auth_user, settings.basic_auth_pass.get_secret_value())
        app.before_request(guard.check)


def check_webhook_project(project_id: int) -> None:
    """Refuse a webhook that came with the token of another project.

    Raises:
        RequestError: (403) the token does not belong to ``project_id``.
    """
    allowed = g.get("webhook_project")
    if allowed is not None and allowed != project_id:
        raise RequestError("this webhook's token belongs to another project", status=403)


class Guard:
    """Lets a request through, or answers 401, or 429 to an address that keeps sending wrong credentials.

    A request without credentials counts for nothing: Label Studio's own webhook has none until the
    backend gives it some, and it must not lock its Label Studio out.
    """

    def __init__(self, user: str, password: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._user, self._password = user.encode(), password.encode()
        self._failures = Failures(MOST_FAILURES, WINDOW_S, clock)
        _signing_key(password)  # made now rather than in the first webhook

    def check(self) -> Response | None:
        """None to go on, else the answer."""
        if request.path in OPEN_PATHS:
            return None
        address = request.remote_addr or ""
        wait_s = self._failures.blocked_for(address)
        if wait_s > 0:
            response = answer("too many requests with wrong credentials; wait a minute", 429)
            response.headers["Retry-After"] = str(int(wait_s) + 1)
            return response
        if self._is_known():
            return None
        if "Authorization" in request.headers:
            self._failures.add(address)
            log.warning("wrong credentials from %s for %r", address, request.path)
        response = answer(
            "credentials are missing or wrong; give this backend's user name and password (BASIC_AUTH_USER and "
            "BASIC_AUTH_PASS; in Label Studio's form: Basic Authentication)",
            401,
        )
        response.headers["WWW-Authenticate"] = 'Basic realm="ppal", charset="UTF-8"'
        return response

    def _is_known(self) -> bool:
        try:
            given = request.authorization
        except ValueError:  # Basic with something that is no base64 at all
            return False
        if given is None:
            return False
        if given.type == "bearer":
            return request.path == WEBHOOK_PATH and self._has_token(given.token or "")
        return given.type == "basic" and self._is_user(given.username or "", given.password or "")

    def _is_user(self, user: str, password: str) -> bool:
        # Both are always compared, so that the time taken tells nothing about which one was wrong.
        same_user = hmac.compare_digest(_bytes(user), self._user)
        same_password = hmac.compare_digest(_bytes(password), self._password)
        return same_user and same_password

    def _has_token(self, token: str) -> bool:
        project, _, signature = token.partition(".")
        number = int(project) if project.isascii() and project.isdigit() and len(project) <= 10 else 0
        wanted = _signature(self._password.decode(), number)
        if not hmac.compare_digest(_bytes(signature), wanted.encode()):
            return False
        g.webhook_project = number
        return True


class Failures:
    """Counts failures by address within a sliding window; forgets the oldest address when there are many."""

    def __init__(self, most: int, window_s: float, clock: Callable[[], float]) -> None:
        self._most, self._window_s, self._clock = most, window_s, clock
        self._times: OrderedDict[str, list[float]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, address: str) -> None:
        """One more failure from ``address``."""
        with self._lock:
            times = [*self._recent(address), self._clock()][-self._most :]
            self._times[address] = times
            self._times.move_to_end(address)
            while len(self._times) > MOST_ADDRESSES:
                self._times.popitem(last=False)

    def blocked_for(self, address: str) -> float:
        """Seconds until ``address`` may try again; 0 when it may now."""
        with self._lock:
            if address not in self._times:
                return 0.0
            times = self._recent(address)
            return times[0] + self._window_s - self._clock() if len(times) >= self._most else 0.0

    def _recent(self, address: str) -> list[float]:
        since = self._clock() - self._window_s
        return [t for t in self._times.get(address, ()) if t > since]


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
