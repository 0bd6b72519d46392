"""Boxes of a few images are those that reading everything gives."""

import pytest

from ppal_backend.rounds.detections_store import DetectionsWriter, read_boxes, read_detections, surest_classes
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
    assert surest_classes(tmp_path / "none") == {}
