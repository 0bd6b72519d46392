"""Who may call: HTTP Basic for people and Label Studio, one token per project for its webhook.

Label Studio sends Basic credentials with every call that it makes for a model connection, but none with
the webhook that it sets up itself. The backend therefore writes a bearer token into the headers of that
webhook: ``webhook_token`` makes it, and it opens ``/webhook`` for that one project and nothing else.

Label Studio counts the deliveries that a webhook's address refuses, and switches the webhook off after 50 of them. So
an event that does not prove where it comes from is answered with 200, and ignored.
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

from flask import Flask, Response, g, has_request_context, jsonify, request
from werkzeug.datastructures import Authorization

from ppal_backend.errors import SettingsError
from ppal_backend.service.http_errors import answer
from ppal_backend.settings import Settings

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})
READY_PATH = "/ready"
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


def may_send_events_of(project_id: int) -> bool:
    """Whether this request may bring an event of a project: with a webhook's token only of the token's own."""
    return not has_request_context() or g.get("webhook_project") in (None, project_id)


def install_before(app: Flask, settings_of: Callable[[], Settings]) -> None:
    """Let a webhook's token pass an ``app`` whose own check, installed before, knows Basic authentication alone.

    An event with a valid token goes on with the user and password that this check asks for; one that proves nothing
    is answered here, before the check would refuse it.

    Args:
        app: label-studio-ml's.
        settings_of: the operator's settings, asked for at a request.
    """

    def translate() -> Response | None:
        settings = settings_of()
        if request.path != WEBHOOK_PATH or request.method != "POST" or not is_on(settings):
            return None
        user, password = settings.basic_auth_user, settings.basic_auth_pass.get_secret_value()
        refusal = _guard(user, password).check()
        if refusal is None:
            request.authorization = Authorization("basic", {"username": user, "password": password})
        return refusal

    app.before_request_funcs.setdefault(None, []).insert(0, translate)


@lru_cache(maxsize=1)
def _guard(user: str, password: str) -> Guard:
    return Guard(user, password)


class Guard:
    """Lets a request through, or answers 401, or 429 to an address that keeps sending wrong credentials.

    A request without credentials counts for nothing, nor does a webhook's token that is no longer valid: Label
    Studio's own webhook has none until the backend gives it some, and it must not lock its Label Studio out.
    """

    def __init__(self, user: str, password: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._user, self._password = user.encode(), password.encode()
        self._failures = Failures(MOST_FAILURES, WINDOW_S, clock)
        _signing_key(password)  # made now rather than in the first webhook

    def check(self) -> Response | None:
        """None to go on, else the answer."""
        if request.path in OPEN_PATHS:
            return None
        if request.path == READY_PATH and "Authorization" not in request.headers:
            g.status_only = True  # probes have no credentials, and whoever has none is told no reasons
            return None
        address = request.remote_addr or ""
        wait_s = self._failures.blocked_for(address)
        event = request.path == WEBHOOK_PATH and request.method == "POST"
        with_token = event and _is_bearer()  # nobody guesses one, so it is looked at whatever else was sent
        if (wait_s <= 0 or with_token) and self._is_known():
            return None
        if wait_s <= 0 and "Authorization" in request.headers and not with_token:
            self._failures.add(address)
            log.warning("wrong credentials from %s for %r", address, request.path)
        if event:
            log.warning("an event from %s was ignored: it does not prove where it comes from", address)
            return jsonify(status="ignored", reason="credentials are missing or wrong; run ppal connect")
        if wait_s > 0:
            response = answer("too many requests with wrong credentials; wait a minute", 429)
            response.headers["Retry-After"] = str(int(wait_s) + 1)
            return response
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


def _is_bearer() -> bool:
    return request.headers.get("Authorization", "").lower().startswith("bearer ")


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
