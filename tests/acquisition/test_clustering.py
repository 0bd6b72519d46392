"""k-Center-Greedy and k-medoids against loops and exhaustive search."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppal_backend.acquisition import clustering
from ppal_backend.acquisition.clustering import (
    cluster_medoids,
    farthest_first,
    fasterpam,
    k_center_greedy,
    k_medoids,
    refine_centers,
)
from ppal_backend.acquisition.distances import (
    Anchors,
    CosineDistances,
    DenseDistances,
    JaccardDistances,
    SubsetDistances,
    nearest_anchors,
)
from tests.reference import clustering as reference


class Lazy:
    """Distances that are computed when asked for."""

    def __init__(self, matrix):
        self.matrix, self.device = torch.as_tensor(matrix), torch.device("cpu")
        self.asked = 0

    def __len__(self):
        return len(self.matrix)

    def rows(self, indices):
        self.asked += 1
        return self.matrix[torch.as_tensor(indices).long()].clone()

    def block(self, rows, columns):
        return self.matrix[torch.as_tensor(rows).long()][:, torch.as_tensor(columns).long()]


def distances(seed, n, grid):
    """Euclidean distances in the plane; on a grid there are duplicates and ties."""
    points = np.random.default_rng(seed).normal(size=(n, 2))
    points = np.round(points) if grid else points
    return np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))


ANCHORS = Anchors(torch.ones(5), torch.full((5,), 7))
problems = st.tuples(st.integers(0, 10_000), st.integers(1, 25), st.booleans())


@settings(max_examples=60, deadline=None)
@given(problems, st.data())
@pytest.mark.parametrize("form", [DenseDistances, Lazy])
def test_greedy_equals_the_loops(form, problem, data):
    d = distances(*problem)
    fixed = data.draw(st.sets(st.integers(0, len(d) - 1), max_size=len(d) - 1))
    free = [i for i in range(len(d)) if i not in fixed]
    first = data.draw(st.none() | st.sampled_from(free))
    k = data.draw(st.integers(0, len(d) + 2))
    fixed = tuple(sorted(fixed))
    assert k_center_greedy(form(d), k, first, fixed) == reference.k_center_greedy(d, k, first, fixed)


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(0, 10_000), st.integers(1, 10), st.booleans()), st.data())
def test_greedy_is_a_2_approximation(problem, data):
    d = distances(*problem)
    k = data.draw(st.integers(1, len(d)))
    assert reference.radius(d, k_center_greedy(d, k)) <= 2 * reference.best_radius(d, k) + 1e-9


@settings(max_examples=60, deadline=None)
@given(problems, st.data())
@pytest.mark.parametrize("form", [DenseDistances, Lazy])
def test_medoids_equal_the_loops_and_cost_never_rises(form, problem, data):
    d = distances(*problem)
    k = data.draw(st.integers(1, len(d)))
    start = np.random.default_rng(problem[0]).permutation(len(d))[:k].tolist()
    got = cluster_medoids(form(d), start)
    centers, costs = reference.k_medoids(d, start)
    assert got.centers == centers
    np.testing.assert_allclose(got.costs, costs, rtol=1e-9)
    assert all(b <= a + 1e-9 for a, b in zip(got.costs, got.costs[1:], strict=False))
    assert len(set(got.centers)) == k
    assert sum(got.sizes) == len(d)
    assert got.sizes == [reference.assign(d, centers).count(j) for j in range(k)]


@pytest.mark.parametrize("batch", [1, 3, 400])
def test_medoids_do_not_depend_on_batches(batch, monkeypatch):
    d = distances(7, 60, False)
    wanted = k_medoids(d, [0, 1, 2, 3, 4])
    monkeypatch.setattr(clustering, "_MEMBER_BATCH", batch)
    monkeypatch.setattr(clustering, "_ROW_BATCH", batch)
    assert k_medoids(d, [0, 1, 2, 3, 4]) == wanted
    assert k_medoids(Lazy(d), [0, 1, 2, 3, 4]) == wanted


@pytest.mark.parametrize("grid", [False, True])
def test_partial_reassignment_equals_a_full_one(grid):
    """Few of many centres move, so that only their items are searched anew."""
    for seed in range(20):
        d = distances(seed, 120, grid)
        start = np.random.default_rng(seed).permutation(120)[:40].tolist()
        assert k_medoids(d, start) == reference.k_medoids(d, start)[0]


def test_duplicates_empty_a_cluster_that_keeps_its_centre():
    d = np.zeros((5, 5))
    got = cluster_medoids(d, [3, 1])
    assert got.centers == [3, 1] and got.sizes == [5, 0]


def test_fixed_centres_attract_and_stay():
    d = np.abs(np.subtract.outer([0.0, 1, 2, 10, 11, 12], [0.0, 1, 2, 10, 11, 12]))
    assert k_medoids(d, [3], fixed=[0]) == [4]
    assert cluster_medoids(d, [3], fixed=[0]).sizes == [3]
    assert k_medoids(d, [5]) == [2]
    assert k_medoids(d, [3]) == [3], "a centre stays on ties"


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(0, 10_000), st.integers(2, 25), st.booleans()), st.data())
@pytest.mark.parametrize("form", [DenseDistances, Lazy])
def test_anchors_attract_and_stay(form, problem, data):
    """Centres outside the items, looked at in batches of any size."""
    d = distances(*problem)
    inside = data.draw(st.integers(1, len(d) - 1))
    batch = data.draw(st.integers(1, len(d)))
    ids = [900 - k for k in range(len(d) - inside)]
    gap = torch.as_tensor(d[inside:, :inside])
    anchors = nearest_anchors(gap.split(batch), ids)
    mine, near = d[:inside, :inside], gap.min(0)
    assert anchors.distances.tolist() == near.values.tolist()
    assert anchors.ids.tolist() == [ids[k] for k in near.indices.tolist()]
    wanted = reference.k_center_greedy(d, inside, None, tuple(range(inside, len(d))))
    assert k_center_greedy(form(mine), inside, anchors=anchors) == wanted
    start = data.draw(st.permutations(range(inside)))[: data.draw(st.integers(1, inside))]
    got = cluster_medoids(form(mine), start, anchors=anchors)
    assert (got.centers, got.sizes) == reference.k_medoids_beside(mine, near.values.numpy(), start)


def test_no_anchors():
    assert nearest_anchors([], []) is None


def test_zero_iterations_change_nothing():
    assert k_medoids(distances(1, 20, False), [0, 1], max_iterations=0) == [0, 1]


def test_kinds():
    d = distances(1, 10, False)
    assert k_center_greedy(torch.as_tensor(d), 3) == k_center_greedy(d, 3)
    assert k_medoids(torch.as_tensor(d), [0, 1]) == k_medoids(d, [0, 1])


def test_inputs_unchanged():
    d = distances(1, 15, False)
    before = d.copy()
    k_medoids(d, k_center_greedy(d, 4, fixed=[2]))
    np.testing.assert_array_equal(d, before)


def test_lazy_rows_are_fetched_in_batches():
    lazy = Lazy(distances(3, 200, False))
    k_center_greedy(lazy, 100)
    assert lazy.asked < 50


def test_refused_items_are_not_centres():
    d = np.abs(np.subtract.outer([0.0, 5, 9], [0.0, 5, 9]))
    walk = farthest_first(DenseDistances(d), 0)
    assert next(walk).position == 0
    far = walk.send(True)
    assert (far.position, far.distance, far.nearest) == (2, 9.0, 0)
    near = walk.send(False)
    assert (near.position, near.distance, near.nearest) == (1, 5.0, 0)
    with pytest.raises(StopIteration):
        walk.send(True)


def test_subset_numbers_its_members():
    d = distances(4, 12, False)
    sub = SubsetDistances(DenseDistances(d), [7, 2, 9])
    np.testing.assert_allclose(sub.rows([1]).numpy(), d[[2]][:, [7, 2, 9]])
    np.testing.assert_allclose(sub.block([0, 2], [1]).numpy(), d[[7, 9]][:, [2]])


def test_feature_distances():
    x = np.array([[1.0, 0], [0, 1], [-2, 0], [0, 0]])
    np.testing.assert_allclose(CosineDistances(x).rows([0]).numpy(), [[0, 1, 2, 1]], atol=1e-6)
    present = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]], dtype=bool)
    np.testing.assert_allclose(
        JaccardDistances(present).rows([0, 2]).numpy(), [[0, 2 / 3, 1, 1], [1, 1, 0, 1]], atol=1e-6
    )


def test_fasterpam_beats_or_equals_the_alternation():
    d = distances(9, 80, False)
    start = k_center_greedy(d, 8)
    swapped, alternated = fasterpam(d, start), cluster_medoids(d, start)
    assert swapped.cost <= alternated.cost + 1e-9
    assert len(set(swapped.centers)) == 8 and swapped.cost == pytest.approx(reference.cost(d, swapped.centers))
    assert refine_centers(d, start, "fasterpam").centers == swapped.centers


def test_fasterpam_without_its_package_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "kmedoids", None)
    with pytest.raises(ImportError, match=r"package 'kmedoids' .*pip install kmedoids"):
        fasterpam(distances(1, 5, False), [0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: k_center_greedy(np.zeros((2, 3)), 1), r"shape \(n, n\), got \(2, 3\)"),
        (lambda d: k_center_greedy(np.full((2, 2), np.nan), 1), "finite distances"),
        (lambda d: k_center_greedy(np.array([[0, np.inf], [np.inf, 0]]), 1), "finite distances"),
        (lambda d: k_center_greedy(-d, 1), "distances >= 0"),
        (lambda d: k_center_greedy(2 - np.zeros((3, 3)), 1), "diagonal 0"),
        (lambda d: k_center_greedy(d, -1), "k >= 0"),
        (lambda d: k_center_greedy(d, 1, first=9), r"first in 0..4, got 9..9"),
        (lambda d: k_center_greedy(d, 1, first=1, fixed=[1]), "first outside fixed"),
        (lambda d: k_center_greedy(d, 1, fixed=[1, 1]), "distinct fixed"),
        (lambda d: k_medoids(d, [0, 0]), "distinct centers"),
        (lambda d: k_medoids(d, [5]), r"centers in 0..4"),
        (lambda d: k_medoids(d, [0], max_iterations=-1), "max_iterations >= 0"),
        (lambda d: k_medoids(d, [0], fixed=[0]), "disjoint"),
        (lambda d: refine_centers(d, [0], "lloyd"), "method"),
        (lambda d: fasterpam(Lazy(d), [0]), "distance matrix"),
        (lambda d: refine_centers(d, [0], "fasterpam", anchors=ANCHORS), "no labelled images .* refine='kmedoids'"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(distances(0, 5, False))


def test_empty():
    assert k_center_greedy(np.zeros((0, 0)), 3) == []
    assert k_medoids(np.zeros((0, 0)), []) == []
