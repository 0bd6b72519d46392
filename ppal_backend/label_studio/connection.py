"""A project's model connections, as Label Studio's Settings > Model makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ppal_backend.errors import LabelStudioError, LabelStudioUnavailable
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.transport import Rejected

TITLE = "PPAL"


@dataclass(frozen=True)
class Wanted:
    """A model connection as it shall be: address, extra parameters as JSON text, and credentials or none."""

    url: str
    extra_params: str = ""
    user: str = ""
    password: str = ""

    def fields(self) -> dict[str, Any]:
        """What Label Studio's dialog sends."""
        auth = {"auth_method": "NONE"}
        if self.user:
            auth = {"auth_method": "BASIC_AUTH", "basic_auth_user": self.user, "basic_auth_pass": self.password}
        return {"url": self.url, "extra_params": self.extra_params, **auth}


def backends(client: LabelStudioClient, project_id: int) -> list[dict[str, Any]]:
    """The project's model connections; Label Studio asks each for its health meanwhile."""
    rows = client.transport.get("/api/ml", {"project": project_id})
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def connect_backend(client: LabelStudioClient, project_id: int, wanted: Wanted) -> str:
    """Make the project's connection to a backend, or mend the one there is; what was done, in a word.

    Returns:
        ``made``, ``changed`` or ``kept``.

    Raises:
        LabelStudioError: Label Studio does not take the address, or the backend refused the project.
    """
    rows = [row for row in backends(client, project_id) if same_url(row, wanted.url)]
    if rows and _is_as(rows[0], wanted) and rows[0].get("state") == "CO":
        return "kept"
    body = {"project": project_id, "title": TITLE, **wanted.fields()}
    done = "changed" if rows else "made"
    try:
        if rows:
            client.transport.write(
                "PATCH", f"/api/ml/{rows[0]['id']}", json={**body, "title": rows[0].get("title") or TITLE}
            )
        else:
            client.transport.write("POST", "/api/ml", json=body)
    except LabelStudioUnavailable as error:
        raise LabelStudioError(
            f"Label Studio failed to connect {wanted.url} ({error}); check that it can resolve and reach this address"
        ) from None
    except Rejected as error:
        raise LabelStudioError(f"{error}; mend that and connect again") from None
    row = next((row for row in backends(client, project_id) if same_url(row, wanted.url)), None)
    if row is None or row.get("state") != "CO":
        reason = " ".join(str((row or {}).get("error_message") or "no connection is there").split())[:400]
        raise LabelStudioError(f"Label Studio could not use {wanted.url}: {reason}; mend that and connect again")
    return done


def same_url(row: Mapping[str, Any], url: str) -> bool:
    """Whether a connection leads to ``url``."""
    return str(row.get("url", "")).rstrip("/") == url.rstrip("/")


def _is_as(row: Mapping[str, Any], wanted: Wanted) -> bool:
    # The password cannot be read back: another one is told by the connection's state.
    same_user = (row.get("basic_auth_user") or "") == wanted.user
    extra = row.get("extra_params") or ""
    return same_user and (not wanted.extra_params or extra == wanted.extra_params)
