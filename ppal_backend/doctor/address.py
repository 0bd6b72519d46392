"""What Label Studio makes of a backend's address."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from ppal_backend.doctor.finding import Finding, failed, ok, warning
from ppal_backend.label_studio.network_guard import is_public, resolve

SWITCHES = (
    "start Label Studio with ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false (both are needed), "
    "or with USE_DEFAULT_BANNED_SUBNETS=false"
)


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
            "PPAL_PUBLIC_URL is not set, so the backend cannot mend its webhooks",
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
