"""PPAL with the calibrated true-positive uncertainty of PAL in stage 1.

Source: Yang et al., CVPR 2024; "Portable Active Learning for Object Detection", CVPR 2026.
"""

from __future__ import annotations

from ppal_backend.acquisition.calibrated import CalibratedScorer
from ppal_backend.acquisition.dcus import difficulty_weights
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """Calibrated uncertainty under difficulty weights in stage 1, CCMS in stage 2."""
    scorer = CalibratedScorer(options.boxes, difficulty_weights(options.alpha, options.beta))
    return StagedStrategy("ppal+pal", scorer, parts.ccms(options), options)
