"""Plug and Play Active Learning: candidates by DCUS, diversified by CCMS.

Source: Yang, Huang and Crowley, "Plug and Play Active Learning for Object Detection", CVPR 2024.
"""

from __future__ import annotations

from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy


def build(options: Options) -> QueryStrategy:
    """DCUS stage 1, CCMS stage 2."""
    return StagedStrategy("ppal", parts.dcus(options), parts.ccms(options), options)
