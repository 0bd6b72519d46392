"""A pool that is read from disk against the same pool in memory: same utilities, same picks, and only what is needed.

The way through memory is the slow reference: every image with everything, one after the other.
"""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from ppal_backend.acquisition.strategies import STRATEGIES, get_strategy, strategy_names
from ppal_backend.acquisition.uncertainty import BoxFilter
from ppal_backend.rounds.detections_store import DetectionsWriter, StoredDetections, from_half, read_detections, to_half
from ppal_backend.structures import Detections, QueryContext
from tests.acquisition.pools import random_pool

FIELDS = ("boxes_xyxy", "scores", "class_indices", "embeddings", "class_probs", "pre_nms_counts")
CLASSES = 5


def write(folder, images, features=None, half=False, shard_size=7):
    writer = DetectionsWriter(folder, shard_size, half=half)
    for row, detections in enumerate(images):
        writer.add(detections, {name: value[row] for name, value in (features or {}).items()})
    writer.flush()


def world(tmp_path, seed=0, images=60, softmax=True, half=False, most=6):
    """A context that reads from disk and the same one in memory, of what came back from disk."""
    rng = np.random.default_rng(seed)
    pool = random_pool(rng, images, CLASSES, most)
    known = random_pool(rng, 9, CLASSES, most, first_id=100_000)
    if not softmax:
        pool, known = ([replace(d, softmax=False) for d in part] for part in (pool, known))
    pool = [replace(d, image_size=(150, 200)) for d in pool]
    truth = {d.image_id: d.true_positive for d in known}
    features = {n: rng.normal(size=(images, w)).astype(np.float32) for n, w in (("global", 6), ("fpn", 10))}
    of_known = {n: rng.normal(size=(9, w)).astype(np.float32) for n, w in (("global", 6), ("fpn", 10))}
    write(tmp_path / "pool", pool, features, half)
    write(tmp_path / "known", known, of_known, half)

    def mark(detections):
        return replace(detections, true_positive=truth[detections.image_id])

    common = {"num_classes": CLASSES, "difficulty": rng.random(CLASSES), "class_counts": rng.integers(0, 50, CLASSES)}
    memory = QueryContext(
        pool=[d for d, _ in read_detections(tmp_path / "pool")],
        labelled=[mark(d) for d, _ in read_detections(tmp_path / "known")],
        image_features=features,
        labelled_features=of_known,
        **common,
    )

    def streamed(needs):
        at = StoredDetections(tmp_path / "pool", embeddings="embeddings" in needs)
        of = StoredDetections(tmp_path / "known", embeddings="embeddings" in needs, mark=mark)
        names = [name for name in needs if name != "embeddings"]
        return QueryContext(
            pool=at,
            labelled=of,
            image_features={name: at.features(name) for name in names},
            labelled_features={name: of.features(name) for name in names},
            **common,
        )

    return memory, streamed


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("name", strategy_names())
def test_a_streamed_pool_gives_the_same_answer_to_the_bit(name, softmax, half, tmp_path):
    memory, streamed = world(tmp_path, seed=len(name), softmax=softmax, half=half)
    strategy = get_strategy(name, delta=3.0)
    wanted = strategy.query(memory, 8, np.random.default_rng(1))
    got = strategy.query(streamed(strategy.needs), 8, np.random.default_rng(1))
    assert got.utilities == wanted.utilities
    assert (got.image_ids, got.candidate_ids) == (wanted.image_ids, wanted.candidate_ids)
    assert got.explanations == wanted.explanations


@pytest.mark.parametrize(
    "options",
    [
        {"uncertainty": "margin", "aggregate": "mean"},
        {"uncertainty": "posterior", "aggregate": "max"},
        {"preset": "reference"},
        {"max_detections": 2},
        {"score_threshold": 0.4, "min_size_px": 60.0},
        {"unit": "boxes"},
        {"metric": "kl"},
        {"memory_gib": 1e-6},
    ],
)
@pytest.mark.parametrize("softmax", [False, True])
def test_options_give_the_same_answer_too(options, softmax, tmp_path):
    memory, streamed = world(tmp_path, seed=3, softmax=softmax, most=14)
    strategy = get_strategy("ppal+labelled", delta=3.0, **options)
    wanted = strategy.query(memory, 8, np.random.default_rng(1))
    got = strategy.query(streamed(strategy.needs), 8, np.random.default_rng(1))
    assert got.utilities == wanted.utilities and got.image_ids == wanted.image_ids
    assert got.explanations == wanted.explanations


def test_rows_that_count_are_those_of_each_image_alone(tmp_path):
    memory, streamed = world(tmp_path, images=40, most=14)
    for boxes in (BoxFilter(), BoxFilter(max_detections=3), BoxFilter(min_size_px=80.0, max_aspect=1.5)):
        alone = [boxes.valid_rows(d).tolist() for d in memory.pool]
        found = []
        for batch in streamed({}).pool.batches():
            rows, held = boxes.valid_rows_of_batch(batch)
            starts = np.cumsum(batch.counts) - batch.counts
            found += [(p - s).tolist() for p, s in zip(rows.split(held.tolist()), starts, strict=True)]
        assert found == alone and any(alone)


class Reads:
    """Notes which arrays are read of which shard and how many rows of them."""

    def __init__(self, monkeypatch):
        from ppal_backend.rounds import detections_store as store

        self.rows, original, whole = {}, store._Shard.array, store._read
        rows_of_image = store._Shard._rows

        def array(shard, name, start=0, stop=None):
            values = original(shard, name, start, stop)
            self.rows[name] = self.rows.get(name, 0) + len(values)
            return values

        def rows(shard, file, name, start, stop):
            values = rows_of_image(shard, file, name, start, stop)
            self.rows[name] = self.rows.get(name, 0) + len(values)
            return values

        def read(path, only_boxes=False, embeddings=True):
            if embeddings:
                self.rows["everything"] = self.rows.get("everything", 0) + 1
            return whole(path, only_boxes, embeddings)

        monkeypatch.setattr(store._Shard, "array", array)
        monkeypatch.setattr(store._Shard, "_rows", rows)
        monkeypatch.setattr(store, "_read", read)


@pytest.mark.parametrize("name", strategy_names())
def test_a_strategy_reads_what_it_says_it_needs(name, tmp_path, monkeypatch):
    """Embeddings that nobody needs stay on disk, and only candidates' are read where those are enough."""
    memory, streamed = world(tmp_path, softmax=False)
    reads, strategy = Reads(monkeypatch), get_strategy(name, delta=3.0)
    answer = strategy.query(streamed(strategy.needs), 8, np.random.default_rng(1))
    needs = strategy.needs.get("embeddings")
    assert ("everything" in reads.rows) == (needs == "pool"), "shards are read whole for the whole pool's embeddings"
    boxes = {d.image_id: len(d) for d in (*memory.pool, *memory.labelled)}
    if needs is None:
        assert "embeddings" not in reads.rows
    elif needs == "candidates":
        most = sum(boxes[i] for i in answer.candidate_ids) + sum(len(d) for d in memory.labelled)
        again = most if name in ("pal", "auto", "dcus+coverage") else 0  # their second stage weighs the candidates
        assert 0 < reads.rows["embeddings"] <= most + again + 2 * sum(boxes[i] for i in answer.image_ids)
        assert len(answer.candidate_ids) < len(memory.pool)
    assert set(strategy.needs) <= {"embeddings", "global", "fpn"} and strategy.needs == STRATEGIES[name].needs


def test_memory_does_not_grow_with_the_pool(tmp_path):
    """Peaks of stage 1 and 2 on 500 and 4,000 images; in memory the pools would take 4 and 32 MB of embeddings."""

    def peak(images):
        rng = np.random.default_rng(0)
        folder = tmp_path / str(images)
        write(folder, random_pool(rng, images, CLASSES, 31, dim=128), shard_size=64)
        tracemalloc.start()
        context = QueryContext(StoredDetections(folder), CLASSES)
        get_strategy("ppal", delta=2.0).query(context, 20, np.random.default_rng(0))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(100)  # what is loaded at the first call
    small, large = peak(500), peak(4000)
    assert large - small < 3500 * 1500, "an image costs its id and its utility, not its boxes (4 kB) or embeddings (8)"


def test_an_image_comes_back_by_position_and_by_id(tmp_path):
    memory, streamed = world(tmp_path)
    stored = streamed({"embeddings": "pool"}).pool
    assert stored.image_ids == tuple(d.image_id for d in memory.pool) and len(stored) == 60
    for ways in (list(stored), [stored[k] for k in range(60)], stored[:]):
        for found, wanted in zip(ways, memory.pool, strict=True):
            assert (found.image_id, found.softmax, found.image_size) == (wanted.image_id, True, (150, 200))
            for field in FIELDS:
                np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field))
    boxes = stored.boxes_of(14)
    np.testing.assert_array_equal(boxes.boxes_xyxy, memory.pool[2].boxes_xyxy)
    assert boxes.embeddings.shape == (len(boxes), 0) and stored.boxes_of(13) is None


def test_images_that_left_the_pool_are_left_out(tmp_path):
    memory, _ = world(tmp_path)
    kept = [0, 1, 21, 413, 14, 77]
    stored = StoredDetections(tmp_path / "pool", kept)
    assert stored.image_ids == (0, 14, 21, 77, 413), "in the order of the folder; 1 was never there"
    by_id = {d.image_id: d for d in memory.pool}
    for found in (*stored, *stored.without_embeddings()):
        np.testing.assert_array_equal(found.scores, by_id[found.image_id].scores)
    assert stored.features("global").shape == (5, 6) and stored.features("nothing") is None
    np.testing.assert_array_equal(stored.features("global")[2], memory.image_features["global"][3])


def test_a_class_beyond_the_models_is_told_with_its_image(tmp_path):
    memory, _ = world(tmp_path)
    stored = StoredDetections(tmp_path / "pool")
    top = max(int(d.class_indices.max()) for d in memory.pool if len(d))
    assert stored.highest_class()[0] == top
    assert top in next(d for d in memory.pool if d.image_id == stored.highest_class()[1]).class_indices
    with pytest.raises(ValueError, match="expected class indices below num_classes=2, got 4 for image"):
        QueryContext(stored, 2)
    assert StoredDetections(tmp_path / "missing").highest_class() == (-1, -1)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 3e4, 1e6, 1e30])
def test_half_precision_keeps_eleven_bits_of_numbers_of_any_size(scale):
    """Plain float16 would make 1e6 infinite and 1e-8 zero."""
    rows = (np.random.default_rng(0).normal(size=(50, 16)) * scale).astype(np.float32)
    rows[7] = 0
    packed, exponents = to_half(rows)
    assert packed.dtype == np.float16 and exponents.dtype == np.int16
    back = from_half(packed, exponents)
    assert back.dtype == np.float32 and not back[7].any()
    largest = np.abs(rows).max(axis=1, keepdims=True)
    assert (np.abs(back - rows) <= np.abs(rows) * 2.0**-11 + largest * 2.0**-24).all()
    again, same = to_half(back)
    np.testing.assert_array_equal(from_half(again, same), back)


def test_embeddings_take_half_the_room_and_old_folders_are_read_as_they_are(tmp_path):
    images = random_pool(np.random.default_rng(0), 30, CLASSES, 40, dim=256)
    write(tmp_path / "half", images, half=True)
    write(tmp_path / "single", images, half=False)
    half, single = (sum(f.stat().st_size for f in (tmp_path / n).iterdir()) for n in ("half", "single"))
    assert half < 0.6 * single
    for (found, _), (exact, _), wanted in zip(
        read_detections(tmp_path / "half"), read_detections(tmp_path / "single"), images, strict=True
    ):
        np.testing.assert_array_equal(exact.embeddings, wanted.embeddings)
        np.testing.assert_allclose(found.embeddings, wanted.embeddings, rtol=2**-10, atol=1e-5)


def test_images_of_detectors_of_both_kinds_are_not_mixed(tmp_path):
    images = random_pool(np.random.default_rng(0), 12, CLASSES, 5)
    images = [replace(d, softmax=k % 3 > 0) for k, d in enumerate(images)]
    write(tmp_path, images)
    strategy = get_strategy("entropy")
    memory = QueryContext([d for d, _ in read_detections(tmp_path)], CLASSES)
    wanted = strategy.candidates(memory, 3, np.random.default_rng(0))
    assert strategy.candidates(QueryContext(StoredDetections(tmp_path), CLASSES), 3, np.random.default_rng(0)) == wanted


def test_an_empty_folder_is_an_empty_pool(tmp_path):
    stored = StoredDetections(tmp_path)
    assert len(stored) == 0 and list(stored) == [] and stored.features("global") is None
    assert get_strategy("ppal").query(QueryContext(stored, 2), 3, np.random.default_rng(0)).image_ids == ()


def test_images_without_boxes_do_no_harm(tmp_path):
    write(tmp_path, [Detections.empty(i) for i in range(9)])
    context = QueryContext(StoredDetections(tmp_path), 2)
    answer = get_strategy("ppal").query(context, 3, np.random.default_rng(0))
    assert answer.image_ids == (0, 1, 2) and set(answer.utilities.values()) == {0.0}
