"""Which hosts images may come from, checked on the very address that is connected to."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Collection, Iterable
from typing import Any

import httpcore

from ppal_backend.errors import ImageError

Resolver = Callable[[str, int], list[str]]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ADVICE = "add it to PPAL_ALLOWED_IMAGE_HOSTS if images shall come from there"


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: str) -> bool:
    """Tell whether an IP address is on the public internet, looking through IPv4 packed into IPv6."""
    try:
        ip: Address = ipaddress.ip_address(address.split("%")[0])
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
            raise ImageError(f"expected a host that exists, got {host!r}; correct the task's data") from None
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
