"""Candidates by frequency-weighted uncertainty, diversified by CCMS.

Source: Table 1 of Yang et al., CVPR 2024 (D-Freq, CCMS).
"""

from __future__ import annotations

from ppal_backend.acquisition.dcus import frequency_weights
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """D-Freq stage 1, CCMS stage 2; needs ``class_counts``."""
    return StagedStrategy(
        "dfreq+ccms", parts.uncertainty(options, weights=frequency_weights), parts.ccms(options), options
    )
