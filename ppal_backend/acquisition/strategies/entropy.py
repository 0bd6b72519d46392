"""Summed entropy of the boxes; the strongest simple baseline of the paper.

Source: Table 1 of Yang et al., CVPR 2024; Settles, "Active Learning", 2012.
"""

from __future__ import annotations

from ppal_backend.acquisition.selection import TopSelector
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """Images of largest summed entropy uncertainty."""
    return StagedStrategy("entropy", parts.uncertainty(options, "entropy"), TopSelector(), options)
