"""All checks, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ppal_backend.doctor import Finding, failed, from_problem, installation
from ppal_backend.doctor.project import project
from ppal_backend.errors import LabelStudioError, SettingsError
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.source import open_client
from ppal_backend.settings import Settings
from ppal_backend.store import Store

CAUSES = (
    "credentials", "state", "database", "disk", "settings", "queue", "artifacts", "service", "worker", "address",
    "label studio", "token", "clock", "detector", "weights", "projects",
)  # fmt: skip
"""Checks, each before those that it can be the cause of; those of projects come after all."""

ClientOf = Callable[[Settings, str], LabelStudioClient]


def diagnose(settings: Settings, store: Store, client_of: ClientOf = open_client) -> Iterator[Finding]:
    """Every finding, as soon as it is made. Nothing is changed anywhere.

    Args:
        settings: the operator's settings.
        store: the state.
        client_of: a client for Label Studio at an address.
    """
    known = installation.credentials(settings)
    yield known
    if known.state == "failed":
        return  # with such settings the backend does not start either
    yield from installation.state(settings, store)
    yield installation.queue(settings)
    if settings.artifacts:
        yield installation.artifacts(settings)
    yield from installation.detector_stack(settings)
    yield installation.service(settings)
    yield installation.address(settings.public_url)
    projects = store.projects.all()
    if not projects:
        yield failed("projects", "no project is connected", "run ppal connect, or connect under Settings > Model")
    urls = {settings.label_studio_url} if settings.label_studio_url else {p.url for p in projects}
    for url in sorted(urls) or [""]:
        yield from _label_studio(settings, store, url, client_of)


def cause_first(findings: Iterable[Finding]) -> list[Finding]:
    """Failures first, then warnings, then what is well; among each a cause before what may come of it."""

    def place(finding: Finding) -> tuple[int, int]:
        rank = CAUSES.index(finding.check) if finding.check in CAUSES else len(CAUSES)
        return ("failed", "warning", "note", "ok").index(finding.state), rank

    return sorted(findings, key=place)


def _label_studio(settings: Settings, store: Store, url: str, client_of: ClientOf) -> Iterator[Finding]:
    try:
        client = client_of(settings, url)
    except (SettingsError, LabelStudioError) as error:
        yield from_problem("settings" if isinstance(error, SettingsError) else "token", str(error))
        return
    with client:
        there = installation.reachable(client)
        yield there
        if there.state == "failed":
            return
        known = installation.token(client)
        yield known
        if known.state == "failed":
            return
        yield installation.clock(client)
        for record in store.projects.all():
            if settings.label_studio_url or record.url == url:
                yield from project(settings, store, client, record)
