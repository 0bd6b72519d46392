"""Labels at boxes: inside the image, over no other label, the important ones first."""

import random

import pytest

from ppal_backend.service.dashboard.drawing import LETTER_SHARE, colours_of, place_labels


def area(place, text):
    return (place.x, place.y - place.font_px, place.x + len(text) * place.font_px * LETTER_SHARE, place.y)


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_a_label_stands_above_its_box_or_within_its_edge_at_the_top():
    above, within = place_labels([(100, 100, 200, 200), (300, 2, 400, 90)], ["cat", "dog"], 480, 360)
    assert above.font_px == 20.0 and above.x == 100 and above.y < 100
    assert within.x == 300 and 2 < within.y < 90


def test_a_label_at_the_right_edge_moves_left_and_one_wider_than_the_image_is_left_out():
    (moved,) = place_labels([(470, 100, 480, 200)], ["jellyfish"], 480, 360)
    assert area(moved, "jellyfish")[2] <= 480
    assert place_labels([(0, 50, 9, 60)], ["x" * 99], 480, 360) == [None]


def test_the_most_important_box_gets_its_label_where_there_is_room_for_few():
    same = [(100.0, 100.0, 140.0, 140.0)] * 5
    places = place_labels(same, ["dog"] * 5, 480, 360)
    assert places[0] is not None and places[-1] is None and sum(p is not None for p in places) == 3


def test_boxes_without_a_text_get_no_label_and_take_no_room():
    assert place_labels([(100, 100, 200, 200)] * 2, ["", "dog"], 480, 360)[0] is None


@pytest.mark.parametrize("seed", range(5))
def test_labels_never_overlap_nor_leave_the_image(seed):
    rng = random.Random(seed)
    boxes, texts = [], []
    for _ in range(30):
        x, y = rng.uniform(-5, 630), rng.uniform(-5, 470)
        boxes.append((x, y, x + rng.uniform(1, 200), y + rng.uniform(1, 200)))
        texts.append("n" * rng.randint(1, 12))
    areas = [area(p, t) for p, t in zip(place_labels(boxes, texts, 640, 480), texts, strict=True) if p]
    assert len(areas) >= 8
    for number, one in enumerate(areas):
        assert one[0] >= 0 and one[1] >= -0.1 and one[2] <= 640.1 and one[3] <= 480.1
        assert not any(overlap(one, other) for other in areas[:number])


def test_the_classes_of_a_page_have_colours_of_their_own():
    found = colours_of([40, 7, 7, 300, *range(50, 59)])
    assert found[7] == 0 and found[40] == 1 and found[300] == 11 and len(set(found.values())) == 12
    assert colours_of(range(13))[12] == 0, "the thirteenth shares one"
