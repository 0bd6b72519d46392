"""Connecting a project: check what Label Studio says about it, keep it, and act only when it changed."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from ppal_backend.detector.zoo import find_entry
from ppal_backend.errors import SettingsError
from ppal_backend.label_studio.schema import parse_label_config
from ppal_backend.service import auth
from ppal_backend.service.payloads import SetupBody, is_loopback
from ppal_backend.service.runtime import Runtime
from ppal_backend.settings import ProjectOptions, Settings
from ppal_backend.store import ProjectRecord

log = logging.getLogger(__name__)

DEFAULT_STRATEGY: str = ProjectOptions.model_fields["strategy"].default

schema_of = lru_cache(maxsize=16)(parse_label_config)


def connect(runtime: Runtime, body: SetupBody) -> ProjectRecord:
    """Record the project as ``body`` describes it and enqueue its handling if anything is new.

    Raises:
        SettingsError: the API key or Label Studio's address is missing, or an extra parameter is wrong.
        LabelConfigError: the labeling config has no boxes on an image.
        UnknownDetector: the model zoo has no such detector; the text lists those it has.
    """
    projects = runtime.store.projects
    known = projects.find(body.project_id)
    key = _key(body, known)
    url = label_studio_url(runtime.settings, body.hostname)
    before = None if known is None or known.key != key else _says(known)
    if before != (body.label_config, url, body.extra_params):
        options = checked_options(runtime.settings, body.extra_params)
        schema_of(body.label_config, options.from_name)
        kept = {name: getattr(options, name) for name in body.extra_params}
        if before != (body.label_config, url, kept):
            new = projects.connect(body.project_id, key, body.label_config, url, kept)
            log.info("project %d %s", body.project_id, "connected" if new else "changed")
            runtime.notifier.notify(body.project_id)
    record = projects.get(body.project_id)
    if record.hostname == body.hostname:
        return record
    projects.set_hostname(record.id, body.hostname)
    return projects.get(record.id)


def label_studio_url(settings: Settings, hostname: str) -> str:
    """Where Label Studio is: as the operator set it, else as the caller says if the caller can be trusted.

    The API key is sent to this address, so a caller who proved nothing may only name this very machine.

    Raises:
        SettingsError: the key is not set, or the address has to be set.
    """
    if not settings.label_studio_api_key.get_secret_value():
        raise SettingsError(
            "expected LABEL_STUDIO_API_KEY in the backend's environment, got none; create a personal access token "
            "in Label Studio under Account & Settings and start the backend with it"
        )
    if settings.label_studio_url:
        return settings.label_studio_url
    if hostname and (is_loopback(hostname) or auth.is_on(settings)):
        return hostname
    raise SettingsError(
        f"expected LABEL_STUDIO_URL in the backend's environment, got none; Label Studio calls itself "
        f"{hostname!r}, which is taken as its address only when it is on this machine or BASIC_AUTH_USER is set"
    )


def checked_options(settings: Settings, overrides: dict[str, Any]) -> ProjectOptions:
    """The options in force, with a detector and a strategy that exist.

    Raises:
        SettingsError: an unknown or bad extra parameter, or an unknown strategy; the text lists the known ones.
        UnknownDetector: no such detector; the text lists those there are.
    """
    options = settings.project_options(overrides)
    find_entry(options.detector, settings.model_zoo)
    if options.strategy != DEFAULT_STRATEGY:
        from ppal_backend.acquisition.strategies import strategy_names  # imports torch, so only when needed

        names = strategy_names()
        if options.strategy not in names:
            raise SettingsError(f"expected a strategy of {', '.join(names)}; got {options.strategy!r}; choose one")
    return options


def _key(body: SetupBody, known: ProjectRecord | None) -> str:
    """The project's key; one without a creation time says nothing against the stored one, and vice versa."""
    if known is not None and ("." not in body.key or "." not in known.key):
        return known.key
    return body.key


def _says(record: ProjectRecord) -> tuple[str, str, dict[str, Any]]:
    return record.label_config, record.url, record.options
