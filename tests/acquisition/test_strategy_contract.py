"""What every strategy promises, run over every name."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest

from ppal_backend.acquisition.strategies import READS_COUNTS, USES_LABELLED, get_strategy, rival_names, strategy_names
from ppal_backend.structures import CandidatePool, Detections, QueryContext
from ppal_backend.structures.round import RIVAL_NAMES, STRATEGY_NAMES
from tests.acquisition.pools import context as make_context

NAMES = [
    "random",
    "entropy",
    "posterior",
    "margin",
    "dcus",
    "dfreq",
    "rand+ccms",
    "entropy+ccms",
    "dfreq+ccms",
    "dcus+rand",
    "dcus+global",
    "dcus+fpn",
    "dcus+jaccard",
    "ppal",
    "coreset",
    "cdal",
    "enms+divproto",
    "pal",
    "ppal+labelled",
    "auto",
    "gain",
    "gain+ccms",
    "dcus+coverage",
    "ppal+balance",
    "ppal+pal",
    "typiclust",
]
RIVALS = ["learnloss", "mdn", "mial"]


def test_every_strategy_is_there():
    assert sorted(strategy_names()) == sorted(NAMES)
    assert strategy_names() == STRATEGY_NAMES, "what processes without torch take for the names"
    assert list(rival_names()) == RIVALS and rival_names() == RIVAL_NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_the_detector_is_asked_for_is_what_the_strategy_reads(name):
    context = make_context(images=60)
    pool, labelled = ([replace(d, pre_nms_counts=None) for d in images] for images in (context.pool, context.labelled))

    def answer(seen):
        query = get_strategy(name).query(seen, 6, np.random.default_rng(0))
        return query.image_ids, query.utilities, {i: e.as_dict() for i, e in query.explanations.items()}

    unlabelled = replace(context, labelled=(), labelled_features={})
    assert (answer(unlabelled) != answer(context)) == (name in USES_LABELLED)
    assert (answer(replace(context, pool=pool, labelled=labelled)) != answer(context)) == (name in READS_COUNTS)


def without_detections(context):
    empty = [Detections.empty(d.image_id) for d in context.pool]
    return replace(context, pool=empty)


def identical(context):
    first = context.pool[0]
    same = [
        Detections(
            image_id=d.image_id,
            boxes_xyxy=first.boxes_xyxy,
            scores=first.scores,
            class_indices=first.class_indices,
            embeddings=first.embeddings,
            class_probs=first.class_probs,
            softmax=True,
        )
        for d in context.pool
    ]
    features = {name: np.ones_like(value) for name, value in context.image_features.items()}
    return replace(context, pool=same, image_features=features, labelled_features={})


class StrategyContract:
    """Inherited by the test class of each strategy; ``name`` says which."""

    name: str

    def query(self, context, budget, seed=0, candidates=None, **options):
        return get_strategy(self.name, **options).query(context, budget, np.random.default_rng(seed), candidates)

    def test_name(self):
        assert get_strategy(self.name).name == self.name

    @pytest.mark.parametrize("budget", [1, 4, 11])
    def test_right_length_unique_and_inside_the_pool(self, budget):
        context = make_context(budget)
        answer = self.query(context, budget)
        assert len(answer.image_ids) == budget
        assert len(set(answer.image_ids)) == budget
        assert set(answer.image_ids) <= set(answer.candidate_ids) <= set(context.pool_ids)
        assert set(answer.utilities) == set(context.pool_ids)

    def test_same_seed_same_answer(self):
        first, again = self.query(make_context(1), 6, seed=3), self.query(make_context(1), 6, seed=3)
        assert first.image_ids == again.image_ids
        assert first.utilities == again.utilities
        assert first.explanations == again.explanations

    def test_global_random_state_plays_no_part(self):
        np.random.seed(0)
        first = self.query(make_context(1), 6)
        state = np.random.get_state()[1].copy()
        np.random.seed(99)
        assert self.query(make_context(1), 6).image_ids == first.image_ids
        np.random.seed(0)
        self.query(make_context(1), 6)
        np.testing.assert_array_equal(np.random.get_state()[1], state)

    def test_inputs_unchanged(self):
        context = make_context(2)
        before = copy.deepcopy(context)
        self.query(context, 5)
        for mine, old in zip([*context.pool, *context.labelled], [*before.pool, *before.labelled], strict=True):
            for field in ("boxes_xyxy", "scores", "class_indices", "embeddings", "class_probs"):
                np.testing.assert_array_equal(getattr(mine, field), getattr(old, field))
        np.testing.assert_array_equal(context.difficulty, before.difficulty)
        for name in context.image_features:
            np.testing.assert_array_equal(context.image_features[name], before.image_features[name])

    @pytest.mark.parametrize("budget", [30, 31, 1000])
    def test_budget_of_the_pool_or_more_takes_everything(self, budget):
        context = make_context(3)
        assert sorted(self.query(context, budget).image_ids) == sorted(context.pool_ids)

    def test_empty_pool_gives_an_empty_query(self):
        full = make_context(4)
        features = {name: value[:0] for name, value in full.image_features.items()}
        answer = self.query(replace(full, pool=[], image_features=features), 5)
        assert answer.image_ids == () and answer.queue([]) == ()

    @pytest.mark.parametrize("budget", [0, -1, 1.5])
    def test_budget_below_one_is_refused(self, budget):
        with pytest.raises(ValueError, match="expected budget to be an int >= 1"):
            self.query(make_context(5), budget)

    def test_all_images_identical(self):
        answer = self.query(identical(make_context(6)), 7)
        assert len(set(answer.image_ids)) == 7

    def test_all_images_without_detections(self):
        context = without_detections(make_context(7))
        answer = self.query(context, 7)
        assert len(set(answer.image_ids)) == 7

    def test_one_image(self):
        context = make_context(8, images=1)
        assert self.query(context, 1).image_ids == context.pool_ids

    def test_order_of_the_pool_does_not_matter(self):
        context = make_context(9)
        order = np.random.default_rng(0).permutation(len(context.pool))
        features = {name: value[order] for name, value in context.image_features.items()}
        moved = replace(context, pool=[context.pool[k] for k in order], image_features=features)
        if "rand" not in self.name and self.name != "typiclust":
            assert self.query(moved, 6).image_ids == self.query(context, 6).image_ids

    def test_every_pick_is_explained(self):
        answer = self.query(make_context(10), 6)
        assert tuple(answer.explanations) == answer.image_ids
        for rank, image_id in enumerate(answer.image_ids):
            why = answer.explanations[image_id]
            assert (why.image_id, why.rank) == (image_id, rank)
            assert why.utility == answer.utilities[image_id]
            higher = sum(u > why.utility for u in answer.utilities.values())
            assert higher <= why.utility_rank < len(answer.utilities)
        json.dumps([why.as_dict() for why in answer.explanations.values()])

    def test_stage_2_goes_on_from_given_candidates(self):
        context = make_context(11)
        strategy = get_strategy(self.name)
        stage_1 = strategy.candidates(context, 5, np.random.default_rng(0))
        again = CandidatePool(stage_1.image_ids, dict(stage_1.utilities))
        first = strategy.query(context, 5, np.random.default_rng(1), again)
        assert set(first.image_ids) <= set(stage_1.image_ids)
        assert first.image_ids == strategy.query(context, 5, np.random.default_rng(1), stage_1).image_ids
        foreign = CandidatePool((999_999,), {999_999: 1.0})
        with pytest.raises(ValueError, match="every candidate in the pool"):
            strategy.query(context, 5, np.random.default_rng(1), foreign)

    def test_queue_holds_the_pool_once_query_set_first(self):
        context = make_context(12)
        answer = self.query(context, 5)
        queue = answer.queue(context.pool_ids)
        assert queue[:5] == answer.image_ids
        assert sorted(queue) == sorted(context.pool_ids)

    def test_budget_in_boxes(self):
        context = make_context(13)
        boxes = {d.image_id: int((d.scores >= np.float32(0.05)).sum()) for d in context.pool}
        answer = self.query(context, 17, unit="boxes")
        spent = sum(boxes[i] for i in answer.image_ids)
        assert 0 < spent <= 17
        cheapest = min(max(1, boxes[i]) for i in answer.candidate_ids if i not in answer.image_ids)
        assert sum(max(1, boxes[i]) for i in answer.image_ids) + cheapest > 17, "something affordable was left out"

    def test_tensors(self):
        context = make_context(14)
        moved = replace(
            context, pool=[d.to("cpu") for d in context.pool], labelled=[d.to("cpu") for d in context.labelled]
        )
        assert self.query(moved, 5).image_ids == self.query(context, 5).image_ids

    def test_unknown_option_is_refused(self):
        with pytest.raises(ValueError, match="got \\['budget_ratio'\\]"):
            get_strategy(self.name, budget_ratio=3)


for _name in [*NAMES, *RIVALS]:
    _class = f"Test_{_name.replace('+', '_with_')}"
    globals()[_class] = type(_class, (StrategyContract,), {"name": _name})


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"expected a strategy among .* got 'pppal'"):
        get_strategy("pppal")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("delta", 1.0),
        ("delta", float("nan")),
        ("alpha", 0),
        ("uncertainty", "surprise"),
        ("aggregate", "median"),
        ("unit", "minutes"),
        ("score_threshold", 2),
        ("max_detections", 0),
        ("preset", "fast"),
        ("first", "last"),
        ("strength", -1),
        ("delta", "4"),
        ("delta", float("inf")),
        ("beta", float("inf")),
        ("metric", "euclid"),
        ("refine", "lloyd"),
        ("max_iterations", -1),
        ("max_iterations", 2.5),
        ("max_detections", 2.5),
        ("min_distance", -1),
        ("min_distance", True),
        ("memory_gib", 0),
        ("device", "tpu-3"),
        ("similarity", 3),
        ("score_threshold", "low"),
    ],
)
def test_option_out_of_range_is_refused(option, value):
    with pytest.raises(ValueError, match=option):
        get_strategy("ppal", **{option: value})


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("dfreq", {"class_counts": None}, r"class_counts with shape \(5,\)"),
        ("dcus+global", {"image_features": {}}, r"image_features\['global'\] with shape \(30, d\)"),
        ("dcus+fpn", {"image_features": {}}, r"image_features\['fpn'\]"),
        ("coreset", {"image_features": {}}, r"image_features\['global'\]"),
        ("typiclust", {"image_features": {}}, r"image_features\['global'\]"),
        ("learnloss", {"image_features": {}}, r"image_features\['learnloss'\] with shape \(30, 1\), got None"),
        ("learnloss", {"image_features": {"learnloss": np.ones((30, 2))}}, r"got \(30, 2\); look at the pool with"),
        ("mial", {"image_features": {}}, r"image_features\['mial'\] with shape \(30, 1\), got None"),
        ("mdn", {"image_features": {}}, r"image_features\['mdn'\] with shape \(30, 13\), got None; look at the pool"),
    ],
)
def test_what_a_strategy_needs_is_asked_for(name, missing, message):
    with pytest.raises(ValueError, match=message):
        get_strategy(name).query(replace(make_context(0), **missing), 5, np.random.default_rng(0))


def test_cdal_asks_for_probabilities():
    context = make_context(0)
    bare = [Detections(d.image_id, d.boxes_xyxy, d.scores, d.class_indices, d.embeddings) for d in context.pool]
    with pytest.raises(ValueError, match=r"class_probs with shape \(\d+, k\)"):
        get_strategy("cdal").query(QueryContext(bare, 5), 5, np.random.default_rng(0))
