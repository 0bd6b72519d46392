"""CCMS (Eq. 6 and 7) in full and lazy form against loops over objects."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppal_backend.acquisition.ccms import LazySimilarity, matrix, similarity_matrix
from ppal_backend.acquisition.ccms.objects import pack_objects
from ppal_backend.acquisition.ccms.tiles import class_rows, plan_tiles
from ppal_backend.structures import Detections
from tests.acquisition.pools import image, random_pool
from tests.reference import ccms as reference

TOLERANCE = 1e-5


def both_forms(images, **options):
    """The whole matrix, and the same from rows and from blocks of the lazy form."""
    full = similarity_matrix(images, **options)
    lazy = LazySimilarity(images, **options)
    n = len(images)
    rows = lazy.rows(torch.arange(n)).numpy()
    split = np.zeros_like(full)
    for part in np.array_split(np.random.default_rng(0).permutation(n), 3):
        for other in np.array_split(np.arange(n), 2):
            split[np.ix_(part, other)] = lazy.block(part, other).numpy()
    return full, rows, split


@pytest.mark.parametrize("tile", [3, 16, 64, 768])
@pytest.mark.parametrize("most", [0, 1, 7, 30])
@pytest.mark.parametrize("classes", [1, 3, 20, 80])
def test_parity_with_the_loops(classes, most, tile, monkeypatch):
    """Tiles that do and do not divide the pool; ties in the scores; identical images."""
    monkeypatch.setattr(matrix, "_CPU_TILE", tile)
    monkeypatch.setattr(matrix, "_LAZY_CPU_TILE", tile)
    rng = np.random.default_rng(classes * 100 + most)
    images = random_pool(rng, 9, classes, most)
    first = images[0]
    images.append(Detections(1, first.boxes_xyxy, first.scores, first.class_indices, first.embeddings))
    wanted = reference.similarity(images)
    for got in both_forms(images):
        np.testing.assert_allclose(got, wanted, atol=TOLERANCE)


def test_parity_with_a_hundred_detections():
    rng = np.random.default_rng(5)
    images = [image(k, rng.uniform(0.05, 1, 100), rng.integers(0, 3, 100), rng.normal(size=(100, 6))) for k in range(4)]
    for got in both_forms(images):
        np.testing.assert_allclose(got, reference.similarity(images), atol=TOLERANCE)


@pytest.mark.parametrize("classes", [1, 4])
def test_kl_parity(classes):
    images = random_pool(np.random.default_rng(classes), 12, classes, 6)
    wanted = reference.similarity(images, metric="kl")
    for got in both_forms(images, metric="kl"):
        np.testing.assert_allclose(got, wanted, atol=TOLERANCE)


def test_kl_of_certain_predictions_stays_finite():
    sure = image(1, [0.9], [0], class_probs=np.array([[1.0, 0.0, 0.0]], np.float32))
    other = image(2, [0.9], [0], class_probs=np.array([[0.0, 1.0, 0.0]], np.float32))
    s = similarity_matrix([sure, other, sure], metric="kl")
    assert s[0, 1] < 1e-4 and s[0, 2] == pytest.approx(2.0, abs=1e-5)


pools = st.builds(
    lambda seed, n, classes, most: random_pool(np.random.default_rng(seed), n, classes, most),
    st.integers(0, 10_000),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(0, 8),
)


@settings(max_examples=40, deadline=None)
@given(pools)
def test_symmetric_bounded_and_two_on_the_diagonal(images):
    s = similarity_matrix(images)
    np.testing.assert_array_equal(s, s.T)
    np.testing.assert_array_equal(np.diag(s), 2.0)
    assert s.min() >= 0 and s.max() <= 2


@settings(max_examples=40, deadline=None)
@given(pools, st.randoms(use_true_random=False))
def test_order_of_detections_does_not_matter(images, random):
    shuffled = []
    for d in images:
        order = list(range(len(d)))
        random.shuffle(order)
        shuffled.append(d.filter(np.array(order, dtype=np.int64)))
    np.testing.assert_allclose(similarity_matrix(shuffled), similarity_matrix(images), atol=TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(pools, st.integers(0, 100))
def test_order_of_images_does_not_matter(images, seed):
    order = np.random.default_rng(seed).permutation(len(images))
    moved = similarity_matrix([images[k] for k in order])
    np.testing.assert_allclose(moved, similarity_matrix(images)[np.ix_(order, order)], atol=TOLERANCE)


def test_no_shared_class_is_zero_and_a_copy_is_two():
    a = image(1, [0.9, 0.4], [0, 1], [[1, 0], [0, 1]])
    b = image(2, [0.9], [2], [[1, 0]])
    c = image(3, [0.9, 0.4], [0, 1], [[1, 0], [0, 1]])
    np.testing.assert_allclose(similarity_matrix([a, b, c]), [[2, 0, 2], [0, 2, 0], [2, 0, 2]], atol=1e-6)


def test_a_hand_worked_pair():
    """a: score .8 class 0 along x, score .2 class 1. b: one class-0 object at 60 degrees."""
    a = image(1, [0.8, 0.2], [0, 1], [[1, 0], [0, 1]])
    b = image(2, [0.5], [0], [[0.5, np.sqrt(3) / 2]])
    assert similarity_matrix([a, b])[0, 1] == pytest.approx(0.5 * (0.8 * 1.5 + 1.5))


def test_nothing_but_valid_detections_counts():
    a = image(1, [0.9, 0.04], [0, 1])
    empty, low = image(2, [], []), image(3, [0.04, 0.0], [0, 0])
    s = similarity_matrix([a, empty, low])
    np.testing.assert_array_equal(s, 2 * np.eye(3))
    lower = similarity_matrix([a, low], score_threshold=0.01)
    assert lower[0, 1] > 0
    np.testing.assert_array_equal(LazySimilarity([empty, low]).rows([1]).numpy(), [[0, 2]])


def test_empty_pool():
    assert similarity_matrix([]).shape == (0, 0)
    assert LazySimilarity([]).rows([]).shape == (0, 0)


def test_zero_embeddings_have_cosine_zero_and_are_reported(caplog):
    a, b = image(1, [0.9], [0], [[0.0, 0.0]]), image(2, [0.9], [0], [[1.0, 0.0]])
    with caplog.at_level(logging.WARNING):
        s = similarity_matrix([a, b, a])
    np.testing.assert_allclose(s, [[2, 1, 1], [1, 2, 1], [1, 1, 2]], atol=1e-6)
    assert "2 of 3 embeddings are zero vectors" in caplog.text


def test_all_images_identical():
    images = [image(k, [0.9, 0.5], [0, 0], [[1, 2], [3, 1]]) for k in range(70)]
    np.testing.assert_allclose(similarity_matrix(images), 2.0, atol=1e-5)


def test_tensors_in_tensors_out_and_inputs_unchanged():
    images = random_pool(np.random.default_rng(1), 6, 3, 5)
    copies = [d.embeddings.copy() for d in images]
    tensors = [d.to("cpu") for d in images]
    s = similarity_matrix(tensors)
    assert isinstance(s, torch.Tensor) and isinstance(similarity_matrix(images), np.ndarray)
    np.testing.assert_allclose(s.numpy(), similarity_matrix(images), atol=1e-6)
    for d, before in zip(images, copies, strict=True):
        np.testing.assert_array_equal(d.embeddings, before)


def test_single_image_input_is_not_normalised_in_place():
    d = image(1, [0.9], [0], [[3.0, 4.0]])
    similarity_matrix([d])
    LazySimilarity([d]).rows([0])
    np.testing.assert_array_equal(d.embeddings, [[3.0, 4.0]])


def test_half_precision_embeddings():
    images = random_pool(np.random.default_rng(2), 6, 3, 5)
    half = [
        Detections(d.image_id, d.boxes_xyxy, d.scores, d.class_indices, d.embeddings.astype(np.float16)) for d in images
    ]
    np.testing.assert_allclose(similarity_matrix(half), reference.similarity(half), atol=TOLERANCE)


def test_plans_hold_every_object_once():
    images = random_pool(np.random.default_rng(3), 40, 3, 12)
    objects = pack_objects(images)
    for _, rows in class_rows(objects):
        for side in (1, 7, 64):
            held = [plan.objects[plan.real] for plan in plan_tiles(objects, rows, side, 4)]
            assert torch.cat(held).sort().values.tolist() == rows.sort().values.tolist()


def test_auto_takes_probabilities_where_there_are_no_embeddings():
    rng = np.random.default_rng(4)
    images = [
        image(k, rng.uniform(0.1, 1, 3), [0, 1, 1], np.zeros((3, 0)), class_probs=rng.dirichlet(np.ones(3), 3))
        for k in range(4)
    ]
    images = [
        Detections(d.image_id, d.boxes_xyxy, d.scores, d.class_indices, np.zeros((3, 0), np.float32), d.class_probs)
        for d in images
    ]
    np.testing.assert_allclose(similarity_matrix(images), reference.similarity(images, metric="kl"), atol=TOLERANCE)


def test_memory_bound_is_kept_or_refused():
    images = random_pool(np.random.default_rng(6), 50, 3, 5)
    np.testing.assert_allclose(similarity_matrix(images, memory_gib=1e-4), similarity_matrix(images), atol=TOLERANCE)
    with pytest.raises(ValueError, match=r"memory_gib >= .* shape \(50, 50\), got 1e-06"):
        similarity_matrix(images, memory_gib=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: similarity_matrix([a, b]), r"one width for all images, got 2 for image 1 and 3 for image 2"),
        (lambda a, b: similarity_matrix([a], metric="euclid"), "metric"),
        (lambda a, b: similarity_matrix([a], metric="kl"), "class_probs"),
        (lambda a, b: similarity_matrix([a], score_threshold=-1), "score_threshold"),
        (lambda a, b: similarity_matrix([a], memory_gib=0), "memory_gib > 0"),
        (lambda a, b: LazySimilarity([a], memory_gib=0), "memory_gib > 0"),
        (lambda a, b: LazySimilarity([a]).rows([1]), r"positions in 0..0, got 1..1"),
        (lambda a, b: LazySimilarity([a]).block([0], [-1]), "positions"),
        (lambda a, b: LazySimilarity([a]).against(pack_objects([b])), "features of width 2 for all images, got 3"),
    ],
)
def test_bad_input_is_refused(call, message):
    a, b = image(1, [0.9], [0], [[1.0, 0.0]]), image(2, [0.9], [0], [[1.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=message):
        call(a, b)
