"""Uncertainty weighted by 1 - class frequency in the labelled set, without a second stage.

Source: the ablation D-Freq, Table 1 of Yang et al., CVPR 2024.
"""

from __future__ import annotations

from ppal_backend.acquisition.dcus import frequency_weights
from ppal_backend.acquisition.selection import TopSelector
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """Images of largest frequency-weighted uncertainty; needs ``class_counts``."""
    return StagedStrategy("dfreq", parts.uncertainty(options, weights=frequency_weights), TopSelector(), options)
