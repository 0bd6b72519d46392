"""Candidates by entropy, diversified by CCMS.

Source: Table 1 of Yang et al., CVPR 2024 (Entropy, CCMS).
"""

from __future__ import annotations

from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """Entropy stage 1, CCMS stage 2."""
    return StagedStrategy("entropy+ccms", parts.uncertainty(options, "entropy"), parts.ccms(options), options)
