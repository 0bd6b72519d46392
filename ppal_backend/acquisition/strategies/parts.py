"""Stages that several strategies share, made from options."""

from __future__ import annotations

from ppal_backend.acquisition.comparisons import compare_ccms
from ppal_backend.acquisition.dcus import ClassWeights, UncertaintyScorer, difficulty_weights
from ppal_backend.acquisition.selection import Compare, DiverseSelector
from ppal_backend.acquisition.strategies.base import Options


def uncertainty(options: Options, measure: str | None = None, weights: ClassWeights | None = None) -> UncertaintyScorer:
    """Uncertainty of images, by default in the measure of the options and without class weights."""
    return UncertaintyScorer(measure or options.uncertainty, options.aggregate, options.boxes, weights)


def dcus(options: Options) -> UncertaintyScorer:
    """Difficulty calibrated uncertainty (Eq. 5)."""
    return uncertainty(options, weights=difficulty_weights(options.alpha, options.beta))


def diverse(options: Options, compare: Compare) -> DiverseSelector:
    """k-Center-Greedy and k-medoids on any comparison."""
    return DiverseSelector(compare, options.refine, options.max_iterations, options.first, options.min_distance)


def compare(options: Options, labelled: bool = False) -> Compare:
    """How CCMS compares candidates, and with ``labelled`` the labelled images too."""
    return compare_ccms(options.boxes, options.device, options.memory_gib, options.metric, labelled, options.similarity)


def ccms(options: Options, labelled: bool = False) -> DiverseSelector:
    """k-Center-Greedy and k-medoids on CCMS."""
    return diverse(options, compare(options, labelled))
