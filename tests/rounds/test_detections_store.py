from dataclasses import replace
from pathlib import Path

import numpy as np

from ppal_backend.rounds.detections_store import DetectionsWriter, StoredDetections, read_detections
from ppal_backend.structures.detections import Detections
from tests.rounds.fakes import detections_of


def test_what_is_written_comes_back_in_order(tmp_path):
    writer = DetectionsWriter(tmp_path, shard_size=4, half=False)
    ids = [11, 5, 10, 2, 14, 3, 20]  # 5, 10 and 20 have no detections
    for i in ids:
        writer.add(detections_of(i), {"global": np.full(3, i, dtype=np.float32)})
    writer.flush()
    back = list(read_detections(tmp_path))
    assert [d.image_id for d, _ in back] == ids
    for (found, features), i in zip(back, ids, strict=True):
        wanted = detections_of(i)
        for name in ("boxes_xyxy", "scores", "class_indices", "embeddings"):
            if len(wanted):
                np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
        assert len(found) == len(wanted) and features["global"].tolist() == [i, i, i]


def test_sizes_of_images_come_back_where_all_are_known(tmp_path):
    for name, sizes in (("all", [(40, 30), (7, 9)]), ("some", [(40, 30), None])):
        writer = DetectionsWriter(tmp_path / name)
        for i, size in zip((11, 5), sizes, strict=True):
            writer.add(replace(detections_of(i), image_size=size), {})
        writer.flush()
        wanted = sizes if name == "all" else [None, None]
        for only_boxes in (False, True):
            assert [d.image_size for d, _ in read_detections(tmp_path / name, only_boxes)] == wanted


def test_boxes_alone_come_back_without_what_is_heavy(tmp_path):
    writer = DetectionsWriter(tmp_path, shard_size=2)
    for i in (14, 5, 3):
        writer.add(detections_of(i), {"global": np.full(3, i, dtype=np.float32)})
    writer.flush()
    for (found, features), i in zip(read_detections(tmp_path, only_boxes=True), (14, 5, 3), strict=True):
        wanted = detections_of(i)
        np.testing.assert_array_equal(found.boxes_xyxy, np.asarray(wanted.boxes_xyxy).reshape(-1, 4))
        np.testing.assert_array_equal(found.scores, wanted.scores)
        np.testing.assert_array_equal(found.class_indices, wanted.class_indices)
        assert found.embeddings.shape == (len(wanted), 0) and features == {}


def test_optional_fields_and_softmax_are_kept(tmp_path):
    probs = np.array([[0.1, 0.2, 0.7]], dtype=np.float32)
    one = Detections(
        1,
        np.array([[0.0, 0, 5, 5]]),
        np.array([0.2]),
        np.array([1]),
        np.ones((1, 2)),
        probs,
        np.array([2]),
        softmax=True,
    )
    writer = DetectionsWriter(tmp_path)
    writer.add(one, {})
    writer.flush()
    ((back, _),) = read_detections(tmp_path)
    np.testing.assert_array_equal(back.class_probs, probs)
    assert back.softmax and back.levels.tolist() == [2]


def test_a_resumed_writer_knows_what_is_there_and_goes_on(tmp_path):
    first = DetectionsWriter(tmp_path, shard_size=2)
    for i in (1, 2, 3):
        first.add(detections_of(i), {})
    second = DetectionsWriter(tmp_path, shard_size=2)
    assert second.done == {1, 2}, "the third was never flushed"
    second.add(detections_of(3), {})
    second.flush()
    assert [d.image_id for d, _ in read_detections(tmp_path)] == [1, 2, 3]


def test_an_empty_folder_holds_nothing(tmp_path):
    assert list(read_detections(tmp_path / "missing")) == []


def test_an_image_is_read_with_one_opening_of_its_shard(tmp_path, monkeypatch):
    """Images of a queue lie all over the shards; opening a file for each of five arrays took most of the time."""
    writer = DetectionsWriter(tmp_path, shard_size=4)
    ids = (14, 3, 11, 2, 15, 4)
    for i in ids:
        writer.add(replace(detections_of(i), image_size=(40, 30)), {})
    writer.flush()
    stored = StoredDetections(tmp_path)
    for i in (14, 15):  # where the arrays of a shard begin is read once
        stored.boxes_of(i)
        stored[ids.index(i)]
    opened, original, from_file = [], Path.open, np.fromfile

    def counting(path, *arguments, **options):
        opened.append(path.name)
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", counting)
    monkeypatch.setattr(np, "fromfile", lambda *given, **more: opened.append(given[0]) or from_file(*given, **more))
    for place, i in enumerate(ids):
        for found in (stored.boxes_of(i), stored[place]):
            assert found.image_id == i and found.scores.tolist() == detections_of(i).scores.tolist()
    assert len(opened) == 2 * len(ids), opened
