"""How a project and this backend know each other: its model connection and its webhook."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ppal_backend.errors import LabelStudioError, LabelStudioUnavailable
from ppal_backend.label_studio.client import WEBHOOK_ACTIONS, LabelStudioClient
from ppal_backend.label_studio.transport import Rejected

CONNECTION_TITLE = "PPAL"
EVENTS_PATH = "/webhook"
SWITCHED_OFF_AFTER = 50
"""Deliveries that may fail one after the other before Label Studio switches a webhook off (from 1.24 on)."""


@dataclass(frozen=True)
class ModelConnection:
    """A model connection as it shall be: address, extra parameters as JSON text, and credentials or none.

    It is always one for interactive preannotations: with it Label Studio's editor has the switch *Auto-Annotation*.
    """

    url: str
    extra_params: str = ""
    user: str = ""
    password: str = ""

    def fields(self) -> dict[str, Any]:
        """What Label Studio's dialog sends, with its *Interactive preannotations* on."""
        auth = {"auth_method": "NONE"}
        if self.user:
            auth = {"auth_method": "BASIC_AUTH", "basic_auth_user": self.user, "basic_auth_pass": self.password}
        return {"url": self.url, "extra_params": self.extra_params, "is_interactive": True, **auth}


def model_connections(client: LabelStudioClient, project_id: int) -> list[dict[str, Any]]:
    """The project's model connections; Label Studio asks each for its health meanwhile."""
    rows = client.transport.get("/api/ml", {"project": project_id})
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def connect_backend(client: LabelStudioClient, project_id: int, wanted: ModelConnection) -> str:
    """Make the project's connection to a backend, or correct the one there is; what was done, in a word.

    Returns:
        ``made``, ``changed`` or ``kept``.

    Raises:
        LabelStudioError: Label Studio does not take the address, or the backend refused the project.
    """
    rows = [row for row in model_connections(client, project_id) if _same_url(row, wanted.url)]
    if rows and _matches(rows[0], wanted) and rows[0].get("state") == "CO":
        return "kept"
    body = {"project": project_id, "title": CONNECTION_TITLE, **wanted.fields()}
    done = "changed" if rows else "made"
    try:
        if rows:
            client.transport.write(
                "PATCH", f"/api/ml/{rows[0]['id']}", json={**body, "title": rows[0].get("title") or CONNECTION_TITLE}
            )
        else:
            client.transport.write("POST", "/api/ml", json=body)
    except LabelStudioUnavailable as error:
        raise LabelStudioError(
            f"Label Studio failed to connect {wanted.url} ({error}); check that it can resolve and reach this address"
        ) from None
    except Rejected as error:
        raise LabelStudioError(f"{error}; correct that and connect again") from None
    row = next((row for row in model_connections(client, project_id) if _same_url(row, wanted.url)), None)
    if row is None or row.get("state") != "CO":
        reason = " ".join(str((row or {}).get("error_message") or "no connection is there").split())[:400]
        raise LabelStudioError(f"Label Studio could not use {wanted.url}: {reason}; correct that and connect again")
    return done


def _same_url(row: Mapping[str, Any], url: str) -> bool:
    return str(row.get("url", "")).rstrip("/") == url.rstrip("/")


def _matches(row: Mapping[str, Any], wanted: ModelConnection) -> bool:
    # The password cannot be read back: another one is noticed by the connection's state.
    same_user = (row.get("basic_auth_user") or "") == wanted.user
    extra = row.get("extra_params") or ""
    same_extra = not wanted.extra_params or extra == wanted.extra_params
    return same_user and same_extra and row.get("is_interactive") is True


def check_webhook(
    client: LabelStudioClient,
    project_id: int,
    public_url: str,
    token: str | None,
    user: str = "",
    *,
    restore: bool = True,
) -> tuple[str, bool]:
    """Make sure that the project sends its events here.

    Args:
        client: Label Studio.
        project_id: The project.
        public_url: This backend's address as Label Studio reaches it, "" when the operator has not set it: then it is
            the address of the project's one model connection, and a webhook there is repaired but none is made.
        token: What the webhook must send to be let in; None when nobody has to identify himself.
        user: The name under which Label Studio calls this backend, "" for none; a connection with another one is not
            ours.
        restore: Whether to restore a webhook that a person deleted or switched off. One that Label Studio itself
            switched off, after deliveries that failed, is switched on in any case.

    Returns:
        What is wrong, "" when it does, and whether a person's deletion or switch was undone.

    Raises:
        LabelStudioUnavailable: It is down.
    """
    hooks = client.webhooks(project_id)
    problem = webhook_problem(hooks, public_url, token)
    if not problem:
        return "", False
    url = public_url or _connected_at(client, project_id, user)
    mine = [hook for hook in hooks if url and _leads_to(hook, url)]
    by_person = not mine or (_is_off(mine[0]) and not consecutive_failures(mine[0]))
    if not url or (not mine and not public_url) or (by_person and not restore):
        return problem, False
    headers = {"Authorization": f"Bearer {token}"} if token else None
    try:
        client.ensure_webhook(project_id, url + EVENTS_PATH, headers)
    except LabelStudioUnavailable:
        raise
    except LabelStudioError as error:
        return f"Label Studio takes no webhook to {url} ({error}); only the poll notices annotations", False
    return "", by_person


def webhook_problem(hooks: Sequence[Mapping[str, Any]], public_url: str, token: str | None) -> str:
    """What is wrong with a project's webhooks, "" when one sends its events here; asks and changes nothing.

    Args:
        hooks: The project's webhooks.
        public_url: This backend's address, "" when it is not known: any webhook to a backend counts then.
        token: What it must send; None when nobody has to identify himself.
    """
    ours = our_webhooks(hooks, public_url)
    if not ours:
        return (
            "the project has no webhook to this backend, only the poll notices annotations; connect the backend under "
            "a host name with a dot or an IP address, or set PPAL_PUBLIC_URL"
        )
    if token and not any(sends_token(hook, token) for hook in ours):
        return (
            "the webhook that Label Studio makes sends no credentials, so its events are ignored and only the poll "
            "notices annotations; run ppal connect, or set PPAL_PUBLIC_URL to this backend's address as Label Studio "
            "reaches it"
        )
    hook = next(h for h in ours if not token or sends_token(h, token))
    missing = sorted(set(WEBHOOK_ACTIONS) - set(hook.get("actions") or ()))
    if _is_off(hook):
        after = f" after {consecutive_failures(hook)} failed deliveries" if consecutive_failures(hook) else ""
        return (
            f"the project's webhook to this backend is switched off{after}; switch it on under Settings > Webhooks, or "
            "run ppal connect"
        )
    if not hook.get("send_payload", True):
        return (
            "the project's webhook to this backend sends no payload; switch Send payload on under Settings > Webhooks"
        )
    if missing and "actions" in hook and not hook.get("send_for_all_actions"):
        return f"the project's webhook to this backend lacks {', '.join(missing)}; run ppal connect, which adds them"
    return ""


def our_webhooks(hooks: Sequence[Mapping[str, Any]], public_url: str) -> list[Mapping[str, Any]]:
    """Those that lead to this backend; those to any backend when its address is not known."""
    return [hook for hook in hooks if _leads_to(hook, public_url)]


def consecutive_failures(hook: Mapping[str, Any]) -> int:
    """Deliveries that failed one after the other, as Label Studio counts them; 0 where it does not."""
    return int(hook.get("consecutive_failures") or 0)


def sends_token(hook: Mapping[str, Any], token: str) -> bool:
    """Whether a webhook sends this token, or a user and a password that stand in its address."""
    if urlsplit(str(hook["url"])).password:
        return True
    sent = (hook.get("headers") or {}).get("Authorization", "")
    return hmac.compare_digest(str(sent).encode(), f"Bearer {token}".encode())


def _leads_to(hook: Mapping[str, Any], url: str) -> bool:
    found, wanted = str(hook["url"]).rstrip("/"), url.rstrip("/") + EVENTS_PATH
    return found == wanted if url else found.endswith(wanted)


def _is_off(hook: Mapping[str, Any]) -> bool:
    return not hook.get("is_active", True)


def _connected_at(client: LabelStudioClient, project_id: int, user: str) -> str:
    """The address of the project's model connection; "" when there is not just one, or it is another's."""
    rows = model_connections(client, project_id)
    if len(rows) != 1 or (rows[0].get("basic_auth_user") or "") != user:
        return ""
    return str(rows[0].get("url") or "").rstrip("/")
