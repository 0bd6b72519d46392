"""PPAL in which rare predicted classes weigh more.

Source: Yang et al., CVPR 2024; the balance factor is this project's own.
"""

from __future__ import annotations

from ppal_backend.acquisition.dcus import balanced_weights, difficulty_weights
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """DCUS weights times a rarity factor in stage 1, CCMS in stage 2."""
    weights = balanced_weights(difficulty_weights(options.alpha, options.beta), options.strength, options.boxes)
    scorer = parts.uncertainty(options, weights=weights)
    return StagedStrategy("ppal+balance", scorer, parts.ccms(options), options)
