"""Whether Label Studio tells us of annotations."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from typing import Any

from ppal_backend.errors import LabelStudioError, LabelStudioUnavailable
from ppal_backend.label_studio.client import WEBHOOK_ACTIONS, LabelStudioClient

EVENTS_PATH = "/webhook"


def check_webhook(client: LabelStudioClient, project_id: int, public_url: str, token: str | None) -> str:
    """Make sure that the project sends its events here; what is wrong when it does not, "" when it does.

    Args:
        client: Label Studio.
        project_id: The project.
        public_url: This backend's address as Label Studio reaches it, "" when the operator has not set it: then
            the webhook that Label Studio makes by itself is looked for, but none is made or changed.
        token: What the webhook must send to be let in; None when nobody has to identify himself.

    Raises:
        LabelStudioUnavailable: It is down.
    """
    if public_url:
        headers = {"Authorization": f"Bearer {token}"} if token else None
        try:
            client.ensure_webhook(project_id, public_url + EVENTS_PATH, headers)
        except LabelStudioUnavailable:
            raise
        except LabelStudioError as error:
            return f"Label Studio takes no webhook to PPAL_PUBLIC_URL ({error}); only the poll notices annotations"
        return ""
    return webhook_problem(client.webhooks(project_id), "", token)


def webhook_problem(hooks: Sequence[Mapping[str, Any]], public_url: str, token: str | None) -> str:
    """What is wrong with a project's webhooks, "" when one sends its events here; asks and changes nothing.

    Args:
        hooks: The project's webhooks.
        public_url: This backend's address, "" when it is not known: any webhook to a backend counts then.
        token: What it must send; None when nobody has to identify himself.
    """
    wanted = public_url + EVENTS_PATH
    ours = [h for h in hooks if h["url"].rstrip("/").endswith(EVENTS_PATH)]
    if public_url:
        ours = [h for h in ours if h["url"].rstrip("/") == wanted]
    if not ours:
        return (
            "the project has no webhook to this backend, only the poll notices annotations; connect the backend under "
            "a host name with a dot or an IP address, or set PPAL_PUBLIC_URL"
        )
    if token and not any(carries(hook, token) for hook in ours):
        return (
            "the webhook that Label Studio makes sends no credentials, so its events are refused and only the poll "
            "notices annotations; run ppal connect, or set PPAL_PUBLIC_URL to this backend's address as Label Studio "
            "reaches it"
        )
    hook = next(h for h in ours if not token or carries(h, token))
    missing = sorted(set(WEBHOOK_ACTIONS) - set(hook.get("actions") or ()))
    if not hook.get("is_active", True):
        return "the project's webhook to this backend is switched off; switch it on under Settings > Webhooks"
    if not hook.get("send_payload", True):
        return (
            "the project's webhook to this backend sends no payload; switch Send payload on under Settings > Webhooks"
        )
    if missing and "actions" in hook and not hook.get("send_for_all_actions"):
        return f"the project's webhook to this backend lacks {', '.join(missing)}; run ppal connect, which adds them"
    return ""


def carries(hook: Mapping[str, Any], token: str) -> bool:
    """Whether a webhook sends this token."""
    sent = (hook.get("headers") or {}).get("Authorization", "")
    return hmac.compare_digest(str(sent).encode(), f"Bearer {token}".encode())
