"""Connects a project through Label Studio's API: what its Settings > Model dialog does, and what that leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from ppal_backend.doctor import installation
from ppal_backend.doctor.installation import usable_host
from ppal_backend.errors import LabelStudioError, SettingsError
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.connection import EVENTS_PATH, ModelConnection, connect_backend, webhook_problem
from ppal_backend.label_studio.publish import SAMPLING
from ppal_backend.label_studio.schema import parse_label_config
from ppal_backend.service import auth
from ppal_backend.settings import Settings


@dataclass(frozen=True)
class Step:
    """One thing that was looked at; ``done`` is ``made``, ``changed`` or ``kept``."""

    what: str
    done: str
    detail: str


def connect_project(
    client: LabelStudioClient, settings: Settings, project_id: int, backend_url: str, extra_params: str = ""
) -> list[Step]:
    """Connect a project to a running backend; doing it again changes nothing.

    Args:
        client: Label Studio.
        settings: the backend's own settings: its credentials go into the connection and its token into the webhook.
        project_id: the project.
        backend_url: the backend's address as Label Studio reaches it.
        extra_params: JSON of the project's own options; "" leaves them as they are.

    Raises:
        SettingsError: the address is none that Label Studio can use, or no backend answers there.
        LabelConfigError: the project's labeling config has no boxes on an image.
        LabelStudioError: Label Studio refused something; the text says what to do.
    """
    url = _checked(settings, backend_url)
    user = client.whoami()
    described = client.project(project_id)
    schema = parse_label_config(str(described.get("label_config") or ""))
    steps = [
        Step("label studio", "kept", f"{client.version()} at {client.url}, as {user.get('email')}"),
        Step("labeling config", "kept", f"{len(schema.labels)} labels on <Image> {schema.to_name!r}"),
    ]
    password = settings.basic_auth_pass.get_secret_value()
    done = connect_backend(client, project_id, ModelConnection(url, extra_params, settings.basic_auth_user, password))
    steps.append(Step("connection", done, url))
    steps.append(_webhook(client, settings, project_id, url))
    if described.get("sampling") != SAMPLING:
        client.patch_project(project_id, sampling=SAMPLING)
        steps.append(Step("sampling", "changed", f"{described.get('sampling')!r} to {SAMPLING!r}"))
    else:
        steps.append(Step("sampling", "kept", SAMPLING))
    return steps


def _checked(settings: Settings, backend_url: str) -> str:
    url = backend_url.strip().rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise SettingsError(f"expected the backend's address such as http://ppal.local:9090, got {backend_url!r}")
    if httpx.URL(url).userinfo:
        raise SettingsError("expected an address without credentials, got one with; set BASIC_AUTH_USER and _PASS")
    problem = usable_host(url)
    if problem:
        raise SettingsError(f"{problem}; give the backend a name with a dot, such as ppal.local, or use an IP address")
    found = installation.service(settings.model_copy(update={"public_url": url}))
    if found.state != "ok":
        raise SettingsError(f"{found.seen}; {found.advice}")
    return url


def _webhook(client: LabelStudioClient, settings: Settings, project_id: int, url: str) -> Step:
    token = auth.webhook_token(settings, project_id)
    before = client.webhooks(project_id)
    hook_url = url + EVENTS_PATH
    if not webhook_problem(before, url, token):
        return Step("webhook", "kept", hook_url)
    there = any(hook["url"].rstrip("/") == hook_url for hook in before)
    client.ensure_webhook(project_id, hook_url, {"Authorization": f"Bearer {token}"} if token else None)
    problem = webhook_problem(client.webhooks(project_id), url, token)
    if problem:
        raise LabelStudioError(problem)
    return Step("webhook", "changed" if there else "made", hook_url + (" with this backend's token" if token else ""))
