"""What people did to the pre-annotations they were shown, from an export alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from ppal_backend.datasets.label_studio_json import REGION_TYPE, choose_annotation

ACTIONS = ("kept", "moved", "relabelled", "removed", "added")
_FRAME = ("x", "y", "width", "height", "rotation")
_SAME_PCT = 0.01  # the editor writes an untouched box back with other last digits


def agreement_of(tasks: Iterable[Mapping[str, Any]], from_name: str) -> dict[str, dict[str, int]]:
    """Count by model version what became of its boxes.

    Label Studio keeps with each annotation the prediction of the project's version at the time of submission, and its
    editor leaves a predicted box its id. So a box of the prediction is ``kept`` (same place and label), ``moved``,
    ``relabelled`` (wherever it lies) or ``removed``; one that only the annotation has is ``added``.

    Args:
        tasks: Tasks as exported, read once. Of each the annotation counts that training uses; those made without a
            prediction are left out.
        from_name: Name of the RectangleLabels control; other regions do not count.

    Returns:
        By model version the number of ``tasks`` and of boxes under each of :data:`ACTIONS`; no tasks give ``{}``.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for task in tasks:
        annotation = choose_annotation(task)
        prediction = annotation.get("prediction") if annotation is not None else None
        version = prediction.get("model_version") if isinstance(prediction, Mapping) else None
        if annotation is None or not isinstance(prediction, Mapping) or not version:
            continue
        shown, submitted = (_boxes(of.get("result"), from_name) for of in (prediction, annotation))
        count = counts[str(version)]
        count["tasks"] += 1
        count.update(_action(value, submitted.get(region)) for region, value in shown.items())
        count["added"] += sum(region not in shown for region in submitted)
    return {version: {name: count[name] for name in ("tasks", *ACTIONS)} for version, count in counts.items()}


def _boxes(result: Any, from_name: str) -> dict[str, Mapping[str, Any]]:
    """Values of the boxes of a control by region id; a region without an id can be nobody's copy."""
    found: dict[str, Mapping[str, Any]] = {}
    for number, region in enumerate(result if isinstance(result, list) else ()):
        mine = isinstance(region, Mapping) and region.get("type") == REGION_TYPE
        if mine and region.get("from_name") == from_name and isinstance(region.get("value"), Mapping):
            found[str(region.get("id") or f"{id(result)}-{number}")] = region["value"]
    return found


def _action(shown: Mapping[str, Any], submitted: Mapping[str, Any] | None) -> str:
    if submitted is None:
        return "removed"
    if shown.get(REGION_TYPE) != submitted.get(REGION_TYPE):
        return "relabelled"
    apart = (abs(float(shown.get(key) or 0) - float(submitted.get(key) or 0)) for key in _FRAME)
    return "kept" if all(distance <= _SAME_PCT for distance in apart) else "moved"
