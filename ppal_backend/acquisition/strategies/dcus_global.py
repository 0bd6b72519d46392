"""Candidates by DCUS, diversified by the averaged last backbone map.

Source: Table 1 of Yang et al., CVPR 2024 (DCUS, Global).
"""

from __future__ import annotations

from ppal_backend.acquisition.comparisons import compare_features
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """DCUS stage 1, cosine of ``image_features['global']`` in stage 2."""
    return StagedStrategy(
        "dcus+global", parts.dcus(options), parts.diverse(options, compare_features("global")), options
    )
