"""An unchanged detector never looks at an unchanged image again, and says the same as if it had."""

import os
from dataclasses import replace

import numpy as np
import pytest

from ppal_backend.rounds.detections_store import DetectionsWriter, StoredDetections, shards_of
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import PoolEntry
from ppal_backend.rounds.reuse import stamp_of
from ppal_backend.structures.round import ModelRef
from tests.rounds.fakes import SPEC, FakeWorld, Killed, detections_of

POOL = range(1000, 1030)


class World(FakeWorld):
    """Whose images and weights are files, and which notes what the detector is asked to look at."""

    def __init__(self, folder, **options):
        super().__init__(**options)
        self.files, self.looked_at, self.weights = folder, [], folder / "model.pth"
        folder.mkdir(exist_ok=True)
        self.weights.write_bytes(b"weights")

    def prepare(self, folder, on_progress):
        data = super().prepare(folder, on_progress)
        return replace(data, pool=[self.entry(e.image_id) for e in data.pool])

    def entry(self, image_id):
        path = self.files / f"{image_id}.jpg"
        if not path.exists():
            path.write_bytes(b"image %d" % image_id)
        return PoolEntry(image_id, str(path), 100, 80)

    def infer(self, spec, model, images, on_progress, should_stop):
        images = list(images)
        self.looked_at.append([e.image_id for e in images])
        yield from super().infer(spec, model, images, on_progress, should_stop)

    def rank(self, folder, number, **changes):
        """A ranking round with the detector."""
        model = ModelRef(SPEC.detector, str(self.weights), ("cat", "dog"), (0.2, 0.9))
        spec = replace(SPEC, kind="rank", number=number, **{"model": model, **changes})
        return self.run(folder / str(number), spec)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "files")


def test_a_ranking_after_an_import_looks_at_new_images_alone(world, tmp_path):
    world.rank(tmp_path, 1)
    world.pool_size = 37
    later = world.rank(tmp_path, 2)
    assert world.looked_at == [list(POOL), list(range(1030, 1037))]
    facts = RoundFolder(tmp_path / "2").facts("infer")
    assert (facts["images"], facts["looked_at"], facts["unreadable_images"]) == (37, 7, 0)
    fresh = World(tmp_path / "files", pool=37)
    again = fresh.rank(tmp_path / "elsewhere", 2)
    assert fresh.looked_at == [list(range(1000, 1037))]
    assert later.queue == again.queue
    mine, theirs = (RoundFolder(p / "2").read("query_set.json") for p in (tmp_path, tmp_path / "elsewhere"))
    assert mine == theirs


def test_what_is_taken_over_is_no_copy_and_outlives_its_round(world, tmp_path):
    import shutil

    world.rank(tmp_path, 1)
    first = shards_of(tmp_path / "1" / "detections")
    world.rank(tmp_path, 2)
    second = shards_of(tmp_path / "2" / "detections")
    assert [p.stat().st_ino for p in first] == [p.stat().st_ino for p in second], "nothing was new"
    shutil.rmtree(tmp_path / "1")
    world.rank(tmp_path, 3)
    assert world.looked_at == [list(POOL), [], []]


def test_an_image_that_was_changed_or_replaced_is_looked_at_again_and_counts_as_it_is_now(world, tmp_path, monkeypatch):
    world.rank(tmp_path, 1)
    (tmp_path / "files" / "1003.jpg").write_bytes(b"another one")
    os.utime(tmp_path / "files" / "1004.jpg", ns=(1, 1))
    new = detections_of(1014)
    plain = FakeWorld.infer

    def infer(self, *args):
        for item in plain(self, *args):
            i = item.detections.image_id
            yield item if i != 1003 else replace(item, detections=replace(new, image_id=i))

    monkeypatch.setattr(FakeWorld, "infer", infer)
    world.rank(tmp_path, 2)
    assert world.looked_at[1] == [1003, 1004]
    stored = StoredDetections(tmp_path / "2" / "detections")
    assert sorted(stored.image_ids) == list(POOL) and stored.image_ids[-2:] == (1003, 1004)
    np.testing.assert_array_equal(stored[28].scores, new.scores)
    published = {e.task_id: e.detections for e in world.published[1][1]}
    np.testing.assert_array_equal(published[1003].scores, new.scores)


def test_a_known_checksum_counts_instead_of_the_files_time(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x")
    entry = PoolEntry(1, str(path), 10, 10, "abc")
    before, unknown = stamp_of(entry), stamp_of(replace(entry, checksum=""))
    os.utime(path, ns=(5, 5))
    assert stamp_of(entry) == before > 0 and stamp_of(replace(entry, checksum="")) != unknown
    assert len({stamp_of(e) for e in (entry, replace(entry, checksum="b"), replace(entry, width=9),
                                      replace(entry, path=str(tmp_path / "b.jpg")))}) == 4  # fmt: skip


@pytest.mark.parametrize("change", ["weights", "labels", "detector", "embedding", "levels", "strategy"])
def test_whatever_would_say_something_else_looks_at_everything(world, tmp_path, change):
    world.rank(tmp_path, 1)
    model = ModelRef(SPEC.detector, str(world.weights), ("cat", "dog"), (0.2, 0.9))
    changes = {
        "labels": {"model": replace(model, labels=("dog", "cat"))},
        "detector": {"model": replace(model, detector="fcos_tiny")},
        "embedding": {"embedding": "sampled"},
        "levels": {"levels": "scale"},
        "strategy": {"strategy": "pal"},  # reads counts that the others do not ask for
    }.get(change, {})
    if change == "weights":
        world.weights.write_bytes(b"other weights")
    world.rank(tmp_path, 2, **changes)
    assert list(POOL) in world.looked_at[1:]


def test_another_strategy_on_the_same_detections_looks_at_nothing(world, tmp_path):
    world.rank(tmp_path, 1)
    world.rank(tmp_path, 2, strategy="entropy", budget=3, delta=3.0)
    assert world.looked_at == [list(POOL), []]


def test_a_training_looks_at_everything(world, tmp_path):
    world.rank(tmp_path, 1)
    world.run(tmp_path / "2", replace(SPEC, number=2))
    assert world.looked_at[1] == list(POOL)


def test_a_killed_ranking_goes_on_with_what_is_left(world, tmp_path, monkeypatch):
    monkeypatch.setattr("ppal_backend.rounds.detections_store.DetectionsWriter.__init__.__defaults__", (8,))
    world.rank(tmp_path, 1)
    world.pool_size, world.infer_limit = 60, 20
    with pytest.raises(Killed):
        world.rank(tmp_path, 2)
    world.infer_limit = None
    world.rank(tmp_path, 2)
    assert world.looked_at[1:] == [list(range(1030, 1060)), list(range(1046, 1060))], "16 of 20 were on disk"


def test_labelled_images_are_not_looked_at_again_either(world, tmp_path):
    world.rank(tmp_path, 1, strategy="ppal+labelled")
    world.rank(tmp_path, 2, strategy="ppal+labelled")
    assert len(world.looked_at[1]) > 5
    assert world.looked_at[2:] == [[], []]


def test_a_damaged_shard_is_looked_at_again(world, tmp_path, monkeypatch):
    monkeypatch.setattr("ppal_backend.rounds.detections_store.DetectionsWriter.__init__.__defaults__", (8,))
    world.rank(tmp_path, 1)
    path = shards_of(tmp_path / "1" / "detections")[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    world.rank(tmp_path, 2)
    assert world.looked_at[1] == list(range(1008, 1016))


def test_images_that_are_gone_stay_behind(world, tmp_path):
    world.rank(tmp_path, 1)
    world.pool_size = 12
    world.rank(tmp_path, 2)
    facts = RoundFolder(tmp_path / "2").facts("infer")
    assert (facts["images"], facts["looked_at"]) == (12, 0)
    assert sorted(e.task_id for e in world.published[1][1]) == list(range(1000, 1012))


def test_a_folder_from_before_there_were_stamps_is_looked_at_again(world, tmp_path):
    world.rank(tmp_path, 1)
    mark = tmp_path / "1" / "steps" / "infer.json"
    mark.write_text(mark.read_text().replace("fingerprints", "something"))
    world.rank(tmp_path, 2)
    assert world.looked_at[1] == list(POOL)


def test_writer_tells_what_it_was_told(tmp_path):
    writer = DetectionsWriter(tmp_path)
    writer.add(detections_of(3), {}, 77)
    writer.add(detections_of(4), {})
    writer.flush()
    assert DetectionsWriter(tmp_path).stamps == {3: 77, 4: 0}
