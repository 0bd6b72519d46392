"""One place for every request to Label Studio: signing, time limits, retries and error texts."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar

import httpx

from ppal_backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioUnavailable
from ppal_backend.label_studio.auth import TokenAuth

logger = logging.getLogger(__name__)
T = TypeVar("T")

WRITE_TIMEOUT_S = 300.0
_MAX_DELAY_S = 30.0
_SHOWN_BODY = 300
_WEB_PAGE = "a web page"
_PROXY_TIMEOUTS = (408, 504, 524)
BLOCKED = ("reserved network address", "URL provided was not allowed")


class NotFound(LabelStudioError):
    """Label Studio knows no such project, task or page."""


class Rejected(LabelStudioError):
    """Label Studio answered 4xx: it will not take this request as it is, however often it is sent."""


class TooLarge(Rejected):
    """A proxy before Label Studio, or itself, takes no request of this size."""


class TimedOut(LabelStudioUnavailable):
    """Label Studio did not finish an answer within the limit, ours or that of a proxy before it."""


class Transport:
    """Signed requests to one Label Studio, with failures as this package's errors.

    Only calls that are safe to repeat are repeated; a write is sent once and it is for the caller to read back.

    Args:
        base_url: Label Studio's address, with http:// or https://.
        api_key: Personal access token or legacy token; never shown.
        timeout_s: Limit in seconds for reads; writes get at least :data:`WRITE_TIMEOUT_S`.
        tries: How often a repeatable call is sent in all.
        backoff_s: Wait before the second try; doubled for each further one.
        http_transport: Replaces the network (tests).
        sleep: Replaces waiting (tests).

    Raises:
        LabelStudioError: ``base_url`` is no http(s) address.
        LabelStudioAuthError: See :class:`TokenAuth`.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        timeout_s: float = 120.0,
        tries: int = 4,
        backoff_s: float = 0.5,
        http_transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.base_url = base_url.strip().rstrip("/")
        if not self.base_url.startswith(("http://", "https://")) or not httpx.URL(self.base_url).host:
            raise LabelStudioError(
                "expected Label Studio's address such as http://localhost:8080, got one without http:// or "
                "https://; set LABEL_STUDIO_URL"
            )
        self.auth = TokenAuth(self.base_url, api_key)
        self.timeout_s = timeout_s
        self.sleep = sleep
        self._tries = max(1, tries)
        self._backoff_s = backoff_s
        self.http = httpx.Client(
            auth=self.auth,
            timeout=httpx.Timeout(timeout_s, connect=min(10.0, timeout_s)),
            transport=http_transport,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )

    def __repr__(self) -> str:
        return f"Transport({self.base_url!r}, {self.auth!r})"

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    def get(self, path: str, params: Mapping[str, Any] | None = None, timeout_s: float | None = None) -> Any:
        """GET ``path`` and return its JSON; repeated with back-off while Label Studio is unavailable."""
        return self.repeat(lambda: self._json(self._send("GET", path, params=params, timeout_s=timeout_s)))

    def write(
        self, method: str, path: str, *, json: Any = None, content: bytes | None = None, timeout_s: float | None = None
    ) -> Any:
        """Send one POST, PATCH or DELETE, once, and return its JSON (None for an empty answer)."""
        limit = max(timeout_s or 0.0, self.timeout_s, WRITE_TIMEOUT_S)
        return self._json(self._send(method, path, json=json, content=content, timeout_s=limit))

    @contextmanager
    def stream(
        self, path: str, params: Mapping[str, Any] | None = None, timeout_s: float | None = None
    ) -> Iterator[httpx.Response]:
        """GET ``path`` as a stream; the answer's status is checked, its body is the caller's."""
        request = self._build("GET", path, params=params, timeout_s=timeout_s)
        with self._translate_errors(request):
            response = self.http.send(request, stream=True)
            try:
                self._check(response)
                yield response
            finally:
                response.close()

    def repeat(self, call: Callable[[], T], but: tuple[type[LabelStudioUnavailable], ...] = ()) -> T:
        """Run ``call``, again with back-off as long as it raises :class:`LabelStudioUnavailable`, ``but`` these."""
        for attempt in range(1, self._tries):
            try:
                return call()
            except but:
                raise
            except LabelStudioUnavailable as error:
                delay_s = min(self._backoff_s * 2 ** (attempt - 1), _MAX_DELAY_S) * (1 + random.random() / 4)
                logger.warning("%s; try %d of %d in %.1f s", error, attempt + 1, self._tries, delay_s)
                self.sleep(delay_s)
        return call()

    def sdk_call(self, call: Callable[[], T]) -> T:
        """Run an SDK call, with its failures as this package's errors."""
        from label_studio_sdk.core.api_error import ApiError

        try:
            with self._translate_errors(None):
                return call()
        except ApiError as error:
            raise self._error(error.status_code or 0, _detail(error.body), "a call through the SDK") from None

    def _build(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        content: bytes | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Request:
        limit = timeout_s or self.timeout_s
        headers = {"Content-Type": "application/json"} if content is not None else None
        return self.http.build_request(
            method,
            self.base_url + path,
            params=params,
            json=json,
            content=content,
            headers=headers,
            timeout=httpx.Timeout(limit, connect=min(10.0, limit)),
        )

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        request = self._build(method, path, **options)
        with self._translate_errors(request):
            response = self.http.send(request)
        self._check(response)
        return response

    @contextmanager
    def _translate_errors(self, request: httpx.Request | None) -> Iterator[None]:
        what = f" for {request.method} {request.url.path}" if request is not None else ""
        try:
            yield
        except httpx.TimeoutException as error:
            raise TimedOut(
                f"Label Studio at {self.base_url} did not answer in time{what} ({type(error).__name__}); "
                "check that it is up and not overloaded"
            ) from None
        except (httpx.TransportError, httpx.StreamError) as error:
            if problem := certificate_problem(error, self.base_url):
                raise LabelStudioError(problem) from None
            raise LabelStudioUnavailable(
                f"cannot reach Label Studio at {self.base_url}{what}: {self.auth.redact(str(error))}; "
                "check that it is up and that LABEL_STUDIO_URL is the address seen from here"
            ) from None

    def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        response.read()
        what = f"{response.request.method} {response.request.url.path}"
        if response.is_redirect:
            location = response.headers.get("location", "")
            raise LabelStudioError(
                f"expected an answer to {what}, got a redirect to {location.split('?')[0]!r}; set LABEL_STUDIO_URL to "
                "the address that Label Studio answers on itself"
            )
        raise self._error(response.status_code, _reason(response), what)

    def _error(self, status: int, reason: str, what: str) -> LabelStudioError:
        reason = self.auth.redact(reason)[:_SHOWN_BODY]
        if status == 403 and any(phrase in reason for phrase in BLOCKED):
            return Rejected(
                f"Label Studio refuses this address for {what} ({reason}); start Label Studio with "
                "ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false (both are needed)"
            )
        if status in (401, 403) and reason == _WEB_PAGE:
            return LabelStudioError(
                f"expected Label Studio to answer {what}, got status {status} with a web page: something before it "
                "asks for a login of its own; set LABEL_STUDIO_URL to an address that leads to Label Studio itself"
            )
        if status in (401, 403):
            word = "a personal access token" if self.auth.kind == "pat" else "a legacy token"
            return LabelStudioAuthError(
                f"Label Studio refused {word} for {what} (status {status}: {reason}); {self.auth.advice}"
            )
        if status >= 500 or status in (408, 425, 429):
            kind_of = TimedOut if status in _PROXY_TIMEOUTS else LabelStudioUnavailable
            return kind_of(f"Label Studio answered {status} to {what}; try again, see its log if it lasts")
        if status == 413:
            return TooLarge(
                f"something before Label Studio takes no {what} of this size (status 413); raise its limit, such as "
                "nginx's client_max_body_size"
            )
        kind = NotFound if status == 404 else Rejected
        return kind(f"Label Studio answered {status} to {what}: {reason}")

    def _json(self, response: httpx.Response) -> Any:
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError:
            raise LabelStudioError(
                f"expected JSON from {response.request.url.path}, got {response.headers.get('content-type')}; "
                "check that LABEL_STUDIO_URL points to Label Studio"
            ) from None


def certificate_problem(error: Exception, url: str) -> str:
    """What is wrong with the certificate of ``url`` and what to do, "" when a connection failed for another reason."""
    if "CERTIFICATE_VERIFY_FAILED" not in str(error):
        return ""
    reason = str(error).rpartition("verify failed:")[2].split("(_ssl")[0].strip()[:120] or "not trusted"
    return (
        f"expected a certificate of {url} that can be verified, got one that cannot ({reason}); set SSL_CERT_FILE to "
        "the file of the authority that signed it, or of the certificate itself where it is self-signed"
    )


def _reason(response: httpx.Response) -> str:
    if "html" in response.headers.get("content-type", ""):
        return _WEB_PAGE
    try:
        body = response.json()
    except ValueError:
        return response.text
    return _detail(body)


def _detail(body: Any) -> str:
    if not isinstance(body, dict):
        return str(body)
    details = _flat(body.get("validation_errors") or "")
    return f"{body.get('detail', '')} {details}".strip() or str(body)


def _flat(errors: Any) -> str:
    """Errors by field as one line."""
    if isinstance(errors, dict):
        fields = [(name, _flat(value)) for name, value in errors.items()]
        return "; ".join(text if name == "non_field_errors" else f"{name}: {text}" for name, text in fields)
    if isinstance(errors, list):
        return ", ".join(map(_flat, errors))
    return " ".join(str(errors).split())
