"""Query strategies by name: a table of which stage 1 goes with which stage 2 (:data:`STRATEGIES`).

Stage 1 scores the pool, of which the best are candidates; stage 2 selects among those and orders the query set. A new
strategy is a line of the table, and a scorer or selector beside it where the stage is new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ppal_backend.acquisition.baselines.cdal import compare_context
from ppal_backend.acquisition.baselines.enms_divproto import EnmsScorer, PrototypeSelector
from ppal_backend.acquisition.baselines.mdn import MixtureScorer
from ppal_backend.acquisition.baselines.pal import CalibratedScorer, SignalSelector
from ppal_backend.acquisition.baselines.typiclust import TypicalityScorer, TypicalitySelector
from ppal_backend.acquisition.comparisons import compare_ccms, compare_features, compare_jaccard
from ppal_backend.acquisition.coverage import CoverageSelector
from ppal_backend.acquisition.dcus import (
    ClassWeights,
    GainScorer,
    ModelScorer,
    RandomScorer,
    Scorer,
    UncertaintyScorer,
    balanced_weights,
    difficulty_weights,
    frequency_weights,
    rarity_weights,
)
from ppal_backend.acquisition.selection import Compare, DiverseSelector, RandomSelector, Selector, TopSelector
from ppal_backend.acquisition.staged import Needs, Options, QueryStrategy, StagedStrategy

Stage1 = Callable[[Options], Scorer]
Stage2 = Callable[[Options], Selector]
WIDEST = 0.25  # of the pool: beyond, images that the detector is sure about are far from everything and get picked


@dataclass(frozen=True)
class Recipe:
    """A named strategy.

    Args:
        about: What it is and whose.
        stage_1: Makes what scores the pool.
        stage_2: Makes what selects among the candidates.
        whole_pool: Whether every image is a candidate.
        widest: Largest share of the pool that may be candidates; see :class:`StagedStrategy`.
        labelled: Whether it uses the model's detections on, or features of, labelled images where they are given.
        needs: What it reads beside boxes, scores and classes; of labelled images the same, where it uses them.
    """

    about: str
    stage_1: Stage1
    stage_2: Stage2
    whole_pool: bool = False
    widest: float = 1.0
    labelled: bool = False
    needs: Needs = field(default_factory=dict)


def _eq_4(o: Options) -> ClassWeights:
    return difficulty_weights(o.alpha, o.beta)


def _uncertainty(
    measure: str | None = None, weights: Callable[[Options], ClassWeights] | None = None
) -> Callable[[Options], UncertaintyScorer]:
    """Uncertainty of images, by default in the measure of the options and without class weights."""
    return lambda o: UncertaintyScorer(measure or o.uncertainty, o.aggregate, o.boxes, weights and weights(o))


def _compare_ccms(o: Options, labelled: bool = False) -> Compare:
    """CCMS; with ``labelled`` the context's labelled images are centres that stay."""
    return compare_ccms(o.boxes, o.device, o.memory_gib, o.metric, labelled, o.similarity)


def _diverse(compare: Callable[[Options], Compare]) -> Stage2:
    """k-Center-Greedy and k-medoids (Sec. 3.3) on any comparison."""
    return lambda o: DiverseSelector(compare(o), o.refine, o.max_iterations, o.first, o.min_distance)


def _greedy(compare: Callable[[Options], Compare]) -> Stage2:
    """k-Center-Greedy alone, beginning farthest from labelled images."""
    return lambda o: DiverseSelector(compare(o), refine=None, first="farthest", min_distance=o.min_distance)


def _gain(o: Options) -> GainScorer:
    """Expected gain for its cost, of classes by difficulty and by what they lack."""
    return GainScorer(o.uncertainty, o.boxes, rarity_weights(_eq_4(o), o.strength), o.price)


def _coverage(stage_1: Callable[[Options], UncertaintyScorer | GainScorer]) -> Stage2:
    """Coverage beside the labelled images, of candidates that weigh what stage 1 gave them."""
    return lambda o: CoverageSelector(_compare_ccms(o, labelled=True), stage_1(o).of, o.min_distance)


def _random(o: Options) -> Scorer:
    return RandomScorer()


def _top(o: Options) -> Selector:
    return TopSelector()


_ENTROPY = _uncertainty("entropy")
_D_FREQ = _uncertainty(weights=lambda o: frequency_weights)
_DCUS = _uncertainty(weights=_eq_4)
_CCMS = _diverse(_compare_ccms)
_CCMS_LABELLED = _diverse(lambda o: _compare_ccms(o, labelled=True))
_OF_CANDIDATES: Needs = MappingProxyType({"embeddings": "candidates"})

STRATEGIES: Mapping[str, Recipe] = MappingProxyType(
    {
        "random": Recipe("Random sampling, the baseline of every comparison.", _random, _top),
        "entropy": Recipe("Largest summed entropy (Settles, 2012), the strongest simple baseline.", _ENTROPY, _top),
        "posterior": Recipe("Summed 1 - posterior (Lewis and Catlett, ICML 1994).", _uncertainty("posterior"), _top),
        "margin": Recipe("Summed 1 - margin (Roth and Small, ECML 2006).", _uncertainty("margin"), _top),
        "dcus": Recipe("Stage 1 of PPAL alone (Sec. 3.2).", _DCUS, _top),
        "dfreq": Recipe("Uncertainty weighted by 1 - class frequency (Table 1, D-Freq).", _D_FREQ, _top),
        "rand+ccms": Recipe(
            "Random candidates (Table 1).",
            _random,
            _CCMS,
            needs=_OF_CANDIDATES,
        ),
        "entropy+ccms": Recipe(
            "Candidates by entropy (Table 1).",
            _ENTROPY,
            _CCMS,
            needs=_OF_CANDIDATES,
        ),
        "dfreq+ccms": Recipe(
            "Candidates by D-Freq (Table 1).",
            _D_FREQ,
            _CCMS,
            needs=_OF_CANDIDATES,
        ),
        "dcus+rand": Recipe("Drawn from DCUS's candidates (Table 1).", _DCUS, lambda o: RandomSelector()),
        "dcus+global": Recipe(
            "DCUS, then the last backbone map (Table 1).",
            _DCUS,
            _diverse(lambda o: compare_features("global")),
            needs={"global": "candidates"},
        ),
        "dcus+fpn": Recipe(
            "DCUS, then the maps of the pyramid (Table 1).",
            _DCUS,
            _diverse(lambda o: compare_features("fpn")),
            needs={"fpn": "candidates"},
        ),
        "dcus+jaccard": Recipe(
            "DCUS, then sets of predicted classes (Table 1).", _DCUS, _diverse(lambda o: compare_jaccard(o.boxes))
        ),
        "ppal": Recipe(
            "Plug and Play Active Learning (Yang, Huang and Crowley, CVPR 2024).",
            _DCUS,
            _CCMS,
            needs=_OF_CANDIDATES,
        ),
        "coreset": Recipe(
            "k-center on global features (Sener and Savarese, ICLR 2018); entropy orders the rest of the queue.",
            _ENTROPY,
            _greedy(lambda o: compare_features("global", labelled=True, euclidean=True)),
            whole_pool=True,
            labelled=True,
            needs={"global": "pool"},
        ),
        "cdal": Recipe(
            "k-center on contextual diversity (Agarwal et al., ECCV 2020); entropy orders the rest of the queue.",
            _ENTROPY,
            _greedy(lambda o: compare_context(o.boxes)),
            whole_pool=True,
            labelled=True,
        ),
        "enms+divproto": Recipe(
            "Entropy-based suppression, then class prototypes (Wu, Chen and Huang, CVPR 2022).",
            lambda o: EnmsScorer(o.boxes),
            lambda o: PrototypeSelector(EnmsScorer(o.boxes)),
            whole_pool=True,
            needs={"embeddings": "pool"},
        ),
        "pal": Recipe(
            "Calibrated uncertainty, refined by signals of the image (Portable Active Learning, CVPR 2026).",
            lambda o: CalibratedScorer(o.boxes),
            lambda o: SignalSelector(_compare_ccms(o), o.boxes),
            labelled=True,
            needs=_OF_CANDIDATES,
        ),
        "ppal+labelled": Recipe(
            "PPAL whose clusters know the labelled images: centres that neither move nor count, as in core-set. Of a "
            "small pool not everything is a candidate, however large delta.",
            _DCUS,
            _CCMS_LABELLED,
            widest=WIDEST,
            labelled=True,
            needs=_OF_CANDIDATES,
        ),
        "auto": Recipe(
            "This project's own: DCUS with diminishing returns, classes that lack boxes first, for the time it costs; "
            "then the images that stand for most of that, beside the labelled ones (CCMS).",
            _gain,
            _coverage(_gain),
            widest=WIDEST,
            labelled=True,
            needs=_OF_CANDIDATES,
        ),
        "gain": Recipe("Stage 1 of auto alone.", _gain, _top),
        "gain+ccms": Recipe(
            "Stage 1 of auto, then stage 2 of ppal+labelled.",
            _gain,
            _CCMS_LABELLED,
            widest=WIDEST,
            labelled=True,
            needs=_OF_CANDIDATES,
        ),
        "dcus+coverage": Recipe(
            "Stage 1 of PPAL, then stage 2 of auto.",
            _DCUS,
            _coverage(_DCUS),
            widest=WIDEST,
            labelled=True,
            needs=_OF_CANDIDATES,
        ),
        "ppal+balance": Recipe(
            "PPAL in which rare predicted classes weigh more, this project's own.",
            _uncertainty(weights=lambda o: balanced_weights(_eq_4(o), o.strength, o.boxes)),
            _CCMS,
            needs=_OF_CANDIDATES,
        ),
        "ppal+pal": Recipe(
            "PPAL with PAL's calibrated uncertainty under difficulty weights in stage 1.",
            lambda o: CalibratedScorer(o.boxes, _eq_4(o)),
            _CCMS,
            labelled=True,
            needs=_OF_CANDIDATES,
        ),
        "typiclust": Recipe(
            "The typical image of each large cluster without labels (Hacohen, Dekel and Weinshall, ICML 2022), for the "
            "cold start; needs image_features['global'].",
            lambda o: TypicalityScorer(),
            lambda o: TypicalitySelector(),
            whole_pool=True,
            labelled=True,
            needs={"global": "pool"},
        ),
    }
)


def _rival(name: str, about: str) -> Recipe:
    """A method whose utility comes out of the detector that it changed."""
    return Recipe(about, lambda o: ModelScorer(name), _top, needs={name: "pool"})


RIVALS: Mapping[str, Recipe] = MappingProxyType(
    {
        "learnloss": _rival("learnloss", "Largest predicted loss (Yoo and Kweon, CVPR 2019)."),
        "mdn": Recipe(
            "Largest of four uncertainties of mixture density outputs (Choi et al., ICCV 2021).",
            lambda o: MixtureScorer(),
            _top,
            needs={"mdn": "pool"},
        ),
        "mial": _rival("mial", "Largest discrepancy of two classifiers (Yuan et al., CVPR 2021)."),
    }
)
"""Strategies that change the detector, in simulations only (see ``detector.rivals``)."""

USES_LABELLED = frozenset(name for name, recipe in STRATEGIES.items() if recipe.labelled)
"""Strategies that use the model's detections on, or features of, labelled images where they are given."""

READS_COUNTS = frozenset({"pal", "ppal+pal"})
"""Strategies that read how many boxes before suppression a detection stands for."""


def strategy_names() -> tuple[str, ...]:
    """Names of all strategies that leave the detector as it is, baselines first."""
    return tuple(STRATEGIES)


def rival_names() -> tuple[str, ...]:
    """Names of those that change it."""
    return tuple(RIVALS)


def get_strategy(name: str, **options: Any) -> QueryStrategy:
    """Make a strategy.

    Args:
        name: One of :func:`strategy_names` or :func:`rival_names`.
        options: Fields of :class:`~ppal_backend.acquisition.staged.Options`.

    Raises:
        ValueError: An unknown name or option, or an option out of range.
    """
    recipes = {**STRATEGIES, **RIVALS}
    if name not in recipes:
        raise ValueError(f"expected a strategy among {list(STRATEGIES)}, got {name!r}; correct the name")
    recipe, given = recipes[name], Options.parse(options)
    stages = recipe.stage_1(given), recipe.stage_2(given)
    return StagedStrategy(name, *stages, given, recipe.whole_pool, recipe.widest, recipe.needs)


__all__ = [
    "RIVALS", "STRATEGIES", "USES_LABELLED", "Options", "QueryStrategy", "Recipe", "get_strategy", "rival_names",
    "strategy_names",
]  # fmt: skip
