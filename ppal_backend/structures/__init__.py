"""Validated value objects that every other package may import."""

from ppal_backend.structures.detections import Detections
from ppal_backend.structures.query import (
    BoxContribution,
    CandidatePool,
    ClassContribution,
    Explanation,
    QueryContext,
    QuerySet,
)

__all__ = [
    "BoxContribution",
    "CandidatePool",
    "ClassContribution",
    "Detections",
    "Explanation",
    "QueryContext",
    "QuerySet",
]
