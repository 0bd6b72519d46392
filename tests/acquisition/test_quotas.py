"""Query sets under quotas, against every set of the same size."""

from itertools import combinations

import numpy as np
import pytest

from ppal_backend.acquisition.quotas import exchange, hold_quotas
from ppal_backend.acquisition.strategies import get_strategy, strategy_names
from tests.acquisition.pools import context as make_context


def brute_force(chosen, values, groups, needed):
    """The best (missing, kept, value) of any set of that size."""
    best = None
    for ids in combinations(sorted(values), len(chosen)):
        lacking = sum(max(0, n - len(set(ids) & set(g))) for g, n in zip(groups, needed, strict=True))
        found = (-lacking, len(set(ids) & set(chosen)), sum(values[i] for i in ids))
        if best is None or found > best:
            best = found
    return best


@pytest.mark.parametrize("seed", range(40))
def test_of_all_sets_it_takes_one_that_misses_least_then_keeps_most_then_is_worth_most(seed):
    rng = np.random.default_rng(seed)
    ids = [int(i) for i in rng.permutation(50)[:11]]
    values = {i: round(float(v), 3) for i, v in zip(ids, rng.random(11), strict=True)}
    chosen = [int(i) for i in rng.permutation(ids)[: int(rng.integers(1, 6))]]
    groups = [{i for i in ids if rng.random() < 0.35} for _ in range(int(rng.integers(1, 4)))]
    needed = [int(rng.integers(0, len(chosen) + 2)) for _ in groups]
    taken = exchange(chosen, values, groups, needed)
    assert len(taken) == len(set(taken)) == len(chosen) and set(taken) <= set(ids)
    lacking = sum(max(0, n - len(set(taken) & g)) for g, n in zip(groups, needed, strict=True))
    missing, kept, value = brute_force(chosen, values, groups, needed)
    assert (-lacking, len(set(taken) & set(chosen))) == (missing, kept)
    assert sum(values[i] for i in taken) == pytest.approx(value, abs=1e-6)


def test_two_quotas_that_only_one_image_holds_together_are_held():
    values = {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.1}
    assert exchange([1], values, [{2, 4}, {3, 4}], [1, 1]) == [4], "a greedy choice takes 2 and then misses the second"


@pytest.mark.parametrize("name", strategy_names())
def test_quotas_hold_with_every_strategy_and_each_pick_is_explained(name):
    context, strategy = make_context(seed=3, images=40), get_strategy(name)
    query = strategy.query(context, 8, np.random.default_rng(1))
    outside = [i for i in context.pool_ids if i not in query.image_ids]
    groups = [set(outside[:10]), set(outside[6:14]) | {query.image_ids[0]}]
    held = hold_quotas(strategy, context, query, groups, [3, 2], np.random.default_rng(1))
    ids = held.query.image_ids
    assert len(ids) == len(set(ids)) == 8
    assert held.reached == tuple(len(set(ids) & g) for g in groups) and held.reached[0] >= 3 and held.reached[1] >= 2
    assert set(held.entered) == set(ids) - set(query.image_ids) and set(held.left) == set(query.image_ids) - set(ids)
    assert len(held.entered) == len(held.left) == 3, "three images of the first group can hold the second as well"
    assert set(held.query.explanations) == set(ids)
    assert [held.query.explanations[i].rank for i in ids] == list(range(8))


def test_quotas_that_hold_already_change_nothing():
    context, strategy = make_context(seed=4), get_strategy("ppal")
    query = strategy.query(context, 6, np.random.default_rng(1))
    held = hold_quotas(strategy, context, query, [set(query.image_ids[:2])], [2], np.random.default_rng(1))
    assert held.query is query and (held.entered, held.left, held.reached) == ((), (), (2,))


def test_a_quota_that_cannot_hold_is_reached_as_far_as_the_pool_allows():
    context, strategy = make_context(seed=5), get_strategy("ppal")
    query = strategy.query(context, 6, np.random.default_rng(1))
    rare = {i for i in context.pool_ids if i not in query.image_ids}
    rare = set(sorted(rare)[:2])
    held = hold_quotas(strategy, context, query, [rare, set()], [5, 1], np.random.default_rng(1))
    assert rare <= set(held.query.image_ids) and held.reached == (2, 0)
    sums = [sum(query.utilities[i] for i in ids) for ids in (held.query.image_ids, query.image_ids)]
    assert len(held.left) == 2 and held.utility_share == pytest.approx(sums[0] / sums[1])


def test_a_set_that_its_strategy_chose_by_utility_alone_loses_the_images_of_least_utility():
    context, strategy = make_context(seed=6), get_strategy("entropy")
    query = strategy.query(context, 6, np.random.default_rng(1))
    others = [i for i in context.pool_ids if i not in query.image_ids]
    held = hold_quotas(strategy, context, query, [set(others)], [2], np.random.default_rng(1))
    assert held.left == query.image_ids[4:]
    best = sorted(others, key=lambda i: (-query.utilities[i], i))[:2]
    assert set(held.entered) == set(best)
    total = sum(query.utilities[i] for i in query.image_ids)
    assert held.utility_share == pytest.approx(sum(query.utilities[i] for i in held.query.image_ids) / total)
