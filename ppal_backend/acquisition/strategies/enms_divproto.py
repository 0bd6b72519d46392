"""Entropy-based NMS in feature space, then rejection by class prototypes.

Source: Wu, Chen and Huang, "Entropy-based Active Learning for Object Detection with Progressive Diversity
Constraint", CVPR 2022.
"""

from __future__ import annotations

from ppal_backend.acquisition.prototypes import EnmsScorer, PrototypeSelector
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """ENMS entropy over the whole pool, accepted greedily under the intra- and inter-class constraints."""
    scorer = EnmsScorer(options.boxes)
    return StagedStrategy("enms+divproto", scorer, PrototypeSelector(scorer), options, whole_pool=True)
