"""Which of a project's labels its detector knows before anybody has labelled anything, and what people are told."""

from __future__ import annotations

from ppal_backend.detector.zoo import find_entry
from ppal_backend.detector.zoo.choice import auto_order
from ppal_backend.detector.zoo.known_classes import KnownClasses, match_classes
from ppal_backend.errors import PPALError
from ppal_backend.label_studio.schema import parse_label_config
from ppal_backend.operations.detectors import in_force
from ppal_backend.settings import Settings
from ppal_backend.store import ProjectRecord, Store

NAME_THEM = (
    'name classes that it knows with predicted_values="…" on a <Label> of the labeling config '
    "(docs/connect.md, Boxes before the first label)"
)


def known_labels(settings: Settings, project: ProjectRecord, detector: str | None = None) -> KnownClasses:
    """What the zoo's weights of the project's detector know of its labels; nothing where trainings start at random.

    Args:
        settings: The operator's settings.
        project: The project.
        detector: Name in the zoo; None for the one in force or, before the first round has chosen it, for the first
            that is tried on a CPU.

    Raises:
        LabelConfigError: The labeling config cannot be used.
        SettingsError: An option of the project cannot be used.
        DetectorError: The zoo has no such detector, or cannot be read.
    """
    options = settings.project_options(project.options)
    schema = parse_label_config(project.label_config, options.from_name)
    name = detector or in_force(settings, project).name or auto_order(settings.model_zoo).cpu[0]
    weights = find_entry(name, settings.model_zoo).weights
    usable = weights is not None and weights.kind == "detector" and options.init_weights != "random"
    classes = weights.classes if weights is not None and usable else ()
    shown = {label: value for value, label in schema.aliases.items()}
    return match_classes(schema.labels, schema.class_names, classes, shown)


def known_or_none(settings: Settings, project: ProjectRecord, detector: str | None = None) -> KnownClasses:
    """The same, nothing where it cannot be told: what is wrong is told where a round needs it."""
    try:
        return known_labels(settings, project, detector)
    except PPALError:
        return KnownClasses()


def lines_for(settings: Settings, store: Store, project: ProjectRecord) -> list[str]:
    """Which labels are known from where, for people; [] once a training has made a version of its own."""
    if any(version.is_trained for version in store.versions.of_project(project.id)):
        return []
    try:
        found = known_labels(settings, project)
        detector = in_force(settings, project).name or "the detector"
    except PPALError:
        return []
    if found:
        return [f"{detector} knows labels before any training", *found.sentences()]
    if not found.classes:
        return [f"no boxes before the first training: the weights that {detector} starts from name no classes"]
    return [f"no boxes before the first training: {detector} knows none of the labels; {NAME_THEM}", *found.sentences()]
