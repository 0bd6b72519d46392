"""Core-set: k-center on global features, labelled images as first centres.

Source: Sener and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018.
"""

from __future__ import annotations

from ppal_backend.acquisition.comparisons import compare_features
from ppal_backend.acquisition.selection import DiverseSelector
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """Greedy k-center over the whole pool; entropy orders the rest of the queue."""
    compare = compare_features("global", labelled=True, euclidean=True)
    selector = DiverseSelector(compare, refine=None, first="farthest", min_distance=options.min_distance)
    return StagedStrategy("coreset", parts.uncertainty(options, "entropy"), selector, options, whole_pool=True)
