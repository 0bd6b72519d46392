"""The addresses under which one Label Studio is known, and what may carry its token.

Tasks, redirects and browsers name Label Studio as people see it, the backend reaches it as the operator set it: another
host name, a port of its own, a proxy with a path in front. All of these are one Label Studio. What is asked of it is
always asked at the backend's own address, so the token goes there and nowhere else, whatever anybody calls himself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import httpx


def same_origin(url: httpx.URL, base: httpx.URL) -> bool:
    """Tell whether ``url`` is on the scheme, host and port of ``base`` (or on its https twin)."""
    if url.host != base.host:
        return False
    if url.scheme == base.scheme:
        return _port(url) == _port(base)
    return (base.scheme, _port(base), url.scheme, _port(url)) == ("http", 80, "https", 443)


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
        if same_origin(parsed, httpx.URL(self.base)):
            return url
        for address in self.others:
            other = httpx.URL(address)
            prefix = other.path.rstrip("/")
            if same_origin(parsed, other) and (not prefix or parsed.path.startswith(prefix + "/")):
                rest = parsed.raw_path.decode("ascii")
                return self.base + rest.removeprefix(other.raw_path.decode("ascii").rstrip("/"))
        return None

    def path_of(self, url: str) -> str:
        """The path of one of Label Studio's own addresses below its base, decoded, without query."""
        base = unquote(httpx.URL(self.base).path).rstrip("/")
        return unquote(unquote(httpx.URL(url).path)).removeprefix(base)
