"""Difficulty Calibrated Uncertainty Sampling without a second stage.

Source: Yang, Huang and Crowley, "Plug and Play Active Learning for Object Detection", CVPR 2024,
Sec. 3.2.
"""

from __future__ import annotations

from ppal_backend.acquisition.selection import TopSelector
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """Images of largest difficulty-weighted uncertainty."""
    return StagedStrategy("dcus", parts.dcus(options), TopSelector(), options)
