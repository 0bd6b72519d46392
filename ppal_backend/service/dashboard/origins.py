"""Settings in force, and where each came from; secrets are told as set or not set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import SecretStr

from ppal_backend.detector.zoo import load_zoo
from ppal_backend.operations.detectors import DetectorInForce
from ppal_backend.service.dashboard.project import Project
from ppal_backend.settings import CONFIG_FILE, ProjectOptions, Settings, variables

HIDDEN = "•••"
DEFAULT = "default"
ENVIRONMENT = "environment"
PROJECT = "project's extra parameters"
_SHORTEST_SECRET = 4


@dataclass(frozen=True)
class Shown:
    """A setting: its name, its value as text, where it came from, and what it does."""

    name: str
    value: str
    origin: str
    text: str = ""


def project_options(
    settings: Settings, overrides: Mapping[str, Any], detector: DetectorInForce | None = None
) -> list[Shown]:
    """What is in force for one project.

    Args:
        settings: the operator's settings.
        overrides: the project's extra parameters.
        detector: what it trains, to be told with its reason where it was chosen; None for projects in general.

    Raises:
        SettingsError: a stored extra parameter is not valid any more.
    """
    options = settings.project_options(dict(overrides))
    rows = {
        name: Shown(
            name=name,
            value=shown_value(getattr(options, name), settings),
            origin=PROJECT if name in overrides else origin_of(settings, name),
            text=field.description or "",
        )
        for name, field in ProjectOptions.model_fields.items()
    }
    if detector is not None and not detector.named:
        value = f"{options.detector}: {detector.name or 'not chosen yet'}"
        rows["detector"] = replace(rows["detector"], value=value, text=detector.reason)
    return list(rows.values())


def operator_settings(settings: Settings) -> list[Shown]:
    """What the operator set for all projects, without what a project may choose for itself."""
    return [
        Shown(
            name=", ".join(variables(name)),
            value=shown_value(getattr(settings, name), settings),
            origin=_source(settings, name),
            text=field.description or "",
        )
        for name, field in Settings.model_fields.items()
        if name not in ProjectOptions.model_fields
    ]


def origin_of(settings: Settings, name: str) -> str:
    """Where the operator's value of a field came from."""
    source = _source(settings, name)
    return f"{ENVIRONMENT} ({' or '.join(variables(name))})" if source == ENVIRONMENT else source


def shown_value(value: object, settings: Settings) -> str:
    """A value as text that may be seen by people: no secret, and no password within an address."""
    if isinstance(value, SecretStr):
        return f"{HIDDEN} (set)" if value.get_secret_value() else "not set"
    if value is None or value == "":
        return "not set"
    return without_secrets(str(value).lower() if isinstance(value, bool) else str(value), settings)


def without_secrets(text: str, settings: Settings) -> str:
    """The text with every known secret in it blanked."""
    for secret in settings.secrets:
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, HIDDEN)
    return text


def _source(settings: Settings, name: str) -> str:
    if name in settings.from_file:
        return CONFIG_FILE
    return ENVIRONMENT if name in settings.model_fields_set else DEFAULT


def in_force(options: ProjectOptions, facts: Mapping[str, Any]) -> list[str]:
    """What became of settings in the last round where something caps them, in sentences.

    Args:
        options: of the project.
        facts: of the round: ``candidates``, ``pool_images`` and ``round``; empty before there is one.
    """
    said = []
    candidates, pool = facts.get("candidates"), facts.get("pool_images")
    if candidates is not None and pool:
        wanted = options.delta * options.budget
        if candidates < min(wanted, pool) - 0.5:
            said.append(
                f"delta {options.delta:g} × budget {options.budget} would be {wanted:.0f} images to choose from; in "
                f"round {facts['round']} it was {candidates} of the pool's {pool} images: images that measure the "
                "detector take their part of the budget, and of a small pool only a part is looked at closely"
            )
        elif candidates >= pool > 0 and wanted > pool:
            said.append(
                f"delta {options.delta:g} × budget {options.budget} would be {wanted:.0f} images to choose from; in "
                f"round {facts['round']} it was the whole pool of {pool}"
            )
    return said


def settings_page(project: Project) -> dict[str, Any]:
    """Settings in force."""
    settings = project.runtime.settings
    detector = project.detector
    return {
        "options": project_options(settings, project.record.options, detector),
        "detector": detector,
        "detectors": list(load_zoo(settings.model_zoo)),
        "operator": operator_settings(settings),
        "in_force": in_force(project.options, _last_candidates(project)),
    }


def _last_candidates(project: Project) -> dict[str, Any]:
    """How many candidates the newest complete round had, of how many images."""
    done = [r for r in project.rounds if r.state == "done"]
    marks = project.files(done[-1].number).marks() if done else {}
    if "candidates" not in marks or "dataset" not in marks:
        return {}
    facts = {"candidates": marks["candidates"].facts.get("candidates"), "round": done[-1].number}
    return {**facts, "pool_images": marks["dataset"].facts.get("pool_images")}
