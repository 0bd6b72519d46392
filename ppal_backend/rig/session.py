"""A small HTTP session with Label Studio that acts as one person, by token or by login."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import requests

from ppal_backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioUnavailable

logger = logging.getLogger(__name__)


class LabelStudioSession:
    """Requests to one Label Studio with either kind of token.

    A personal access token is exchanged for access tokens (300 s) as needed; any other token is sent as a legacy one.

    Args:
        base_url: Address of Label Studio.
        token: Personal access token or legacy token.
        timeout_s: Limit for every request.
    """

    def __init__(self, base_url: str, token: str, timeout_s: float = 120.0) -> None:
        self.base_url = base_url.rstrip("/")
        self._token = token
        self._timeout_s = timeout_s
        self._personal = token.count(".") == 2
        self._access = ""
        self._lock = threading.Lock()
        self._http = requests.Session()
        self._http.trust_env = False

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str, **options: Any) -> Any:
        """GET; see ``request``."""
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> Any:
        """POST; see ``request``."""
        return self.request("POST", path, **options)

    def request(self, method: str, path: str, **options: Any) -> Any:
        """Send a request and return the decoded JSON (None for an empty answer).

        Args:
            method: HTTP method.
            path: Path below the address, with a leading slash.
            options: As for ``requests.request``.

        Raises:
            LabelStudioUnavailable: No answer, or a server error.
            LabelStudioAuthError: The token was refused.
            LabelStudioError: Any other answer than 2xx; ``not_found`` tells a 404 apart.
        """
        answer = self._send(method, path, options)
        if answer.status_code == 401 and self._personal:
            self._access = ""
            answer = self._send(method, path, options)
        return decode(answer)

    def _send(self, method: str, path: str, options: Mapping[str, Any]) -> requests.Response:
        headers = {**options.get("headers", {}), "Authorization": self._authorization()}
        return send(self._http, method, self.base_url + path, self._timeout_s, **{**options, "headers": headers})

    def _authorization(self) -> str:
        if not self._personal:
            return f"Token {self._token}"
        with self._lock:
            if not self._access:
                url = f"{self.base_url}/api/token/refresh/"
                answer = send(self._http, "POST", url, self._timeout_s, json={"refresh": self._token})
                self._access = str(decode(answer)["access"])
            return f"Bearer {self._access}"


class NotFoundError(LabelStudioError):
    """Label Studio answered 404; the text is its own."""


def send(http: requests.Session, method: str, url: str, timeout_s: float, **options: Any) -> requests.Response:
    """Send one request; LabelStudioUnavailable when no answer comes."""
    try:
        return http.request(method, url, timeout=timeout_s, **options)
    except requests.RequestException as error:
        name = type(error).__name__
        raise LabelStudioUnavailable(f"expected Label Studio at {url}, got {name}; check that it runs") from error


def decode(answer: requests.Response) -> Any:
    """JSON of a 2xx answer, None when it is empty; otherwise the error that fits."""
    status, url = answer.status_code, answer.url.split("?")[0]
    text = " ".join(answer.text[:1000].split()) if status >= 300 else ""
    if status in (401, 403):
        raise LabelStudioAuthError(f"expected access to {url}, got {status} {text}; check the token")
    if status >= 500:
        raise LabelStudioUnavailable(f"expected an answer of {url}, got {status} {text}; look into its log")
    if status == 404:
        raise NotFoundError(f"expected {url}, got 404 {text}; check the address and the project")
    if status >= 300:
        raise LabelStudioError(f"expected {url} to take the request, got {status} {text}; correct it")
    if not answer.content:
        return None
    try:
        return answer.json()
    except ValueError as error:
        raise LabelStudioError(f"expected JSON of {url}, got something else; check the address") from error
