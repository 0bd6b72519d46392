"""Random sampling: the baseline of every comparison."""

from __future__ import annotations

from ppal_backend.acquisition.dcus import RandomScorer
from ppal_backend.acquisition.selection import TopSelector
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """Images in a drawn order."""
    return StagedStrategy("random", RandomScorer(), TopSelector(), options)
