"""Candidates by DCUS, then drawn at random.

Source: Table 1 of Yang et al., CVPR 2024 (DCUS, Rand).
"""

from __future__ import annotations

from ppal_backend.acquisition.selection import RandomSelector
from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """DCUS stage 1, random stage 2."""
    return StagedStrategy("dcus+rand", parts.dcus(options), RandomSelector(), options)
