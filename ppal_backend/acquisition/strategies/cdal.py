"""CDAL: k-center on contextual diversity, the divergence of class-wise mixed predictions.

Source: Agarwal, Arora, Anand and Arora, "Contextual Diversity for Active Learning", ECCV 2020 (CDAL-CS).
"""

from __future__ import annotations

from ppal_backend.acquisition.contextual import compare_context
from ppal_backend.acquisition.selection import DiverseSelector
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """Greedy k-center over the whole pool; entropy orders the rest of the queue."""
    compare = compare_context(options.boxes)
    selector = DiverseSelector(compare, refine=None, first="farthest", min_distance=options.min_distance)
    return StagedStrategy("cdal", parts.uncertainty(options, "entropy"), selector, options, whole_pool=True)
