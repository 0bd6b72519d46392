"""Whether Label Studio tells us of annotations."""

from __future__ import annotations

from ppal_backend.errors import LabelStudioError, LabelStudioUnavailable
from ppal_backend.label_studio.client import LabelStudioClient

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
    if token:
        return (
            "the webhook that Label Studio makes sends no credentials, so its events are refused and only the poll "
            "notices annotations; set PPAL_PUBLIC_URL to this backend's address as Label Studio reaches it"
        )
    if any(hook["url"].rstrip("/").endswith(EVENTS_PATH) for hook in client.webhooks(project_id)):
        return ""
    return (
        "the project has no webhook to this backend, only the poll notices annotations; connect the backend under a "
        "host name with a dot or an IP address, or set PPAL_PUBLIC_URL"
    )
