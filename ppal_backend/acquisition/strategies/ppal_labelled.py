"""PPAL whose clusters know the labelled images: they are first centres that neither move nor count.

Source: Yang et al., CVPR 2024, with the fixed first centres of Sener and Savarese, "Active Learning for
Convolutional Neural Networks: A Core-Set Approach", ICLR 2018.
"""

from __future__ import annotations

from ppal_backend.acquisition.strategies import parts
from ppal_backend.acquisition.strategies.base import Options, QueryStrategy, StagedStrategy

WIDEST = 0.25  # of the pool: beyond, images that the detector is sure about are far from everything and get picked


def build(options: Options) -> QueryStrategy:
    """DCUS stage 1, CCMS stage 2 with the context's labelled images as fixed centres. However large delta, of a small
    pool not everything is a candidate."""
    return StagedStrategy(
        "ppal+labelled", parts.dcus(options), parts.ccms(options, labelled=True), options, widest=WIDEST
    )
