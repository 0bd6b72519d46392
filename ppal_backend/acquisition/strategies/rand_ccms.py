"""Random candidates, diversified by CCMS.

Source: Table 1 of Yang et al., CVPR 2024 (Rand, CCMS).
"""

from __future__ import annotations

from ppal_backend.acquisition.dcus import RandomScorer
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """Random stage 1, CCMS stage 2."""
    return StagedStrategy("rand+ccms", RandomScorer(), parts.ccms(options), options)
