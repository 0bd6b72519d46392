"""What a detector with an open vocabulary is asked to look for: a prompt for every label of a project.

The prompt of a label is its attribute ``prompt`` in the labeling config, else what people read as the label. Nothing
heavy is imported here: a service asks while a person waits for an answer.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence

from ppal_backend.detector.zoo import ZooEntry
from ppal_backend.detector.zoo.known_classes import KnownClasses
from ppal_backend.errors import DetectorError

PACKAGE = "transformers"
REMEDY = 'set it in the labeling config: <Label value="…" prompt="…"/>'
_SEPARATORS = re.compile(r"[\s._?()\[\]]+")  # with them mmdetection ends a prompt, or leaves a part of it out


def package_problem(entry: ZooEntry) -> str:
    """What to install before a detector can read prompts, in a sentence; "" when it is there or not needed."""
    if entry.vocabulary is None or importlib.util.find_spec(PACKAGE) is not None:
        return ""
    return (
        f"expected the package {PACKAGE}, with which {entry.name} reads prompts, found none; where detectors train run "
        f"pip install 'ppal-backend[grounding]', or name another detector"
    )


def prompts_of(labels: Sequence[str], given: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """A prompt for every label, as the text encoder reads it.

    Full stops, question marks, brackets, underscores and line breaks become blanks: they would end a prompt, or part of
    it would be left out.

    Args:
        labels: Labels of the project.
        given: Label -> its prompt, alone in a list; a label without any is its own prompt.

    Returns:
        Prompts in the order of the labels.

    Raises:
        DetectorError: Nothing is left of a prompt, or two labels have the same.
    """
    owners: dict[str, str] = {}
    prompts: list[str] = []
    for label in labels:
        raw = next(iter(given.get(label, ())), label)
        prompt = _SEPARATORS.sub(" ", raw).strip()
        prompts.append(prompt)
        if not prompt:
            raise DetectorError(f"expected words in the prompt of the label {label!r}, got {raw!r}; {REMEDY}")
        other = owners.setdefault(prompt.casefold(), label)
        if other != label:
            raise same_prompt(other, label, prompt)
    return tuple(prompts)


def same_prompt(label: str, other: str, prompt: str) -> DetectorError:
    """The error for two labels that a detector could not tell apart."""
    return DetectorError(
        f"expected a prompt of its own for every label, got {prompt[:60]!r} for {label!r} and for {other!r}; give one "
        f"of them another, {REMEDY}"
    )


def known_by_prompt(labels: Sequence[str], prompts: Mapping[str, str], shown: Mapping[str, str]) -> KnownClasses:
    """What weights with an open vocabulary know of a project's labels: all of them, by their prompts.

    Args:
        labels: Labels of the project.
        prompts: Label -> its attribute ``prompt``, for labels that have it.
        shown: Label -> what people read in its place, for labels that have an alias.
    """
    found = {label: (prompts.get(label) or shown.get(label, label),) for label in labels}
    return KnownClasses(found, {label: "prompt" for label in labels}, labels=tuple(labels))
