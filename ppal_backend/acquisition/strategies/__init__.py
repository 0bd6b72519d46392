"""Query strategies by name; one file each, made of the stages in :mod:`ppal_backend.acquisition`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ppal_backend.acquisition.strategies import (
    cdal,
    coreset,
    dcus,
    dcus_fpn,
    dcus_global,
    dcus_jaccard,
    dcus_rand,
    dfreq,
    dfreq_ccms,
    enms_divproto,
    entropy,
    entropy_ccms,
    margin,
    pal,
    posterior,
    ppal,
    ppal_balance,
    ppal_labelled,
    ppal_pal,
    rand_ccms,
    random,
    typiclust,
)
from ppal_backend.acquisition.strategies.base import Builder, Options, QueryStrategy

_BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "random": random.build,
        "entropy": entropy.build,
        "posterior": posterior.build,
        "margin": margin.build,
        "dcus": dcus.build,
        "dfreq": dfreq.build,
        "rand+ccms": rand_ccms.build,
        "entropy+ccms": entropy_ccms.build,
        "dfreq+ccms": dfreq_ccms.build,
        "dcus+rand": dcus_rand.build,
        "dcus+global": dcus_global.build,
        "dcus+fpn": dcus_fpn.build,
        "dcus+jaccard": dcus_jaccard.build,
        "ppal": ppal.build,
        "coreset": coreset.build,
        "cdal": cdal.build,
        "enms+divproto": enms_divproto.build,
        "pal": pal.build,
        "ppal+labelled": ppal_labelled.build,
        "ppal+balance": ppal_balance.build,
        "ppal+pal": ppal_pal.build,
        "typiclust": typiclust.build,
    }
)

USES_LABELLED = frozenset({"coreset", "cdal", "enms+divproto", "pal", "ppal+pal", "ppal+labelled", "typiclust"})
"""Strategies that use the model's detections on, or features of, labelled images where they are given."""


def strategy_names() -> tuple[str, ...]:
    """Names of all strategies, baselines first."""
    return tuple(_BUILDERS)


def get_strategy(name: str, **options: Any) -> QueryStrategy:
    """Make a strategy.

    Args:
        name: One of :func:`strategy_names`.
        options: Fields of :class:`~ppal_backend.acquisition.strategies.base.Options`.

    Raises:
        ValueError: An unknown name or option, or an option out of range.
    """
    if name not in _BUILDERS:
        raise ValueError(f"expected a strategy among {list(_BUILDERS)}, got {name!r}; correct the name")
    return _BUILDERS[name](Options.parse(options))


__all__ = ["USES_LABELLED", "Options", "QueryStrategy", "get_strategy", "strategy_names"]
