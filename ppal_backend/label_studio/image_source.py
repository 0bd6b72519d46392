"""Opens a task's image wherever it lies, without lending Label Studio's token or our network to anybody.

An address in a task's data is classified first (:func:`target_of`): Label Studio's own, with or without the token, or
another host. Other hosts are held against what the operator allows (:class:`HostRules`), on the very address that is
connected to (:class:`GuardedNetwork`).
"""

from __future__ import annotations

import base64
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import httpcore
import httpx

from ppal_backend.errors import (
    ImageError,
    ImageInterrupted,
    LabelStudioAuthError,
    LabelStudioError,
    LabelStudioUnavailable,
)
from ppal_backend.label_studio.auth import Addresses
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.transport import certificate_problem

Resolver = Callable[[str, int], list[str]]
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ADVICE = "add it to PPAL_ALLOWED_IMAGE_HOSTS if images shall come from there"

CLOUD_SCHEMES = ("s3", "gs", "azure-blob")
_SIGNED_PATHS = ("/data/", "/storage-data/", "/tasks/", "/projects/")
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (429, 503)  # also what a proxy answers that limits requests: waiting helps
_NO_ANSWER_BEHIND = (502, 504)
_CHUNK = 1 << 16
MOST_SILENCES = 3
SILENT_S = 60.0
_NETWORK_ERRORS = (
    httpx.TransportError,
    httpcore.NetworkError,
    httpcore.TimeoutException,
    httpcore.ProtocolError,
)


@dataclass(frozen=True)
class Target:
    """An absolute address, whether it may carry the token, and whether it is Label Studio's own."""

    url: str
    signed: bool
    own: bool = True


def target_of(task_id: int, url: str, own: Addresses) -> Target:
    """Return where the image of a task's data lies.

    Args:
        task_id: Task, needed for cloud addresses.
        url: Address in the task's data: ``/data/upload/…``, ``/data/local-files/?d=…``, http(s), ``s3://``, ``gs://``
            or ``azure-blob://`` (fetched through Label Studio, which holds the storage's credentials).
        own: Label Studio's addresses.

    Raises:
        ImageError: Another scheme, no absolute address, credentials in it, or ``..`` in a path of Label Studio.
    """
    url = url.strip()
    scheme = url.split(":", 1)[0].lower() if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url) else ""
    place = re.split("[?#]", url)[0]
    on_windows = "\\" not in place and ".." not in url  # the query then names a local file there
    if re.search(r"[\x00-\x1f\x7f]", url) or ("\\" in url and not on_windows):
        raise ImageError(
            "expected a plain address, got one with control characters or backslashes; correct the task's data"
        )
    if scheme in CLOUD_SCHEMES:
        coded = base64.urlsafe_b64encode(url.encode()).decode()
        return Target(f"{own.base}/tasks/{int(task_id)}/resolve/?fileuri={coded}", True)
    url = url.replace("\\", "%5C")
    if scheme and scheme not in ("http", "https"):
        raise ImageError(
            f"expected an http(s), cloud storage or uploaded image, got {scheme}:; import the image another way"
        )
    if not scheme and not url.startswith("/"):
        raise ImageError(
            f"expected an absolute address such as https://… or /data/upload/…, got {url[:60]!r}; correct it"
        )
    if url.startswith("//"):
        url = f"{urlsplit(own.base).scheme}:{url}"
    return classify(url, own)


def classify(url: str, own: Addresses) -> Target:
    """Return an http(s) address, or a path of Label Studio, as a target; see :func:`target_of` for what is refused."""
    try:
        ours = own.at_base(url)
        parsed = httpx.URL(url if ours is None else ours)
        named = parsed if url.startswith("/") else httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError):
        raise ImageError("expected a valid address, got one that cannot be read; correct the task's data") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ImageError(
            f"expected an http(s) address with a host, got scheme {parsed.scheme!r}; correct the task's data"
        )
    if named.userinfo:
        raise ImageError("expected an address without user name and password, got one with; use a storage connection")
    if ours is None:
        return Target(str(parsed), False, own=False)
    written = unquote(unquote(re.split("[?#]", url)[0]))
    if ".." in written.split("/"):
        raise ImageError("expected a path without '..', got one with; correct the task's data")
    return Target(str(parsed), own.path_of(ours).startswith(_SIGNED_PATHS))


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: str) -> bool:
    """Tell whether an IP address is on the public internet, looking through IPv4 packed into IPv6."""
    try:
        ip: _Address = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.teredo is not None:
            return False
        packed = ip.ipv4_mapped or ip.sixtofour
        if packed is None and ip in _NAT64:
            packed = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = packed or ip
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class HostRules:
    """What the operator allows.

    Args:
        allowed_hosts: Host names or ``host:port``, which may lie in private networks too; ``.suffix`` for all hosts
            below a domain and ``*`` for all hosts there are, as long as their addresses are public (who may make
            names below a domain could point one at a private network). None: the same as ``*``. Empty: none but
            Label Studio.
    """

    def __init__(self, allowed_hosts: Collection[str] | None = None) -> None:
        hosts = ["*"] if allowed_hosts is None else [h.strip().lower() for h in allowed_hosts if h.strip()]
        self._names = frozenset(hosts)
        self._any = "*" in self._names

    def named(self, host: str, port: int) -> bool:
        """Tell whether the operator named exactly this host."""
        host = host.lower().rstrip(".")
        return bool(self._names & {host, f"{host}:{port}", f"[{host}]:{port}"})

    def check_name(self, host: str, port: int) -> None:
        """Refuse a host by name, before anything is resolved.

        Raises:
            ImageError: It is not on the operator's list.
        """
        parts = host.lower().rstrip(".").split(".")
        suffixes = {"." + ".".join(parts[i:]) for i in range(1, len(parts))}
        if not (self._any or self.named(host, port) or self._names & suffixes):
            raise ImageError(f"expected an image from Label Studio or an allowed host, got {host!r}; {_ADVICE}")

    def check_address(self, host: str, port: int, address: str) -> None:
        """Refuse an address in a private, loopback, link-local or reserved network.

        Raises:
            ImageError: The address is not public and the operator did not name the host itself.
        """
        if not self.named(host, port) and not is_public(address):
            raise ImageError(
                f"expected an image from the public internet, got {host!r} in a private network; {_ADVICE}"
            )


class _NoAnswer(ImageError):
    """Nobody answers at an image's host."""


class SilentHosts:
    """Hosts that were silent :data:`MOST_SILENCES` times in a row are asked again after :data:`SILENT_S` seconds only.

    Each try waits for minutes, so a pool of thousands of images behind a firewall would hold up its round for days.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._silences: dict[str, tuple[int, float]] = {}

    @contextmanager
    def asking(self, host: str) -> Iterator[None]:
        """Ask a host.

        Raises:
            ImageError: It has been silent; or what the body raises.
        """
        with self._lock:
            times, last = self._silences.get(host, (0, 0.0))
            if times >= MOST_SILENCES and self._clock() - last < SILENT_S:
                raise ImageError(
                    f"expected an image from {host!r}, got no answer {times} times in a row, so it is not asked for a "
                    "while; check that it is up and that the backend can reach it"
                )
        try:
            yield
        except _NoAnswer:
            with self._lock:
                times = self._silences.get(host, (0, 0.0))[0]
                self._silences[host] = min(times + 1, MOST_SILENCES), self._clock()
            raise
        with self._lock:
            self._silences.pop(host, None)


class GuardedNetwork(httpcore.NetworkBackend):
    """Connects only to addresses that :class:`HostRules` lets pass; a name is resolved once, so it cannot change."""

    def __init__(self, rules: HostRules, resolver: Resolver = resolve) -> None:
        self._rules = rules
        self._resolver = resolver
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Resolve, check every address, connect to the first that answers."""
        self._rules.check_name(host, port)
        try:
            addresses = self._resolver(host, port)
        except (OSError, UnicodeError):
            raise _NoAnswer(f"expected a host that exists, got {host!r}; correct the task's data") from None
        for address in addresses:
            self._rules.check_address(host, port, address)
        failure: Exception = httpcore.ConnectError(f"no address for {host!r}")
        for address in addresses:
            try:
                return self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
        """Never: images do not come from local sockets."""
        raise ImageError("expected an image over the network, got a local socket; correct the task's data")

    def sleep(self, seconds: float) -> None:
        """Wait."""
        self._inner.sleep(seconds)


class ImageSource:
    """Opens images for :class:`ppal_backend.datasets.images.ImageCache`.

    The token goes to Label Studio's own address only, and no longer once a redirect has left it. Other hosts are
    reached directly (no proxy) and only at addresses that :class:`HostRules` lets pass, on every redirect anew.

    Args:
        client: Label Studio.
        allowed_hosts: See :class:`HostRules`; None allows any public host.
        timeout_s: Limit in seconds for connecting and for each wait for data.
        total_s: Limit in seconds for one image.
        max_redirects: Redirects followed.
        tries: How often a fetch is started in all.
        resolver: Replaces name resolution (tests).
        sleep: Replaces waiting (tests).
        clock: Replaces monotonic time (tests).
    """

    def __init__(
        self,
        client: LabelStudioClient,
        allowed_hosts: Collection[str] | None = None,
        *,
        timeout_s: float = 30.0,
        total_s: float = 300.0,
        max_redirects: int = 5,
        tries: int = 3,
        resolver: Resolver = resolve,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._silent = SilentHosts(clock)
        self._rules = HostRules(allowed_hosts)
        self._timeout_s = timeout_s
        self._total_s = total_s
        self._max_redirects = max_redirects
        self._tries = tries
        self._sleep = sleep
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            network_backend=GuardedNetwork(self._rules, resolver),
            max_keepalive_connections=8,
        )

    def __call__(self, task_id: int, url: str) -> AbstractContextManager[Iterable[bytes]]:
        """Return a context manager that opens the image and gives its bytes in chunks."""
        return self.open(task_id, url)

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    @contextmanager
    def open(self, task_id: int, url: str) -> Iterator[Iterable[bytes]]:
        """Open the image of a task as an iterable of chunks.

        Raises:
            ImageError: The address is refused, or the image cannot be had from there.
            LabelStudioAuthError: Label Studio refused the token.
            LabelStudioUnavailable: Label Studio itself is down.
        """
        target = target_of(task_id, url, self._client.addresses)
        with self._opened(target) as chunks:
            yield chunks

    @contextmanager
    def _opened(self, target: Target) -> Iterator[Iterable[bytes]]:
        left, deadline = False, time.monotonic() + self._total_s
        for _ in range(self._max_redirects + 1):
            own = target.own and not left
            response = self._own(target) if own else self._other(target)
            try:
                if response.status in _REDIRECTS and response.location:
                    target = self._redirected(target, response.location)
                    left = left or not target.own
                    continue
                self._check(response, own, target)
                yield self._chunks(response, own, target, deadline)
                return
            finally:
                response.close()
        raise ImageError(
            f"expected an image after {self._max_redirects} redirects, got another; correct the task's data"
        )

    def _redirected(self, target: Target, location: str) -> Target:
        try:
            url = urljoin(target.url, location)
        except ValueError:
            raise ImageError("expected a redirect to a valid address, got another; correct the task's data") from None
        return classify(url, self._client.addresses)

    def _own(self, target: Target) -> _Response:
        transport = self._client.transport

        def send() -> _Response:
            http = transport.http
            request = http.build_request("GET", target.url, timeout=self._timeout_s, headers={"Accept": "image/*, */*"})
            auth = transport.auth if target.signed else None
            reply = http.send(request, stream=True, auth=auth, follow_redirects=False)
            return _Response(reply.status_code, reply.headers.get("location", ""), reply.iter_bytes, reply.close)

        return self._repeat(send, True, target)

    def _other(self, target: Target) -> _Response:
        url = httpx.URL(target.url)
        host = url.raw_host.decode("ascii")
        self._rules.check_name(url.host, url.port or (443 if url.scheme == "https" else 80))
        limits = dict.fromkeys(("connect", "read", "write", "pool"), self._timeout_s)
        address = httpcore.URL(scheme=url.scheme, host=host, port=url.port, target=url.raw_path)
        headers: dict[bytes | str, bytes | str] = {
            "Host": url.netloc.decode("ascii"),
            "Accept": "image/*, */*",
            "Accept-Encoding": "identity",
        }
        headers["User-Agent"] = "ppal-backend"

        def send() -> _Response:
            request = httpcore.Request("GET", address, headers=headers, extensions={"timeout": limits})
            reply = self._pool.handle_request(request)
            named = {key.lower(): value for key, value in reply.headers}
            location = named.get(b"location", b"").decode("latin-1")
            return _Response(reply.status, location, lambda _size: reply.iter_stream(), reply.close)

        with self._silent.asking(url.netloc.decode("ascii")):
            return self._repeat(send, False, target)

    def _repeat(self, send: Callable[[], _Response], own: bool, target: Target) -> _Response:
        for attempt in range(1, self._tries + 1):
            last = attempt == self._tries
            try:
                response = send()
            except LabelStudioUnavailable:
                if last:
                    raise
            except _NETWORK_ERRORS as error:
                if last:
                    raise self._unreachable(own, target, error) from None
            else:
                if last or (response.status < 500 and response.status != 429):
                    return response
                response.close()
            self._sleep(0.5 * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _check(self, response: _Response, own: bool, target: Target) -> None:
        status = response.status
        if status == 200:
            return
        signed = own and target.signed
        if signed and status == 401:
            raise LabelStudioAuthError(
                f"Label Studio refused the token for an image; {self._client.transport.auth.advice}"
            )
        silent = own and status in _NO_ANSWER_BEHIND
        if (signed and status in _BUSY) or (silent and not self._is_label_studio_up()):
            raise LabelStudioUnavailable(
                f"Label Studio answered {status} for {safe_url(target.url)}; try again, see its log if it lasts"
            )
        gone = signed and status in (404, 424, 500)
        why = f"status {status}" + (": Label Studio finds no such file or storage" if gone else "")
        if silent:
            why += f" {self._tries} times, while Label Studio answers everything else"
        advice = "check the file and the storage connection"
        if status == 401:
            advice = "use an address that needs no login, or a storage connection"
        if signed and status == 403:
            advice = "check the file, the storage connection and that the token's user may see the project"
            if "/data/local-files" in target.url:
                advice = (
                    "start Label Studio with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true, which serves local files"
                )
        raise ImageError(f"expected an image at {safe_url(target.url)}, got {why}; {advice}")

    def _chunks(self, response: _Response, own: bool, target: Target, deadline: float) -> Iterator[bytes]:
        try:
            for chunk in response.chunks(_CHUNK):
                if time.monotonic() > deadline:
                    raise ImageError(
                        f"expected {safe_url(target.url)} sooner, got only a part of it in time; try again"
                    )
                yield chunk
        except _NETWORK_ERRORS as error:
            if own and not self._is_label_studio_up():
                raise _down(target, error) from None
            limit = ", or raise its RESOLVER_PROXY_TIMEOUT where it proxies a slow storage" if own else ""
            raise ImageInterrupted(
                f"expected the whole of {safe_url(target.url)}, got a part of it ({type(error).__name__}); check the "
                f"file and its server{limit}"
            ) from None

    def _unreachable(self, own: bool, target: Target, error: Exception) -> Exception:
        if problem := certificate_problem(error, safe_url(target.url)):
            return LabelStudioError(problem) if own else ImageError(problem)
        if own and not self._is_label_studio_up():
            return _down(target, error)
        got = f"expected an image at {safe_url(target.url)}, got no answer ({type(error).__name__})"
        if own:
            return ImageError(f"{got} {self._tries} times, while Label Studio is up; check the file and its storage")
        return _NoAnswer(f"{got}; check that the host is up")

    def _is_label_studio_up(self) -> bool:
        """Whether it answers: then an image that it does not send is no reason to wait for it."""
        try:
            return bool(self._client.version())
        except LabelStudioError:
            return False


@dataclass(frozen=True)
class _Response:
    status: int
    location: str
    chunks: Callable[[int], Iterator[bytes]]
    close: Callable[[], None]


def safe_url(url: str) -> str:
    """Return an address for messages: without user, query and fragment, which may hold signatures."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"[:200]


def _down(target: Target, error: Exception) -> LabelStudioUnavailable:
    what = f"Label Studio did not send {safe_url(target.url)} ({type(error).__name__})"
    return LabelStudioUnavailable(f"{what}; check that it is up")
