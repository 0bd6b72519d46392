"""Candidates by DCUS, diversified by predicted class sets.

Source: Table 1 of Yang et al., CVPR 2024 (DCUS, Jaccard).
"""

from __future__ import annotations

from ppal_backend.acquisition.comparisons import compare_jaccard
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """DCUS stage 1, Jaccard similarity of class sets in stage 2."""
    return StagedStrategy(
        "dcus+jaccard", parts.dcus(options), parts.diverse(options, compare_jaccard(options.boxes)), options
    )
