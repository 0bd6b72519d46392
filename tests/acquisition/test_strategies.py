"""What tells one strategy from another: each against its definition."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from ppal_backend.acquisition import coverage
from ppal_backend.acquisition.baselines.typiclust import TypicalitySelector
from ppal_backend.acquisition.budget import Budget
from ppal_backend.acquisition.ccms import LazySimilarity, matrix
from ppal_backend.acquisition.comparisons import ccms_distances
from ppal_backend.acquisition.distances import DenseDistances, SimilarityDistances
from ppal_backend.acquisition.strategies import Options, get_strategy, strategy_names
from ppal_backend.structures import QueryContext
from ppal_backend.structures.query import CandidatePool, by_utility
from tests.acquisition.pools import context as make_context
from tests.acquisition.pools import image
from tests.reference import ccms, clustering, difficulty, pipeline


def query(name, context, budget, seed=0, **options):
    return get_strategy(name, **options).query(context, budget, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("memory_gib", [None, 1e-6])
def test_ppal_equals_the_loops_from_end_to_end(seed, memory_gib):
    """As a matrix, and row by row where the matrix would not fit."""
    context = make_context(seed, images=50, classes=3)
    assert list(query("ppal", context, 6, memory_gib=memory_gib).image_ids) == pipeline.ppal(context, 6)


def test_matrix_or_rows_by_size():
    images = make_context(0).pool
    assert isinstance(ccms_distances(images), DenseDistances)
    assert isinstance(ccms_distances(images, memory_gib=1e-6), SimilarityDistances)


@pytest.mark.parametrize("measure", ["entropy", "posterior", "margin"])
def test_uncertainty_strategies_take_the_largest_sums(measure):
    context = make_context(1)
    wanted = {d.image_id: pipeline.utility(d, [1] * 5, measure) for d in context.pool}
    answer = query(measure, context, 6)
    assert list(answer.image_ids) == by_utility(wanted, wanted)[:6]
    assert answer.utilities == pytest.approx(wanted)


def test_dcus_weighs_by_difficulty_and_dfreq_by_frequency():
    context = make_context(2)
    w = [difficulty.coefficient(float(d), 0.3, 0.2) for d in context.difficulty]
    f = 1 - context.class_counts / context.class_counts.sum()
    assert query("dcus", context, 6).utilities == pytest.approx(
        {d.image_id: pipeline.utility(d, w) for d in context.pool}
    )
    assert query("dfreq", context, 6).utilities == pytest.approx(
        {d.image_id: pipeline.utility(d, f) for d in context.pool}
    )


def test_unknown_difficulty_counts_as_one():
    context = replace(make_context(2), difficulty=None)
    ones = replace(context, difficulty=np.ones(5))
    assert query("dcus", context, 6).utilities == query("dcus", ones, 6).utilities


def test_candidate_pool_is_delta_times_the_budget_and_ties_go_to_the_lowest_id():
    pool = [image(i, [0.5], [0]) for i in (9, 3, 7, 1, 5)]
    context = QueryContext(pool, 1)
    answer = query("dcus", context, 1, delta=3)
    assert answer.candidate_ids == (1, 3, 5) and answer.image_ids == (1,)
    assert len(query("ppal", make_context(0), 3, delta=2.5).candidate_ids) == 8


@pytest.mark.parametrize(
    ("name", "budget", "delta", "candidates"),
    [
        ("ppal+labelled", 2, 16.0, 10),  # a quarter of 40
        ("ppal+labelled", 3, 8.0, 12),  # four budgets, though that is more than a quarter
        ("ppal+labelled", 2, 3.0, 6),
        ("ppal", 2, 16.0, 32),
        ("ppal", 3, 16.0, 40),
    ],
)
def test_of_a_small_pool_only_a_quarter_are_candidates_of_ppal_labelled(name, budget, delta, candidates):
    pool = make_context(0, images=40)
    assert len(query(name, pool, budget, delta=delta).candidate_ids) == candidates


def test_random_depends_on_the_seed_only():
    context = make_context(3)
    assert query("random", context, 8, seed=1).image_ids != query("random", context, 8, seed=2).image_ids
    assert len({query("random", context, 1, seed=s).image_ids[0] for s in range(60)}) > 15


def test_dcus_rand_draws_from_the_candidates():
    context = make_context(3)
    picks = {i for s in range(40) for i in query("dcus+rand", context, 3, seed=s).image_ids}
    assert picks == set(query("dcus", context, 3).candidate_ids)


@pytest.mark.parametrize(("name", "feature"), [("dcus+global", "global"), ("dcus+fpn", "fpn")])
def test_feature_strategies_equal_the_loops(name, feature):
    context = make_context(4)
    w = [difficulty.coefficient(float(d), 0.3, 0.2) for d in context.difficulty]
    chosen = pipeline.candidates(context, 5, w)
    x = context.image_features[feature][chosen]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distances = 1 - x @ x.T
    np.fill_diagonal(distances, 0)
    wanted = [context.pool[chosen[k]].image_id for k in pipeline.diverse(distances, 5)]
    assert list(query(name, context, 5).image_ids) == wanted


def test_coreset_starts_from_the_labelled_images():
    context = make_context(5)
    x = np.concatenate([context.image_features["global"], context.labelled_features["global"]])
    d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    by_entropy = [context.pool_ids.index(i) for i in query("entropy", context, 30).image_ids]
    order = [*by_entropy, *range(30, 36)]
    picks = clustering.k_center_greedy(d[np.ix_(order, order)], 6, None, tuple(range(30, 36)))
    answer = query("coreset", context, 6)
    assert list(answer.image_ids) == [context.pool_ids[order[k]] for k in picks]
    first = answer.explanations[answer.image_ids[0]]
    assert first.nearest_chosen >= 100_000 and first.nearest_similarity is None and first.nearest_distance > 0


def test_cdal_equals_the_loops():
    context = replace(make_context(6), labelled=(), labelled_features={})

    def mixtures(d):
        made = {}
        for c in set(d.class_indices.tolist()):
            rows = [k for k in range(len(d)) if d.class_indices[k] == c and d.scores[k] >= np.float32(0.05)]
            p = [np.maximum(d.class_probs[k].astype(float), 1e-6) for k in rows]
            p = [v / v.sum() for v in p]
            w = [difficulty.entropy(v) for v in p]
            if rows:
                made[c] = sum(a * b for a, b in zip(w, p, strict=True)) / sum(w)
        return made

    mixed = [mixtures(d) for d in context.pool]
    n = len(mixed)
    d = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            for c in set(mixed[i]) & set(mixed[j]):
                p, q = mixed[i][c], mixed[j][c]
                d[i, j] += 0.5 * float((p * np.log(p / q)).sum() + (q * np.log(q / p)).sum())
    order = [context.pool_ids.index(i) for i in query("entropy", context, 30).image_ids]
    picks = clustering.k_center_greedy(d[np.ix_(order, order)], 6, 0)
    answer = query("cdal", context, 6)
    assert list(answer.image_ids) == [context.pool_ids[order[k]] for k in picks]
    last = answer.explanations[answer.image_ids[-1]]
    assert last.nearest_distance == pytest.approx(min(d[order[picks[-1]], order[k]] for k in picks[:-1]), abs=1e-4)


def test_enms_counts_redundant_boxes_once():
    same = image(1, [0.5, 0.4, 0.6], [0, 0, 0], [[1, 0], [1, 0.1], [0, 1]])
    context = QueryContext([same], 2)
    kept = difficulty.entropy([0.5, 0.5]) + difficulty.entropy([0.6, 0.4])
    assert query("enms+divproto", context, 1).utilities[1] == pytest.approx(kept, abs=1e-6)
    other_class = image(1, [0.5, 0.4, 0.6], [0, 1, 0], [[1, 0], [1, 0.1], [0, 1]])
    more = kept + difficulty.entropy([0.4, 0.6])
    assert query("enms+divproto", QueryContext([other_class], 2), 1).utilities[1] == pytest.approx(more, abs=1e-6)


def test_divproto_skips_known_prototypes_and_serves_minority_classes():
    pool = [
        image(1, [0.5], [0], [[1, 0]]),
        image(2, [0.51], [0], [[1, 0.1]]),
        image(3, [0.6], [0], [[0, 1]]),
        image(4, [0.9], [1], [[1, 0]]),
    ]
    assert query("enms+divproto", QueryContext(pool, 2), 2).image_ids == (1, 3)
    counts = np.array([100, 1])
    assert query("enms+divproto", QueryContext(pool, 2, class_counts=counts), 1).image_ids == (4,)


def test_pal_learns_from_labelled_images_when_scores_lie():
    """In the labelled set class 0 is right at any score, class 1 a coin flip: class 1 is the uncertain one."""
    rng = np.random.default_rng(0)
    labelled = []
    for k in range(60):
        labelled.append(
            image(
                1000 + k,
                rng.uniform(0.3, 0.7, 2),
                [0, 1],
                true_positive=np.array([bool(k % 6), bool(k % 2)]),
                pre_nms_counts=np.array([5, 5]),
            )
        )
    pool = [image(1, [0.5], [0], pre_nms_counts=np.array([5])), image(2, [0.5], [1], pre_nms_counts=np.array([5]))]
    context = QueryContext(pool, 2, labelled=labelled)
    answer = query("pal", context, 1)
    assert answer.utilities[2] == pytest.approx(np.log(2), abs=0.05)
    assert answer.utilities[1] < answer.utilities[2] - 0.1
    assert query("ppal+pal", context, 1).image_ids == (2,)


def test_pal_without_marked_detections_takes_scores_and_says_so(caplog):
    context = replace(make_context(7), labelled=())
    answer = query("pal", context, 4)
    d = context.pool[0]
    wanted = sum(difficulty.entropy([float(s), 1 - float(s)]) for s in d.scores if s >= np.float32(0.05))
    assert answer.utilities[d.image_id] == pytest.approx(wanted, abs=1e-6)
    assert "scores are taken as calibrated" in caplog.text


def test_balance_prefers_rare_predicted_classes():
    pool = [image(k, [0.5], [0]) for k in range(1, 6)] + [image(9, [0.5], [1])]
    answer = query("ppal+balance", QueryContext(pool, 2), 1, delta=1.5)
    assert answer.candidate_ids[0] == 9
    assert answer.utilities[9] == pytest.approx(answer.utilities[1] * (1 + (1 - 1 / 5)))


@pytest.mark.parametrize(("softmax", "measure"), [(True, "entropy"), (True, "margin"), (False, "entropy")])
@pytest.mark.parametrize(("price", "strength"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (0.3, 0.0), (0.3, 2.0)])
def test_auto_equals_the_loops(softmax, measure, price, strength):
    """Gain for its cost; the weights are Eq. 4 times what a class lacks, the parts of boxes add up to the utility."""
    context = make_context(7)
    if not softmax:
        context = replace(context, pool=[replace(d, class_probs=None, softmax=False) for d in context.pool])
    counts = context.class_counts
    lack = [math.sqrt((counts.mean() + 1) / (n + 1)) ** strength for n in counts]
    weights = [
        difficulty.coefficient(float(d), 0.3, 0.2) * part for d, part in zip(context.difficulty, lack, strict=True)
    ]
    answer = query("auto", context, 6, uncertainty=measure, price=price, strength=strength)
    assert answer.utilities == pytest.approx(
        {d.image_id: pipeline.gain(d, weights, price, measure) for d in context.pool}
    )
    images = {d.image_id: d for d in context.pool}
    for image_id, explained in answer.explanations.items():
        if len(set(images[image_id].class_indices.tolist())) <= 5:  # all of them are listed
            assert sum(c.contribution for c in explained.classes) == pytest.approx(explained.utility)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("memory_gib", "labelled"), [(None, 9), (1e-6, 9), (None, 0)])
@pytest.mark.parametrize("name", ["auto", "dcus+coverage"])
def test_what_covers_most_weight_beside_the_labelled_images_is_taken(name, seed, memory_gib, labelled):
    context = make_context(seed, images=50, classes=3, labelled=labelled)
    answer = query(name, context, 6, memory_gib=memory_gib)
    by_id = {d.image_id: d for d in context.pool}
    chosen = [by_id[i] for i in answer.candidate_ids]
    s = ccms.similarity([*chosen, *context.labelled])
    count = len(chosen)
    far = (2.0 - s[:count, count:]).min(1) if labelled else [2.0] * count
    weights = [answer.utilities[i] for i in answer.candidate_ids]
    distances = 2.0 - s[:count, :count]
    np.fill_diagonal(distances, 0.0)
    wanted = pipeline.coverage(distances, far, weights, 6)
    assert [answer.candidate_ids[k] for k in wanted] == list(answer.image_ids)
    nearest = {k: min((distances[k][x], x) for x in wanted) for k in range(count)}
    sizes = {i: answer.explanations[i].cluster_size for i in answer.image_ids}
    owned = [answer.candidate_ids[x] for k, (d, x) in nearest.items() if d < far[k] or k == x]
    assert sizes == {i: owned.count(i) for i in answer.image_ids}
    for place, image_id in enumerate(answer.image_ids):
        told = answer.explanations[image_id]
        if place or labelled:
            before = [distances[wanted[place]][x] for x in wanted[:place]] + ([far[wanted[place]]] if labelled else [])
            assert told.nearest_distance == pytest.approx(min(before), abs=1e-5)
            assert told.nearest_similarity == pytest.approx(2.0 - min(before), abs=1e-5)
        else:
            assert told.nearest_chosen is None


@pytest.mark.parametrize("seed", range(4))
def test_auto_picks_the_same_however_many_rows_it_reads_at_once(seed, monkeypatch):
    """Similarities that do not fit are computed for the rows asked for, which costs less the more they are."""
    context = make_context(seed, images=300, classes=3, labelled=0)
    read, rows = [], SimilarityDistances.rows
    monkeypatch.setattr(SimilarityDistances, "rows", lambda self, at: read.append(len(at)) or rows(self, at))
    blocks = query("auto", context, 20, memory_gib=1e-6)
    assert read[0] == len(blocks.candidate_ids) > 16, "the first look at all candidates is one read"
    assert 32 in read, "later reads grow"
    monkeypatch.setattr(coverage, "_FEWEST", 1)
    monkeypatch.setattr(coverage, "_MOST", 1)
    read.clear()
    one_by_one = query("auto", context, 20, memory_gib=1e-6)
    assert max(read) == 1
    assert blocks.image_ids == one_by_one.image_ids
    assert [e.cluster_size for e in blocks.explanations.values()] == [
        e.cluster_size for e in one_by_one.explanations.values()
    ]


def test_auto_leaves_near_duplicates_out_and_keeps_to_a_budget_of_boxes():
    rng = np.random.default_rng(0)
    twins = [image(k, [0.5], [0], np.ones((1, 8))) for k in range(5)]
    pool = [*twins, *(image(10 + k, [0.5], [0], rng.normal(size=(1, 8))) for k in range(5))]
    picks = query("auto", QueryContext(pool, 1), 6, min_distance=0.01).image_ids
    assert sum(i < 5 for i in picks) == 1 and len(picks) == 6
    crowded = [image(k, [0.5] * n, [0] * n, rng.normal(size=(n, 8))) for k, n in enumerate((9, 2, 3, 1, 4, 2))]
    spent = query("auto", QueryContext(crowded, 1), 6, unit="boxes").image_ids
    assert spent and sum((9, 2, 3, 1, 4, 2)[i] for i in spent) <= 6 and 0 not in spent


def test_parts_of_auto_stand_in_for_those_of_ppal():
    """Stage 1 of the one goes with stage 2 of the other."""
    context = make_context(3, images=60, classes=3, labelled=9)
    auto, ppal = query("auto", context, 6), query("ppal+labelled", context, 6)
    gain, gain_ccms, dcus_coverage = (query(name, context, 6) for name in ("gain", "gain+ccms", "dcus+coverage"))
    assert gain.utilities == gain_ccms.utilities == auto.utilities
    assert gain.image_ids == tuple(by_utility(auto.utilities, auto.utilities)[:6])
    candidates, rng = CandidatePool(auto.candidate_ids, auto.utilities), np.random.default_rng(0)
    assert gain_ccms.image_ids == get_strategy("ppal+labelled").query(context, 6, rng, candidates).image_ids
    assert dcus_coverage.utilities == ppal.utilities and dcus_coverage.candidate_ids == ppal.candidate_ids
    assert len({auto.image_ids, ppal.image_ids, gain.image_ids, gain_ccms.image_ids, dcus_coverage.image_ids}) == 5


def test_of_auto_a_crowd_does_not_beat_two_doubtful_boxes_of_a_rare_class():
    crowd, rare, sure = image(1, [0.6] * 40, [0] * 40), image(2, [0.5, 0.5], [1, 1]), image(3, [0.99] * 3, [1] * 3)
    context = QueryContext([crowd, rare, sure], 2, class_counts=np.array([400, 20]))
    assert query("ppal", context, 1, delta=1.5).candidate_ids[0] == 1
    assert query("auto", context, 1, delta=1.5).candidate_ids[0] == 2
    unknown = replace(context, class_counts=None)
    assert query("auto", unknown, 1, price=0).candidate_ids[0] == 1, "paid by the image, and no class lacks boxes"


def test_labelled_images_keep_their_likes_away():
    known = image(100, [0.9], [0], [[1, 0]])
    pool = [image(1, [0.5], [0], [[1, 0]]), image(2, [0.6], [0], [[1, 0.05]]), image(3, [0.7], [0], [[0, 1]])]
    context = QueryContext(pool, 1, labelled=[known])
    assert query("ppal", context, 2).image_ids == (1, 3)
    ids = query("ppal+labelled", context, 1, delta=3, first="farthest").image_ids
    assert ids == (3,)


def test_typiclust_takes_one_typical_image_of_each_cluster_without_labels():
    rng = np.random.default_rng(0)
    centres = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1.0]])
    features = np.concatenate([c + rng.normal(0, 0.02, (20, 3)) for c in centres])
    pool = [image(k, [], []) for k in range(60)]
    known = centres[:1] + 0.001
    context = QueryContext(pool, 1, image_features={"global": features}, labelled_features={"global": known})
    answer = query("typiclust", context, 2, seed=1)
    assert {i // 20 for i in answer.image_ids} == {1, 2}
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for i in answer.image_ids:
        group = unit[20 * (i // 20) : 20 * (i // 20) + 20]
        spread = np.linalg.norm(group - unit[i], axis=1).mean()
        assert spread < np.median([np.linalg.norm(group - g, axis=1).mean() for g in group])


def test_typiclust_takes_turns_when_the_budget_exceeds_the_clusters():
    rng = np.random.default_rng(0)
    features = np.repeat([[1.0, 0.0], [0.0, 1.0]], [30, 20], axis=0) + rng.normal(0, 0.02, (50, 2))
    context = QueryContext([image(k, [], []) for k in range(50)], 1, image_features={"global": features})
    chosen = TypicalitySelector(max_clusters=2).select(context, range(50), Budget(4, [1] * 50), rng)
    assert [k // 30 for k in chosen.positions] == [0, 1, 0, 1]
    assert chosen.cluster_sizes[chosen.positions[0]] == 30


def test_near_duplicates_are_skipped():
    pool = [image(k, [0.5], [0], [[1, 0.001 * k]]) for k in range(1, 9)] + [image(20, [0.9], [0], [[0, 1]])]
    context = QueryContext(pool, 1)
    assert len(query("ppal", context, 4).image_ids) == 4
    assert len(query("ppal", context, 4, min_distance=0.5).image_ids) == 2
    spread = make_context(8, images=60)
    answer = query("ppal", spread, 8, min_distance=0.3)
    s = ccms.similarity([d for d in spread.pool if d.image_id in answer.image_ids])
    assert len(answer.image_ids) == 8 and (2 - s + 9 * np.eye(8)).min() >= 0.3 - 1e-5


def test_explanation_names_cluster_neighbour_classes_and_boxes():
    context = make_context(9, images=40)
    answer = query("ppal", context, 6)
    s = ccms.similarity(context.pool)
    place = {i: k for k, i in enumerate(context.pool_ids)}
    assert sum(answer.explanations[i].cluster_size for i in answer.image_ids) == len(answer.candidate_ids)
    for rank, i in enumerate(answer.image_ids):
        why = answer.explanations[i]
        if rank == 0:
            assert why.nearest_chosen is None
        else:
            earlier = {j: s[place[i], place[j]] for j in answer.image_ids[:rank]}
            assert why.nearest_similarity == pytest.approx(max(earlier.values()), abs=1e-5)
            assert earlier[why.nearest_chosen] == pytest.approx(max(earlier.values()), abs=1e-5)
        d = context.pool[place[i]]
        assert why.boxes[0].contribution == max(b.contribution for b in why.boxes)
        assert why.boxes[0].score == pytest.approx(float(d.scores[why.boxes[0].box_index]))
        assert sum(c.contribution for c in why.classes) == pytest.approx(why.utility)


def test_every_prefix_of_the_order_is_diverse():
    """Farthest first from the most uncertain pick: no later pick is farther from the prefix than the next one."""
    context = make_context(10, images=60)
    answer = query("ppal", context, 8)
    s = ccms.similarity([context.pool[context.pool_ids.index(i)] for i in answer.image_ids])
    assert answer.utilities[answer.image_ids[0]] == max(answer.utilities[i] for i in answer.image_ids)
    for k in range(1, 8):
        gaps = (2 - s)[k:, :k].min(1)
        assert gaps[0] >= gaps.max() - 1e-6


def test_reference_preset_filters_boxes():
    small = image(1, [0.5], [0], boxes=[[0, 0, 10, 10]])
    large = image(2, [0.4], [0])
    context = QueryContext([small, large], 1)
    assert query("entropy", context, 1).image_ids == (1,)
    assert query("entropy", context, 1, preset="reference").image_ids == (2,)


def test_reference_preset_filters_boxes_in_ccms_too():
    """By large boxes alone images 1 and 3 are alike; with their small ones they are not."""
    large, small, other = [1, 0, 0], [0, 1, 0], [0, 0, 1]
    box, speck = [0, 0, 60, 60], [0, 0, 8, 8]
    pool = [
        image(1, [0.5, 0.9], [0, 1], [large, small], [box, speck]),
        image(2, [0.5], [0], [other], [box]),
        image(3, [0.5, 0.9], [0, 1], [large, other], [box, speck]),
    ]
    answer = query("ppal", QueryContext(pool, 2), 3, preset="reference")
    last = answer.explanations[answer.image_ids[-1]]
    assert answer.image_ids == (1, 2, 3)
    assert (last.nearest_chosen, last.nearest_similarity) == (1, pytest.approx(2.0, abs=1e-6))
    plain = query("ppal", QueryContext(pool, 2), 3)
    assert max(e.nearest_similarity or 0 for e in plain.explanations.values()) < 1.9


def test_reference_preset_gives_way_to_options_of_its_own():
    tiny = image(1, [0.9] * 150, [0] * 150, boxes=[[0, 0, 9, 9]] * 150)

    def counted(**options):
        return len(get_strategy("entropy", **options).options.boxes.valid_rows(tiny))

    assert counted() == 100
    assert counted(preset="reference") == 0
    assert counted(preset="reference", min_size_px=0) == 150
    assert counted(preset="reference", min_size_px=0, max_detections=7) == 7


CCMS = [
    "rand+ccms", "entropy+ccms", "dfreq+ccms", "ppal", "ppal+labelled", "ppal+balance", "ppal+pal", "pal", "auto",
    "gain+ccms", "dcus+coverage",
]  # fmt: skip


@pytest.mark.parametrize("name", CCMS)
def test_every_option_of_ccms_reaches_it(name):
    asked = []

    def similarity(images, *given, **named):
        asked.append((given, named))
        return LazySimilarity(images, *given, **named)

    context = make_context(1, images=40)
    options = {"score_threshold": 0.2, "device": "cpu", "memory_gib": 1e-6, "metric": "kl", "max_detections": 4}
    query(name, context, 4, similarity=similarity, **options)
    assert asked == [((0.2, "cpu", 1e-6), {"metric": "kl", "max_detections": 4})]


READ_BY_ALL = {"preset", "score_threshold", "max_detections", "min_size_px", "max_aspect", "unit"}
UNCERTAINTY = {"uncertainty", "aggregate"}
OF_CCMS = {"metric", "memory_gib", "device", "similarity"}
DIVERSE = {"refine", "max_iterations", "first", "min_distance"}
EQ_4 = {"alpha", "beta"}
GAIN = {"uncertainty", "price", "strength"}
READS = {
    "random": {"delta"},
    "entropy": {"delta", "aggregate"},
    "posterior": {"delta", "aggregate"},
    "margin": {"delta", "aggregate"},
    "dcus": {"delta"} | UNCERTAINTY | EQ_4,
    "dfreq": {"delta"} | UNCERTAINTY,
    "rand+ccms": {"delta"} | OF_CCMS | DIVERSE,
    "entropy+ccms": {"delta", "aggregate"} | OF_CCMS | DIVERSE,
    "dfreq+ccms": {"delta"} | UNCERTAINTY | OF_CCMS | DIVERSE,
    "dcus+rand": {"delta"} | UNCERTAINTY | EQ_4,
    "dcus+global": {"delta"} | UNCERTAINTY | EQ_4 | DIVERSE,
    "dcus+fpn": {"delta"} | UNCERTAINTY | EQ_4 | DIVERSE,
    "dcus+jaccard": {"delta"} | UNCERTAINTY | EQ_4 | DIVERSE,
    "ppal": {"delta"} | UNCERTAINTY | EQ_4 | OF_CCMS | DIVERSE,
    "coreset": {"aggregate", "min_distance"},
    "cdal": {"aggregate", "min_distance"},
    "enms+divproto": set(),
    "pal": {"delta"} | OF_CCMS,
    "ppal+labelled": {"delta"} | UNCERTAINTY | EQ_4 | OF_CCMS | DIVERSE,
    "auto": {"delta", "min_distance"} | GAIN | EQ_4 | OF_CCMS,
    "gain": {"delta"} | GAIN | EQ_4,
    "gain+ccms": {"delta"} | GAIN | EQ_4 | OF_CCMS | DIVERSE,
    "dcus+coverage": {"delta", "min_distance"} | UNCERTAINTY | EQ_4 | OF_CCMS,
    "ppal+balance": {"delta", "strength"} | UNCERTAINTY | EQ_4 | OF_CCMS | DIVERSE,
    "ppal+pal": {"delta"} | EQ_4 | OF_CCMS | DIVERSE,
    "typiclust": set(),
}


def test_every_option_is_read_by_the_strategies_it_concerns(monkeypatch):
    """And none is accepted that no strategy reads."""
    names, read = {f.name for f in fields(Options)}, set()

    def watched(self, name):
        if name in names:
            read.add(name)
        return object.__getattribute__(self, name)

    got = {}
    for name in strategy_names():
        made = Options()
        monkeypatch.setattr(Options, "__getattribute__", watched, raising=False)
        read.clear()
        monkeypatch.setattr(Options, "parse", classmethod(lambda cls, values, made=made: made))
        get_strategy(name).query(make_context(1), 4, np.random.default_rng(0))
        monkeypatch.undo()
        got[name] = read - READ_BY_ALL
        assert "unit" in read
        got[name] = set(got[name])
    assert got == READS
    assert set().union(READ_BY_ALL, *READS.values()) == names


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("memory_gib", [None, 1e-6])
def test_ppal_labelled_equals_the_loops_from_end_to_end(seed, memory_gib):
    """Labelled images are first centres that stay; some are copies of images of the pool."""
    context = make_context(seed, images=50, classes=3, labelled=9)
    copies = [replace(d, image_id=200_000 + d.image_id) for d in context.pool[:2]]
    context = replace(context, labelled=[*context.labelled, *copies], labelled_features={})
    wanted = pipeline.ppal_labelled(context, 6)
    assert list(query("ppal+labelled", context, 6, memory_gib=memory_gib).image_ids) == wanted


def test_ppal_labelled_compares_candidates_alone_with_labelled_images(monkeypatch):
    """K x (K + L) object similarities, one object an image here, and few labelled images at a time."""
    rng, products = np.random.default_rng(0), []

    def one(image_id):
        return image(image_id, [0.9], [0], rng.normal(size=(1, 8)))

    multiply = matrix.multiply

    def counted(left, right, metric, space):
        products.append((len(left), len(right)))
        return multiply(left, right, metric, space)

    monkeypatch.setattr(matrix, "multiply", counted)
    context = QueryContext([one(k) for k in range(40)], 1, labelled=[one(10_000 + k) for k in range(4_000)])
    answer = query("ppal+labelled", context, 10)
    assert len(answer.candidate_ids) == 40
    assert 40 * 4_000 <= sum(a * b for a, b in products) <= 1.1 * 40 * 4_040
    assert max(max(sizes) for sizes in products) <= 1024


def test_fasterpam_option():
    answer = query("ppal", make_context(11, images=50), 6, refine="fasterpam")
    assert len(set(answer.image_ids)) == 6
    with pytest.raises(ValueError, match="refine to be one of"):
        get_strategy("ppal", refine="lloyd")


@pytest.mark.parametrize("name", ["entropy", "ppal", "auto", "gain"])
def test_crowds_that_cost_more_than_the_budget_leave_room_for_what_fits(name):
    crowds = [image(k, [0.5] * 9, [0] * 9) for k in range(1, 9)]
    pool = [*crowds, *(image(k, [0.6], [0]) for k in range(9, 30))]
    answer = query(name, QueryContext(pool, 1), 5, unit="boxes")
    assert len(answer.image_ids) == 5 and min(answer.image_ids) > 8


def test_no_affordable_image_gives_an_empty_query():
    pool = [image(k, [0.5] * 6, [0] * 6) for k in (1, 2)]
    assert query("ppal", QueryContext(pool, 1), 5, unit="boxes").image_ids == ()
