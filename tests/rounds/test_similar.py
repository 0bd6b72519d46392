"""Images like others, against the slow reference of CCMS and plain cosines."""

from dataclasses import replace

import numpy as np
import pytest

from ppal_backend.errors import StateError
from ppal_backend.rounds.detections_store import DetectionsWriter
from ppal_backend.rounds.similar import MOST_ASKED, most_similar, nearest_labelled, objects_of
from ppal_backend.structures.detections import Detections
from tests.acquisition.pools import random_pool
from tests.reference import ccms

LEAST = 0.3


@pytest.fixture(params=[1, 7, 64])
def pool(request, tmp_path):
    """Images on disk in shards of several sizes; ids are no positions, some images hold nothing sure."""
    images = random_pool(np.random.default_rng(request.param), 40, classes=3, most=6)
    images = [replace(d, class_probs=None, softmax=False, pre_nms_counts=None, true_positive=None) for d in images]
    writer = DetectionsWriter(tmp_path / "detections", shard_size=request.param)
    for d in images:
        writer.add(d, {})
    writer.flush()
    return tmp_path / "detections", images


def sure(d):
    return [k for k in range(len(d)) if d.scores[k] >= LEAST]


def some_sure(images):
    """Ids of images with an object that is sure: of others the surest box counts."""
    return [d.image_id for d in images if sure(d)]


def slow(images, chosen):
    """Similarity of every other image with an object to the most similar of the chosen ones."""
    values = ccms.similarity(images, threshold=LEAST)
    at = {d.image_id: k for k, d in enumerate(images)}
    return {
        d.image_id: max(values[at[c], at[d.image_id]] for c in chosen)
        for d in images
        if sure(d) and d.image_id not in chosen
    }


@pytest.mark.parametrize("count", [1, 3])
def test_images_come_by_their_ccms_to_the_nearest_of_those_asked_for(pool, count):
    folder, images = pool
    chosen = some_sure(images)[:count]
    wanted = slow(images, chosen)
    found = most_similar(folder, objects_of(folder, chosen, LEAST), LEAST, 100)
    assert sorted(one.image_id for one in found) == sorted(wanted)
    assert [one.similarity for one in found] == pytest.approx([wanted[one.image_id] for one in found], abs=2e-3)
    assert [one.similarity for one in found] == sorted((one.similarity for one in found), reverse=True)
    few = most_similar(folder, objects_of(folder, chosen, LEAST), LEAST, 5)
    assert few == found[:5]


def test_a_box_finds_the_images_of_the_most_similar_objects_whatever_their_class(pool):
    folder, images = pool
    image = next(d for d in images if len(d) > 2)
    vector = image.embeddings[1].astype(float)
    wanted = {}
    for d in images:
        if d.image_id != image.image_id and sure(d):
            values = {k: ccms.cosine_plus_one(vector, d.embeddings[k].astype(float)) for k in sure(d)}
            best = max(values, key=values.get)
            wanted[d.image_id] = (values[best], best)
    found = most_similar(folder, objects_of(folder, [image.image_id], LEAST, box=1), LEAST, 100)
    assert sorted(one.image_id for one in found) == sorted(wanted)
    for one in found:
        assert (one.similarity, one.box_index) == (
            pytest.approx(wanted[one.image_id][0], abs=2e-3),
            wanted[one.image_id][1],
        )
    assert found[0].similarity == pytest.approx(max(v for v, _ in wanted.values()), abs=2e-3)


def test_only_images_that_may_be_looked_at_are_found(pool):
    folder, images = pool
    some = {d.image_id for d in images[::3]}
    asked = some_sure(images)[0]
    found = most_similar(folder, objects_of(folder, [asked], LEAST), LEAST, 100, among=some)
    assert {one.image_id for one in found} == some.intersection(some_sure(images)) - {asked}


def test_of_an_image_that_was_looked_at_twice_the_last_time_counts(tmp_path):
    def image(image_id, vector, score=0.9):
        box = np.array([[0, 0, 10, 10]], np.float32)
        return Detections(image_id, box, np.array([score], np.float32), np.array([0]), np.array([vector], np.float32))

    writer = DetectionsWriter(tmp_path, shard_size=2)
    for d in (image(1, [1, 0]), image(2, [1, 0]), image(3, [0, 1]), image(2, [-1, 0])):
        writer.add(d, {})
    writer.flush()
    found = most_similar(tmp_path, objects_of(tmp_path, [1], LEAST), LEAST, 5)
    assert [(one.image_id, round(one.similarity, 3)) for one in found] == [(3, 1.0), (2, 0.0)]


def test_of_an_image_without_a_sure_object_the_surest_counts_and_zero_vectors_are_like_nothing(tmp_path):
    def image(image_id, rows):
        n = len(rows)
        boxes = np.tile(np.array([0, 0, 10, 10], np.float32), (n, 1))
        scores = np.array([s for s, _ in rows], np.float32)
        return Detections(image_id, boxes, scores, np.zeros(n, int), np.array([v for _, v in rows], np.float32))

    writer = DetectionsWriter(tmp_path)
    for d in (image(1, [(0.2, [0, 1]), (0.1, [1, 0])]), image(2, [(0.9, [1, 0])]), image(3, [(0.9, [0, 2])]),
              image(4, [(0.9, [0, 0])]), image(5, [(0.2, [0, 1])])):  # fmt: skip
        writer.add(d, {})
    writer.flush()
    found = most_similar(tmp_path, objects_of(tmp_path, [1], LEAST), LEAST, 5)
    assert [(one.image_id, round(one.similarity, 3)) for one in found] == [(3, 2.0), (2, 1.0), (4, 1.0)]


def test_the_nearest_labelled_come_from_all_folders(pool, tmp_path):
    folder, images = pool
    other = DetectionsWriter(tmp_path / "labelled")
    asked = some_sure(images)[0]
    twin = replace(next(d for d in images if d.image_id == asked), image_id=9999)
    other.add(twin, {})
    other.flush()
    some = {d.image_id for d in images[20:]}
    looked_for = objects_of(folder, [asked], LEAST)
    found = nearest_labelled([(folder, some), (tmp_path / "labelled", None)], looked_for, LEAST)
    assert found[0].image_id == 9999 and found[0].similarity == pytest.approx(2.0, abs=2e-3)
    assert len(found) == 3 and {one.image_id for one in found[1:]} <= some


@pytest.mark.parametrize(
    ("chosen", "box", "text"),
    [([], None, "expected 1 to"), (range(MOST_ASKED + 1), None, f"got {MOST_ASKED + 1}"), ([7, 14], 0, "a box of one"),
     ([123456], None, "expected objects there"), ([7], 99, "expected this box"), ([7], -1, "expected this box")],
)  # fmt: skip
def test_what_cannot_be_looked_for_is_told(pool, chosen, box, text):
    with pytest.raises(StateError, match=text):
        objects_of(pool[0], chosen, LEAST, box)


def test_a_detector_without_embeddings_says_so(tmp_path):
    writer = DetectionsWriter(tmp_path)
    writer.add(Detections(1, np.ones((1, 4), np.float32) * [0, 0, 9, 9], np.array([0.9], np.float32), np.array([0]),
                          np.zeros((1, 0), np.float32)), {})  # fmt: skip
    writer.flush()
    with pytest.raises(StateError, match="cannot compare"):
        objects_of(tmp_path, [1], LEAST)
