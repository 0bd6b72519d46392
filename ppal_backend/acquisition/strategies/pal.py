"""PAL: calibrated true-positive uncertainty, refined by image-level signals.

Source: "Portable Active Learning for Object Detection", CVPR 2026; see :mod:`ppal_backend.acquisition.calibrated`
for what follows the paper and what is ours.
"""

from __future__ import annotations

from ppal_backend.acquisition.calibrated import CalibratedScorer, SignalSelector
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """Calibrated uncertainty in stage 1; entropy, rare classes and a similarity penalty in stage 2."""
    scorer = CalibratedScorer(options.boxes)
    return StagedStrategy("pal", scorer, SignalSelector(parts.compare(options), options.boxes), options)
