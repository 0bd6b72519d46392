"""Summed 1 - posterior of the boxes.

Source: Lewis and Catlett, "Heterogeneous Uncertainty Sampling", ICML 1994; Table 3 of Yang et al., CVPR 2024.
"""

from __future__ import annotations

from ppal_backend.acquisition.selection import TopSelector
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """Images of largest summed posterior uncertainty."""
    return StagedStrategy("posterior", parts.uncertainty(options, "posterior"), TopSelector(), options)
