"""What every tracer offers."""

from __future__ import annotations

from typing import Any, Protocol

from ppal_backend.detector.probes.base import Restore

EXTRA_FIELDS = ("ppal_boxes", "ppal_levels", "ppal_probs")
EMBEDDING_FIELD = "ppal_embeddings"  # only of heads that describe a detection themselves
NO_LEVEL = -1


class Tracer(Protocol):
    """Makes one family of detectors report levels and probabilities with its predictions."""

    family: str

    def covers(self, detector: Any) -> bool:
        """Whether this tracer reads this detector right."""

    def is_softmax(self, detector: Any) -> bool:
        """Whether probabilities are a softmax over C + 1 classes, background last."""

    def attach(self, detector: Any) -> Restore:
        """Start tracing; the returned function restores the detector."""
