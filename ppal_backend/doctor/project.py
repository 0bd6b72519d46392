"""Checks of one connected project: connection, webhook, sampling, model version."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ppal_backend.doctor import Finding, failed, from_problem, ok, warning
from ppal_backend.doctor.health import project_state, trial_detector
from ppal_backend.doctor.installation import SWITCHES, usable_host
from ppal_backend.errors import DetectorError, LabelStudioError, SettingsError
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.connection import (
    SWITCHED_OFF_AFTER,
    consecutive_failures,
    model_connections,
    our_webhooks,
    webhook_problem,
)
from ppal_backend.label_studio.publish import sampling_problem, version_problem
from ppal_backend.label_studio.transport import NotFound
from ppal_backend.operations.detectors import TOPIC, check_named, in_force, trains_here
from ppal_backend.service.auth import webhook_token
from ppal_backend.settings import Settings
from ppal_backend.store import ProjectRecord, Store


def project(settings: Settings, store: Store, client: LabelStudioClient, record: ProjectRecord) -> list[Finding]:
    """Everything about one project; a Label Studio that does not answer ends it early."""
    name = f"project {record.id}"
    try:
        described = client.project(record.id)
        connections = model_connections(client, record.id)
        return [
            *_connection(settings, name, connections),
            _webhook(settings, client, record, name, connections),
            _sampling(name, described),
            _model_version(store, record, name, described, connections),
            *_detector(settings, store, record, name),
            *_state(settings, store, record, name),
        ]
    except NotFound:
        return [failed(name, "Label Studio has no such project (or this token may not see it)", "connect it again")]
    except LabelStudioError as error:
        return [from_problem(name, str(error))]


def ours(settings: Settings, connections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The connections that lead to this backend; all of them when its address is not known."""
    if not settings.public_url:
        return connections
    return [row for row in connections if str(row.get("url", "")).rstrip("/") == settings.public_url]


def _connection(settings: Settings, name: str, connections: list[dict[str, Any]]) -> Iterator[Finding]:
    check = f"{name}: connection"
    rows = ours(settings, connections)
    if not rows:
        others = ", ".join(sorted(str(row.get("url")) for row in connections)) or "none"
        advice = "run ppal connect, or add the backend under Settings > Model"
        yield failed(check, f"no model connection to this backend (there: {others})", advice)
        return
    if len(rows) > 1:
        advice = "delete all but one under Settings > Model: every attempt to connect that was refused leaves one"
        yield warning(check, f"{len(rows)} connections to this backend", advice)
    row = rows[0]
    host_problem = usable_host(str(row.get("url", "")))
    if host_problem:
        yield failed(check, host_problem, "connect it again under a name with a dot, or by its IP address")
    elif webhook_token(settings, 1) and row.get("auth_method") != "BASIC_AUTH" and "@" not in str(row.get("url")):
        yield failed(
            check,
            "Label Studio sends this backend no credentials",
            "run ppal connect, or edit the connection: Basic auth",
        )
    elif row.get("state") != "CO":
        reason = " ".join(str(row.get("error_message") or row.get("readable_state") or row.get("state")).split())
        yield failed(check, f"Label Studio cannot use it: {reason[:300]}", _advice_on(reason))
    elif len(rows) == 1:
        yield ok(check, f"connected at {row.get('url')}")


def _advice_on(reason: str) -> str:
    if "reserved network" in reason or "not allowed" in reason:
        return SWITCHES
    return "see that the service runs where Label Studio reaches it, then save the connection again"


def _webhook(
    settings: Settings, client: LabelStudioClient, record: ProjectRecord, name: str, connections: list[dict[str, Any]]
) -> Finding:
    check = f"{name}: webhook"
    hooks = our_webhooks(client.webhooks(record.id), settings.public_url)
    problem = webhook_problem(hooks, settings.public_url, webhook_token(settings, record.id))
    if not hooks and ours(settings, connections):
        return failed(
            check,
            "the model is connected but there is no webhook: only the poll notices annotations",
            f"if the backend is in a private network, {SWITCHES}; then run ppal connect",
        )
    if problem:
        return from_problem(check, problem)
    lost = max(map(consecutive_failures, hooks))
    if lost:
        return warning(
            check,
            f"the last {lost} deliveries failed; after {SWITCHED_OFF_AFTER} in a row Label Studio switches it off",
            "see that Label Studio reaches this backend and that the service answers; its log has the reasons",
        )
    return ok(check, "present and with what this backend asks for")


def _sampling(name: str, described: dict[str, Any]) -> Finding:
    check, sampling = f"{name}: sampling", described.get("sampling")
    problem = sampling_problem(sampling)
    return from_problem(check, problem) if problem else ok(check, str(sampling))


def _model_version(
    store: Store, record: ProjectRecord, name: str, described: dict[str, Any], connections: list[dict[str, Any]]
) -> Finding:
    check, shown = f"{name}: model version", described.get("model_version") or ""
    active = store.versions.active(record.id)
    if active is None:
        return warning(
            check, "no round is complete yet", "ppal status says how far it is; tasks come unordered until then"
        )
    problem = version_problem(record.id, shown, active.version, [row.get("title") for row in connections])
    return from_problem(check, problem) if problem else ok(check, active.version)


def _detector(settings: Settings, store: Store, record: ProjectRecord, name: str) -> Iterator[Finding]:
    """Whether the project's next training can begin: the weights as they are now, where that can be seen here."""
    check = f"{name}: {TOPIC}"
    try:
        found = in_force(settings, record)
        trial = [replace(finding, check=check) for finding in trial_detector(settings, record)]
        options = settings.project_options(record.options)
        if found.name and trains_here(store):
            check_named(settings, store, options.model_copy(update={"detector": found.name}))
        elif record.problems.get(TOPIC):
            yield from_problem(check, record.problems[TOPIC])
            return
    except (DetectorError, SettingsError) as error:
        yield from_problem(check, str(error))
        return
    yield from trial or [ok(check, found.text)]


def _state(settings: Settings, store: Store, record: ProjectRecord, name: str) -> Iterator[Finding]:
    for finding in project_state(settings, store, record):
        if finding.check not in ("webhook", "queue", TOPIC):  # looked at above, as they are now
            yield replace(finding, check=f"{name}: {finding.check}")
