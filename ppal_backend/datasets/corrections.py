"""What people did to the pre-annotations they were shown, and how long it took them.

Label Studio keeps with each annotation the prediction of the project's version at the time of submission, and its
editor leaves a predicted box its id. So a box of the prediction is ``kept`` (same place and label), ``moved``,
``relabelled`` (wherever it lies) or ``removed``; one that only the annotation has is ``added``. Whoever had a task open
while another version came into force was shown other boxes; that tells nothing of either version.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from ppal_backend.datasets.consensus import annotator_of
from ppal_backend.datasets.label_studio_json import REGION_TYPE, choose_annotation
from ppal_backend.structures.round import SECOND_OPINION_SCORE, VERSION_PREFIX

ACTIONS = ("kept", "moved", "relabelled", "removed", "added")
_COPIED = ("prediction", "prediction-changed")  # origins of regions that the editor took from a prediction
_FRAME = ("x", "y", "width", "height", "rotation")
_SAME_PCT = 0.01  # the editor writes an untouched box back with other last digits
FAR_OUT_IQR = 3.0
"""Lead times this many interquartile ranges above the upper quartile are left out: somebody went for lunch."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What became of the boxes that the maker of an annotation was shown.

    Args:
        version: Model version that proposed them; None where nothing says that one did, or it proposed nothing on
            purpose (a second opinion).
        boxes: What became of each (one of :data:`ACTIONS`, never ``added``), with its confidence where it had one.
        added: Boxes that only the annotation has.
        seconds: What it took (Label Studio's ``lead_time``); None where that was not measured.
        annotator: Label Studio's id of who made it, as far as it is told.
    """

    version: str | None
    boxes: tuple[tuple[str, float | None], ...]
    added: int
    seconds: float | None
    annotator: Any


def corrections_of(tasks: Iterable[Mapping[str, Any]], from_name: str) -> list[Correction]:
    """One row a task that is annotated, unless its annotation began with another prediction than the one kept with it.

    Args:
        tasks: Tasks as exported, read once. Of each the annotation counts that training uses.
        from_name: Name of the RectangleLabels control; other regions do not count.
    """
    chosen = (choose_annotation(task) for task in tasks)
    made = (_correction(annotation, from_name) for annotation in chosen if annotation is not None)
    return [correction for correction in made if correction is not None]


def _correction(annotation: Mapping[str, Any], from_name: str) -> Correction | None:
    prediction = annotation.get("prediction")
    proposal: Mapping[str, Any] = prediction if isinstance(prediction, Mapping) else {}
    shown, submitted = (_boxes(of.get("result"), from_name) for of in (proposal, annotation))
    if _began_with_another(annotation.get("parent_prediction"), submitted, proposal.get("id"), shown):
        return None
    version, seconds = str(proposal.get("model_version") or ""), _number(annotation.get("lead_time"))
    is_blind = version.startswith(VERSION_PREFIX) and proposal.get("score") == SECOND_OPINION_SCORE
    return Correction(
        version if version and not is_blind else None,
        tuple((_action(region, submitted.get(name)), _number(region.get("score"))) for name, region in shown.items()),
        sum(name not in shown for name in submitted),
        seconds if seconds is not None and 0 < seconds < math.inf else None,
        annotator_of(annotation),
    )


def _began_with_another(
    parent: Any, submitted: Mapping[str, Mapping[str, Any]], proposal: Any, shown: Mapping[str, Mapping[str, Any]]
) -> bool:
    """Whether an annotation is known to have begun with another prediction than ``proposal``.

    Label Studio forgets the ``parent`` once that is deleted. Then boxes tell that were taken from a prediction, if none
    was from this one: people copy boxes, and copies have ids of their own.
    """
    if parent is not None:
        return bool(parent != proposal)
    copied = {name for name, region in submitted.items() if region.get("origin") in _COPIED}
    return bool(copied) and copied.isdisjoint(shown)


def _boxes(result: Any, from_name: str) -> dict[str, Mapping[str, Any]]:
    """The boxes of a control by region id; a region without an id can be nobody's copy."""
    found: dict[str, Mapping[str, Any]] = {}
    for number, region in enumerate(result if isinstance(result, list) else ()):
        mine = isinstance(region, Mapping) and region.get("type") == REGION_TYPE
        if mine and region.get("from_name") == from_name and isinstance(region.get("value"), Mapping):
            found[str(region.get("id") or f"{id(result)}-{number}")] = region
    return found


def _action(shown: Mapping[str, Any], submitted: Mapping[str, Any] | None) -> str:
    """What became of a proposed box; both are regions of the same id."""
    if submitted is None:
        return "removed"
    before, after = shown["value"], submitted["value"]
    if before.get(REGION_TYPE) != after.get(REGION_TYPE):
        return "relabelled"
    return "kept" if all(_is_same(before.get(key) or 0, after.get(key) or 0) for key in _FRAME) else "moved"


def _is_same(before: Any, after: Any) -> bool:
    """Whether two numbers of a frame are one to a person; Label Studio stores whatever other tools write there."""
    low, high = _number(before), _number(after)
    return bool(before == after) if low is None or high is None else abs(high - low) <= _SAME_PCT


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def agreement_of(corrections: Iterable[Correction]) -> dict[str, dict[str, int]]:
    """By model version the number of ``tasks`` and of boxes under each of :data:`ACTIONS`; ``{}`` without any."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for correction in corrections:
        if correction.version is not None:
            count = counts[correction.version]
            count.update(tasks=1, added=correction.added)
            count.update(action for action, _ in correction.boxes)
    return {version: {name: count[name] for name in ("tasks", *ACTIONS)} for version, count in counts.items()}


def labeling_times(corrections: Iterable[Correction], by_annotator: bool = False) -> dict[str, dict[str, float]]:
    """Seconds that people took for an image, with boxes proposed to them and without.

    Args:
        corrections: Those without a time are left out.
        by_annotator: Whether to tell it of each annotator too.

    Returns:
        By ``with`` and ``without``, and with ``by_annotator`` by ``with ID`` and ``without ID`` too: ``images``,
        their ``median_s``, and how many images were left ``out`` because their time is far out. Groups without an
        image are missing.
    """
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for correction in corrections:
        if correction.seconds is None:
            continue
        group = "with" if correction.boxes else "without"
        seconds[group].append(correction.seconds)
        if by_annotator and correction.annotator is not None:
            seconds[f"{group} {correction.annotator}"].append(correction.seconds)
    return {group: _typical(found) for group, found in sorted(seconds.items())}


def _typical(seconds: list[float]) -> dict[str, float]:
    low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    kept = [s for s in seconds if s <= high + FAR_OUT_IQR * (high - low)]
    return {"images": len(kept), "median_s": round(median(kept), 1), "out": len(seconds) - len(kept)}
