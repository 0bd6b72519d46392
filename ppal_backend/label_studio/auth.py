"""Where one Label Studio is, and which requests may carry its token.

Tasks, redirects and browsers name Label Studio as people see it, the backend reaches it as the operator set it: another
host name, a port of its own, a proxy with a path in front. All of these are one Label Studio (:class:`Addresses`). What
is asked of it is always asked at the backend's own address, so the token goes there and nowhere else, whatever anybody
calls himself (:class:`TokenAuth`).
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx

from ppal_backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioUnavailable

REFRESH_PATH = "/api/token/refresh/"
_RENEW_BEFORE_S = 60.0
_DEFAULT_LIFETIME_S = 300.0

_ADVICE = {
    "pat": (
        "create a new one in Label Studio under Account & Settings > Personal Access Token "
        "and set LABEL_STUDIO_API_KEY to it"
    ),
    "legacy": (
        "legacy tokens are off by default: create a personal access token under Account & Settings > "
        "Personal Access Token and set LABEL_STUDIO_API_KEY to it, or allow legacy tokens under "
        "Organization > API Tokens Settings"
    ),
}


def same_origin(url: httpx.URL, base: httpx.URL) -> bool:
    """Tell whether ``url`` is on the scheme, host and port of ``base`` (or on its https twin)."""
    if url.host != base.host:
        return False
    if url.scheme == base.scheme:
        return _port(url) == _port(base)
    return (base.scheme, _port(base), url.scheme, _port(url)) == ("http", 80, "https", 443)


def _rest_below(base: httpx.URL, url: httpx.URL) -> str | None:
    """Path and query of ``url`` below ``base``, from the slash on and as written; None when it is not below it."""
    prefix, path = base.raw_path.decode("ascii").rstrip("/"), url.raw_path.decode("ascii")
    return path.removeprefix(prefix) if same_origin(url, base) and path.startswith(prefix + "/") else None


def _port(url: httpx.URL) -> int | None:
    return url.port or {"http": 80, "https": 443}.get(url.scheme)


@dataclass(frozen=True)
class Addresses:
    """One Label Studio under all its names.

    Args:
        base: Its address as the backend reaches it, without a slash at its end.
        others: Further addresses of the same one: as people's browsers reach it, as it calls itself. They may be
            told by anybody: all they do is to have requests sent to ``base`` instead.
    """

    base: str
    others: Sequence[str] = ()

    def at_base(self, url: str) -> str | None:
        """Where the backend reaches what an absolute address or a path on Label Studio's host names.

        Args:
            url: ``http(s)://…``, or a path that begins with a slash.

        Returns:
            The address below ``base``, or None when it is not Label Studio's.

        Raises:
            httpx.InvalidURL: ``url`` cannot be read.
        """
        if url.startswith("/"):
            known = (urlsplit(address).path.rstrip("/") for address in (self.base, *self.others))
            prefix = next((p for p in known if p and url.startswith(p + "/")), "")
            return self.base + url.removeprefix(prefix)
        parsed = httpx.URL(url)
        if _rest_below(httpx.URL(self.base), parsed) is not None:
            return url
        rests = (_rest_below(httpx.URL(address), parsed) for address in self.others)
        return next((self.base + rest for rest in rests if rest is not None), None)

    def path_of(self, url: str) -> str:
        """The path of one of Label Studio's own addresses below its base, decoded, without query."""
        base = unquote(httpx.URL(self.base).path).rstrip("/")
        return unquote(unquote(httpx.URL(url).path)).removeprefix(base)


def token_claims(token: str) -> dict[str, Any] | None:
    """Return the claims of a JSON web token without checking its signature, or None for any other string."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        payload = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
        claims = json.loads(payload)
    except (binascii.Error, ValueError):
        return None
    return claims if isinstance(claims, dict) else None


def _not_label_studio(response: httpx.Response) -> str:
    """The error text when something else answers where tokens are exchanged: the token is not to blame."""
    kind = response.headers.get("content-type", "").split(";")[0] or "no content type"
    answer = f"status {response.status_code} ({kind})"
    if response.is_redirect:
        answer = f"a redirect to {response.headers.get('location', '').split('?')[0][:200]!r}"
    url = response.request.url
    return (
        f"expected Label Studio at {url.copy_with(path=url.path.removesuffix(REFRESH_PATH) or '/')}, got {answer} to "
        f"POST {url.path}: this is not Label Studio's address, or a proxy before it takes no such request; set "
        "LABEL_STUDIO_URL to the address that Label Studio answers on itself"
    )


class TokenAuth(httpx.Auth):
    """Sign requests to Label Studio's own origin, and no others.

    The kind is told by shape: a personal access token is a JSON web token of type "refresh" and is exchanged
    for access tokens that live 300 s; anything else is a legacy token. Lifetimes are counted on the monotonic
    clock from the server's own claims, so a wrong wall clock does no harm, and a 401 renews the access token once.

    Args:
        base_url: Label Studio's address.
        api_key: Personal access token or legacy token.
        clock: Monotonic seconds.

    Raises:
        LabelStudioAuthError: No token was given, or it is a short-lived access token.
    """

    def __init__(self, base_url: str, api_key: str, clock: Callable[[], float] = time.monotonic) -> None:
        api_key = api_key.strip()
        if not api_key:
            raise LabelStudioAuthError(f"expected a Label Studio token, got none; {_ADVICE['pat']}")
        if not api_key.isascii() or any(c.isspace() for c in api_key):
            raise LabelStudioAuthError(
                f"expected a token of plain letters and digits, got spaces or other characters; {_ADVICE['pat']}"
            )
        claims = token_claims(api_key)
        if claims is not None and claims.get("token_type") == "access":
            raise LabelStudioAuthError(
                "expected a personal access token or a legacy token, got an access token that lives five minutes; "
                + _ADVICE["pat"]
            )
        self.kind = "legacy" if claims is None else "pat"
        self._base = httpx.URL(base_url)
        self._refresh_url = base_url.rstrip("/") + REFRESH_PATH
        self._api_key = api_key
        self._clock = clock
        self._access: tuple[str, float] | None = None

    def __repr__(self) -> str:
        return f"TokenAuth(kind={self.kind!r})"

    @property
    def advice(self) -> str:
        """What to do when this token is refused."""
        return _ADVICE[self.kind]

    def redact(self, text: str) -> str:
        """Return ``text`` without any token that this object knows."""
        for secret in (self._api_key, self._access[0] if self._access else ""):
            if secret:
                text = text.replace(secret, "[token]")
        return text

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Sign ``request``; exchange or renew the access token where needed."""
        if not same_origin(request.url, self._base):
            request.headers.pop("Authorization", None)
            yield request
            return
        if self.kind == "legacy":
            request.headers["Authorization"] = f"Token {self._api_key}"
            yield request
            return
        fresh = self._access is None or self._clock() >= self._access[1]
        if fresh:
            self._store((yield self._refresh_request(request)))
        request.headers["Authorization"] = self._bearer()
        response = yield request
        if response.status_code == 401 and not fresh:
            response.read()
            self._store((yield self._refresh_request(request)))
            request.headers["Authorization"] = self._bearer()
            yield request

    def _bearer(self) -> str:
        return f"Bearer {self._access[0] if self._access else ''}"

    def _refresh_request(self, request: httpx.Request) -> httpx.Request:
        extensions = {k: v for k, v in request.extensions.items() if k == "timeout"}
        return httpx.Request("POST", self._refresh_url, json={"refresh": self._api_key}, extensions=extensions)

    def _store(self, response: httpx.Response) -> None:
        response.read()
        status = response.status_code
        if status >= 500 or status == 429:
            raise LabelStudioUnavailable(f"Label Studio answered {status} when asked for an access token; try again")
        try:
            access = response.json()["access"] if status == 200 else None
        except (ValueError, KeyError, TypeError):
            access = None
        if status in (400, 401, 403) and "json" in response.headers.get("content-type", ""):
            raise LabelStudioAuthError(
                f"Label Studio refused the personal access token (status {status}); {self.advice}"
            )
        if not isinstance(access, str) or not access:
            raise LabelStudioError(_not_label_studio(response))
        claims = token_claims(access) or {}
        issued, expires = claims.get("iat"), claims.get("exp")
        known = isinstance(issued, int | float) and isinstance(expires, int | float)
        lifetime_s = float(expires - issued) if known else _DEFAULT_LIFETIME_S  # type: ignore[operator]
        margin_s = min(_RENEW_BEFORE_S, lifetime_s / 2)
        self._access = (access, self._clock() + max(lifetime_s - margin_s, 0.0))
