"""The map of the pool: the plane against a singular value decomposition, and what a round leaves of it."""

from dataclasses import replace

import numpy as np
import pytest

from ppal_backend.rounds import pool_map
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.pool_map import labelled_to_draw, map_of, principal_plane
from ppal_backend.rounds.ports import PoolEntry
from tests.rounds.fakes import SPEC, FakeWorld, features_of, rank_spec

DRAWN = replace(SPEC, draw_map=True)


def reference(features):
    """Points up to the sign of each axis, and explained shares, by a full decomposition in double precision."""
    rows = np.array([row / np.linalg.norm(row) if row.any() else row for row in np.asarray(features, float)])
    rows -= rows.mean(axis=0)
    left, strength, _ = np.linalg.svd(rows, full_matrices=False)
    return left[:, :2] * strength[:2], strength[:2] ** 2 / (strength**2).sum()


@pytest.mark.parametrize(("n", "d"), [(50, 7), (9, 40), (5000, 3)])
def test_the_plane_is_that_of_a_full_decomposition(n, d):
    rng = np.random.default_rng(n)
    features = (rng.normal(size=(n, d)) * np.linspace(3, 1, d) + 2.0).astype(np.float32)
    features[0] = 0
    found, (points, explained) = principal_plane(features), reference(features)
    assert found.explained == pytest.approx(explained, abs=1e-5)
    assert np.abs(found.points) == pytest.approx(np.abs(points), abs=1e-4)


def test_length_does_not_count_and_the_sign_is_fixed():
    features = np.random.default_rng(1).normal(size=(30, 6))
    lengths = np.random.default_rng(2).uniform(0.1, 9, (30, 1))
    first, second = principal_plane(features), principal_plane(features * lengths)
    assert first.points == pytest.approx(second.points)
    order = np.random.default_rng(3).permutation(30)
    assert principal_plane(features[order]).points == pytest.approx(first.points[order])


def test_an_axis_points_where_its_largest_weight_is_positive():
    features = np.array([[1.0, 0.0, 0.0], [1.0, 0.3, 0.0], [1.0, -0.3, 0.0], [1.0, 0.0, 0.1], [1.0, 0.0, -0.1]])
    points = principal_plane(features).points
    assert points[1, 0] > 0.2 > -0.2 > points[2, 0] and points[3, 1] > 0.05 > -0.05 > points[4, 1]


def test_nothing_to_tell_apart_lies_in_one_place():
    assert principal_plane(np.zeros((0, 4))).points.shape == (0, 2)
    for features in (np.ones((5, 4), np.float32) * 0.3, np.zeros((3, 4)), np.ones((1, 4)), np.full((4, 1), 2.0)):
        found = principal_plane(features)
        assert not found.points.any() and found.explained == (0.0, 0.0)
    one_way = principal_plane(np.array([[1.0], [-1.0]]))
    assert np.abs(one_way.points) == pytest.approx(np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert one_way.explained == pytest.approx((1.0, 0.0))


def entries(ids):
    return [PoolEntry(i, f"/{i}.jpg", 40, 30) for i in ids]


def test_all_labelled_images_are_drawn_while_they_are_few():
    assert [e.image_id for e in labelled_to_draw(entries([3, 1, 2]), 10)] == [1, 2, 3]
    many = entries(range(1000))
    assert len(labelled_to_draw(many, 1000)) == pool_map.FEWEST_LABELLED == 200
    assert [e.image_id for e in labelled_to_draw(many, 5000)] == list(range(0, 1000, 2))
    assert len(labelled_to_draw(many, 50_000)) == 1000


def test_pool_and_labelled_lie_on_one_map():
    features = {i: np.random.default_rng(i).normal(size=4) for i in range(8)}
    drawn = map_of({i: features[i] for i in (5, 3, 4)}, {0: features[0], 1: features[1]}, entries([2, 1, 0]))
    points = principal_plane(np.stack([features[i] for i in (5, 3, 4, 1, 0)])).points
    assert drawn["ids"] == [5, 3, 4] and drawn["labelled_images"] == 3
    assert drawn["x"] == pytest.approx(points[:3, 0], abs=1e-4)
    assert [e["image_id"] for e in drawn["labelled"]] == [1, 0], "of 2 nobody has a feature"
    assert [e["y"] for e in drawn["labelled"]] == pytest.approx(points[3:, 1], abs=1e-4)
    assert drawn["labelled"][0]["path"] == "/1.jpg" and drawn["labelled"][0]["width"] == 40


def test_a_round_draws_its_pool_and_what_was_labelled_before(tmp_path):
    world = FakeWorld()
    world.run(tmp_path, DRAWN)
    drawn = RoundFolder(tmp_path).read("map.json")
    assert drawn["ids"] == list(range(1000, 1030)) and drawn["labelled_images"] == 20
    assert sorted(e["image_id"] for e in drawn["labelled"]) == list(range(1, 21)), "held-out images too"
    features = np.stack([features_of(i) for i in (*drawn["ids"], *(e["image_id"] for e in drawn["labelled"]))])
    points = principal_plane(features).points
    assert drawn["x"] == pytest.approx(points[:30, 0], abs=1e-4)
    assert [e["x"] for e in drawn["labelled"]] == pytest.approx(points[30:, 0], abs=1e-4)


def test_drawing_changes_nothing_in_what_is_chosen(tmp_path):
    drawn = FakeWorld().run(tmp_path / "a", DRAWN)
    assert drawn.queue == FakeWorld().run(tmp_path / "b").queue
    assert not (tmp_path / "b" / "map.json").exists() and not (tmp_path / "b" / "labelled_detections").exists()


def test_without_a_model_there_is_a_map_only_where_images_were_described(tmp_path):
    FakeWorld().run(tmp_path / "random", replace(rank_spec(), draw_map=True))
    assert not (tmp_path / "random" / "map.json").exists()
    world = FakeWorld()
    world.has_weights = True
    world.run(tmp_path / "typical", replace(rank_spec(), draw_map=True, cold_start="typical"))
    drawn = RoundFolder(tmp_path / "typical").read("map.json")
    assert len(drawn["ids"]) == 30 and drawn["labelled"] == [] and drawn["labelled_images"] == 20
