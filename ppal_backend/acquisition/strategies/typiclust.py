"""TypiClust on image features, for the cold start before any detector is trained.

Source: Hacohen, Dekel and Weinshall, "Active Learning on a Budget: Opposite Strategies Suit High and Low Budgets",
ICML 2022.
"""

from __future__ import annotations

from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy
from ppal_backend.acquisition.typicality import TypicalityScorer, TypicalitySelector


def build(options: Options) -> QueryStrategy:
    """The most typical image of each large cluster without labels; needs ``image_features['global']``."""
    return StagedStrategy("typiclust", TypicalityScorer(), TypicalitySelector(), options, whole_pool=True)
