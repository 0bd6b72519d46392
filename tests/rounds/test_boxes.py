"""Boxes of a few images are those that reading everything gives."""

from dataclasses import replace

import numpy as np
import pytest

from ppal_backend.rounds.detections_store import (
    DetectionsWriter,
    _Shard,
    least_sure,
    objects_by_shard,
    read_boxes,
    read_detections,
    surest_classes,
)
from tests.rounds.fakes import detections_of


@pytest.fixture
def folder(tmp_path):
    writer = DetectionsWriter(tmp_path / "detections", shard_size=4)
    for image_id in range(100, 111):
        writer.add(detections_of(image_id), {})
    writer.flush()
    return tmp_path / "detections"


@pytest.mark.parametrize("wanted", [[100], [103, 104], [110, 101, 107], list(range(100, 111))])
def test_they_are_the_rows_that_were_written(folder, wanted):
    found = read_boxes(folder, wanted)
    assert sorted(found) == sorted(wanted)
    for detections, _ in read_detections(folder):
        if detections.image_id in found:
            boxes = found[detections.image_id]
            assert [list(b.box_xyxy) for b in boxes] == detections.boxes_xyxy.tolist()
            assert [b.class_index for b in boxes] == detections.class_indices.tolist()
            assert [b.score for b in boxes] == detections.scores.tolist()
    assert sum(map(len, found.values())) == sum(i % 5 for i in wanted)


def test_unknown_images_and_a_missing_folder_give_nothing(folder, tmp_path):
    assert read_boxes(folder, [7]) == {} and read_boxes(tmp_path / "none", [100]) == {}


def test_the_surest_class_of_every_image_that_has_a_box(tmp_path):
    writer = DetectionsWriter(tmp_path, shard_size=4)
    wanted = {}
    for image_id in range(100, 130):
        found = detections_of(image_id)
        writer.add(found, {})
        if len(found):
            best = int(found.scores.argmax())
            wanted[image_id] = (int(found.class_indices[best]), float(found.scores[best]))
    writer.flush()
    assert surest_classes(tmp_path) == wanted and 0 < len(wanted) < 30
    few = set(list(wanted)[::5])
    assert surest_classes(tmp_path, few) == {i: wanted[i] for i in few}
    assert surest_classes(tmp_path / "none") == {}


def test_of_an_image_that_was_looked_at_again_the_last_time_counts(tmp_path):
    writer = DetectionsWriter(tmp_path, shard_size=2)
    for image_id, boxes_of in ((103, 103), (104, 104), (102, 102), (101, 101), (103, 101), (104, 100)):
        writer.add(replace(detections_of(boxes_of), image_id=image_id), {})
    writer.flush()
    assert len(detections_of(101)) == 1 and not len(detections_of(100))
    assert {i: len(boxes) for i, boxes in read_boxes(tmp_path, [103, 104, 102]).items()} == {102: 2, 103: 1, 104: 0}
    assert {i: len(boxes) for i, boxes in read_boxes(tmp_path, [103]).items()} == {103: 1}
    last = float(detections_of(101).scores[0])
    assert surest_classes(tmp_path).keys() == {101, 102, 103} and surest_classes(tmp_path)[103][1] == last
    ids, least = least_sure(tmp_path, [0.0] * 3)
    assert sorted(ids.tolist()) == [101, 102, 103] and least[ids.tolist().index(103)] == last
    shards = list(objects_by_shard(tmp_path, 0.0))
    assert sorted(i for shard in shards for i in shard.image_ids.tolist()) == [101, 102, 103, 104]
    assert sum(len(shard.rows) for shard in shards) == 1 + 2 + 1


def test_a_folder_that_grew_is_read_anew(tmp_path):
    writer = DetectionsWriter(tmp_path, shard_size=1)
    writer.add(detections_of(102), {})
    assert list(read_boxes(tmp_path, [102, 103])) == [102]
    writer.add(detections_of(103), {})
    assert sorted(read_boxes(tmp_path, [102, 103])) == [102, 103]


def test_time_follows_what_is_asked_for_not_the_folder(folder, monkeypatch):
    read_boxes(folder, [110])
    opened: list[str] = []
    monkeypatch.setattr(np, "load", lambda path, **_: opened.append(str(path)))
    monkeypatch.setattr(_Shard, "__init__", lambda self, path: opened.append(str(path)))
    assert len(read_boxes(folder, [110])[110]) == len(detections_of(110)) and not opened
