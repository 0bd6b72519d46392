"""Summed 1 - margin of the two likeliest classes.

Source: Roth and Small, "Margin-based Active Learning for Structured Output Spaces", ECML 2006; Table 3 of
Yang et al., CVPR 2024.
"""

from __future__ import annotations

from ppal_backend.acquisition.selection import TopSelector
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """Images of largest summed margin uncertainty."""
    return StagedStrategy("margin", parts.uncertainty(options, "margin"), TopSelector(), options)
