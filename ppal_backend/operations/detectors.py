"""The detector of a project: as it is named, or chosen once by the zoo's order (``detector = "auto"``) and kept.

The round's process chooses, for only there it is known where detectors train. A choice by the rule stays, with two
exceptions: the detector for trying out gives way as soon as the weights of another can be had, and one that is not in
the zoo any more is replaced.

Here too: which of a project's labels its detector knows before anybody has labelled anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ppal_backend.detector.zoo import AUTO, find_entry, load_zoo
from ppal_backend.detector.zoo.choice import Reach, auto_order, choose, fetch_advice, weights_problem
from ppal_backend.detector.zoo.known_classes import KnownClasses, match_classes
from ppal_backend.detector.zoo.prompts import known_by_prompt, prompts_of
from ppal_backend.errors import DetectorError, PPALError, StateError, WeightsUnavailable
from ppal_backend.label_studio.schema import parse_label_config
from ppal_backend.settings import ProjectOptions, Settings
from ppal_backend.store import ALIVE_WITHIN_S, Lease, ProjectRecord, Store
from ppal_backend.structures.round import DetectorChoice, ModelRef

log = logging.getLogger(__name__)

TOPIC = "detector"
CONNECT_TIMEOUT_S = 1.5  # Label Studio waits three seconds for an answer to /setup
NAME_THEM = (
    'name classes that it knows with predicted_values="…" on a <Label> of the labeling config '
    "(docs/connect.md, Boxes before the first label)"
)
NOT_YET = "the first round chooses it: by whether there is a GPU, and by which weights can be had"


@dataclass(frozen=True)
class DetectorInForce:
    """What the next training of a project trains.

    Args:
        name: The detector; "" for a project that names none before its first round.
        named: Whether the project or the operator named it.
        reason: Why it is this one, or how it will be chosen; "" for one that is named.
        advice: What to do instead of training a detector for trying out; "" where it is none or somebody wants it.
    """

    name: str
    named: bool
    reason: str = ""
    advice: str = ""

    @property
    def text(self) -> str:
        """In a line."""
        if self.named:
            return f"{self.name} (named by the settings)"
        return f"{AUTO}: {self.name} ({self.reason})" if self.name else f"{AUTO}: {self.reason}"


def in_force(settings: Settings, record: ProjectRecord) -> DetectorInForce:
    """The detector of a project as it is known; asks no address and looks at no weights.

    Raises:
        SettingsError: a stored extra parameter is not valid any more.
    """
    options, choice = settings.project_options(record.options), record.choice
    if options.detector != AUTO:
        return DetectorInForce(options.detector, named=True)
    if choice is None:
        return DetectorInForce("", named=False, reason=NOT_YET)
    return DetectorInForce(choice.detector, False, choice.reason, _advice(settings, record.id, choice))


def _advice(settings: Settings, project_id: int, choice: DetectorChoice) -> str:
    try:
        if choice.by == "trial":
            return (
                f"{_get_weights(settings, choice.device)}; the next round then changes over by itself, and `ppal round "
                f"{project_id} --rank` starts one"
            )
        if choice.by == "upgrade" and choice.detector == auto_order(settings.model_zoo).trial:
            return "choose another on the project's Settings page, or name one in its extra parameters"
    except DetectorError as error:  # the zoo was damaged since, which the next round says as well
        return str(error)
    return ""


def _get_weights(settings: Settings, device: str) -> str:
    commands = fetch_advice(device, settings.model_zoo, settings.weights_dir)
    if not commands:  # an operator's order of detectors that train from nothing
        return "name a detector of `ppal zoo list` whose weights you have"
    return f"run {commands} on the machine where detectors train"


def default_here(settings: Settings, device: str) -> DetectorInForce:
    """What a new project that names nothing would train, were its first round to begin on this machine now.

    Args:
        settings: the operator's settings.
        device: ``cuda`` or ``cpu``.

    Raises:
        WeightsUnavailable: the operator names a detector whose weights cannot be had.
        DetectorError: the zoo has no such detector, or no order to choose by.
    """
    if settings.detector == AUTO:
        found = choose(device, settings.model_zoo, settings.weights_dir)
        advice = _get_weights(settings, device) if found.is_trial else ""
        return DetectorInForce(found.detector, False, found.reason, advice)
    entry = find_entry(settings.detector, settings.model_zoo)
    problem = "" if settings.init_weights == "random" else weights_problem(entry, settings.weights_dir)
    if problem:
        raise WeightsUnavailable(problem)
    return DetectorInForce(entry.name, named=True)


def check_named(settings: Settings, store: Store, options: ProjectOptions) -> None:
    """See that a detector that is named can start its training, as far as this machine can tell, within two seconds.

    Where all living workers are on other machines, their first round tells.

    Raises:
        WeightsUnavailable: its initial weights cannot be had; the text says what to do.
        UnknownDetector: the zoo has no such detector.
    """
    if options.detector == AUTO or options.init_weights == "random":
        return
    entry = find_entry(options.detector, settings.model_zoo)
    problem = weights_problem(entry, settings.weights_dir, Reach(CONNECT_TIMEOUT_S))
    if problem and trains_here(store):
        raise WeightsUnavailable(problem)
    if problem:
        log.warning("left to the workers, which are on other machines: %s", problem)


def trains_here(store: Store) -> bool:
    """Whether rounds run on this machine, or none says where they do."""
    alive = [Lease.parse(name) for name, age in store.workers.ages_s().items() if age < ALIVE_WITHIN_S]
    return not alive or any(lease.is_here for lease in alive)


def choose_by_hand(settings: Settings, store: Store, project_id: int, name: str) -> DetectorChoice | None:
    """Keep a person's choice for a project that names no detector; ``auto`` lets the next round choose anew.

    Returns:
        The choice, None for ``auto``.

    Raises:
        StateError: the project is not connected, or its detector is named by its settings.
        UnknownDetector: the zoo has no such detector.
        WeightsUnavailable: its weights cannot be had.
    """
    options = settings.project_options(store.projects.get(project_id).options)
    if options.detector != AUTO:
        raise StateError(
            f"expected a project that names no detector, got one that names {options.detector}; change 'detector' in "
            f"its extra parameters (Settings > Model in Label Studio) or PPAL_DETECTOR"
        )
    choice = None
    if name == AUTO:
        auto_order(settings.model_zoo)
    else:
        check_named(settings, store, options.model_copy(update={"detector": name}))
        entry = find_entry(name, settings.model_zoo)
        choice = DetectorChoice(entry.name, "person", "somebody chose it on the Settings page")
    store.projects.set_choice(project_id, choice)
    store.projects.set_problem(project_id, TOPIC, "")
    return choice


def detector_for_round(
    settings: Settings,
    store: Store,
    project: ProjectRecord,
    kind: Literal["train", "rank"],
    model: ModelRef | None,
    device: Callable[[], str],
) -> str:
    """The detector of a round that begins. Where its weights cannot be had, the project says so from then on.

    Args:
        settings: the operator's settings.
        store: the state, which keeps a choice.
        project: the project.
        kind: whether the round trains.
        model: the model that it ranks with or, with ``init_weights = last``, starts from.
        device: tells ``cuda`` or ``cpu``: where detectors train here.

    Raises:
        WeightsUnavailable: the round is to train, and cannot.
        UnknownDetector: the zoo has no such detector.
        DetectorError: the zoo has no order to choose by.
    """
    options = settings.project_options(project.options)
    name = options.detector
    if name == AUTO:
        name = _chosen(settings, store, project, device)
    entry = find_entry(name, settings.model_zoo)
    goes_on = options.init_weights == "last" and model is not None and model.detector == name
    elsewhere = settings.engine == "ray"  # what the nodes have is seen when they train
    problem = ""
    if not (goes_on or elsewhere or options.init_weights == "random"):
        problem = weights_problem(entry, settings.weights_dir)
    store.projects.set_problem(project.id, TOPIC, problem)
    if problem and kind == "train":
        raise WeightsUnavailable(problem)
    return name


def _chosen(settings: Settings, store: Store, project: ProjectRecord, device: Callable[[], str]) -> str:
    """The project's choice, made now where there is none that stays."""
    before = project.choice
    is_known = before is not None and before.detector in load_zoo(settings.model_zoo)
    if before is not None and before.by != "trial" and is_known:
        return before.detector
    where = device()
    found = choose(where, settings.model_zoo, settings.weights_dir)
    reason = found.reason
    if before is not None and not is_known:
        reason = f"{before.detector}, chosen before, is not in the zoo any more; {reason}"
    choice = DetectorChoice(found.detector, "trial" if found.is_trial else "rule", reason, where)
    if choice != before:
        store.projects.set_choice(project.id, choice)
        log.info("detector %s: %s", choice.detector, choice.reason)
    return choice.detector


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
    entry = find_entry(name, settings.model_zoo)
    weights = entry.weights
    usable = weights is not None and weights.kind == "detector" and options.init_weights != "random"
    classes = weights.classes if weights is not None and usable else ()
    if entry.vocabulary is not None and usable:
        return known_by_prompt(schema.labels, schema.prompts, schema.shown)
    return match_classes(schema.labels, schema.class_names, classes, schema.shown)


def check_prompts(settings: Settings, label_config: str, options: ProjectOptions) -> None:
    """See that a detector that reads prompts, where one is named, has one of its own for every label.

    Raises:
        LabelConfigError: the labeling config cannot be used.
        DetectorError: a label's prompt is empty or another label's; or the zoo has no such detector.
    """
    if options.detector != AUTO and find_entry(options.detector, settings.model_zoo).vocabulary is not None:
        schema = parse_label_config(label_config, options.from_name)
        prompts_of(schema.labels, known_by_prompt(schema.labels, schema.prompts, schema.shown).plain)


def known_or_none(settings: Settings, project: ProjectRecord, detector: str | None = None) -> KnownClasses:
    """The same, nothing where it cannot be told: what is wrong is told where a round needs it."""
    try:
        return known_labels(settings, project, detector)
    except PPALError:
        return KnownClasses()


def known_label_lines(settings: Settings, store: Store, project: ProjectRecord) -> list[str]:
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
