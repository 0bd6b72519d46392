"""The queue in words: parts, pages, reasons and boxes."""

import pytest

from ppal_backend.rounds.detections_store import Box
from ppal_backend.service.dashboard.project import PoolImage, Query
from ppal_backend.service.dashboard.queue import ids_on, items_on, pages_of, parts_of, reason_of, without

LABELS = ("cat", "dog")


def why(rank=0, **changes):
    return {
        "rank": rank,
        "utility": 9.0,
        "utility_rank": 3,
        "classes": [
            {"class_index": 1, "boxes": 3, "contribution": 6.2},
            {"class_index": 0, "boxes": 1, "contribution": 2.8},
        ],
        "boxes": [{"box_index": 2}],
        "cluster_size": 5,
        "nearest_chosen": 100,
        "nearest_similarity": 1.0,
    } | changes


@pytest.fixture
def query():
    queue = (*range(100, 110), *range(200, 230), *range(300, 340), 999)
    utilities = {i: float(1000 - i) for i in queue if i != 999}
    explanations = {i: why() for i in range(100, 110)}
    return Query("ppal", queue[:10], (*range(200, 230), *range(100, 110)), queue, utilities, explanations)


def test_parts_and_pages_cover_the_queue_once(query):
    parts = [(p.name, p.first, p.last, p.page) for p in parts_of(query)]
    assert parts == [("next to label", 1, 10, 1), ("also worth it", 11, 40, 1), ("the rest", 41, 81, 4)]
    assert pages_of(query) == 7
    assert sum((ids_on(query, page) for page in range(1, 8)), ()) == query.queue


def test_an_item_knows_its_place_part_and_image(query):
    items = items_on(query, 4, LABELS, {302: PoolImage("/a/302.png", 40, 30)}, {}, 0.3)
    assert [(i.place, i.task_id, i.part) for i in items][3:5] == [(40, 229, "also worth it"), (41, 300, "the rest")]
    assert items[6].task_id == 302 and items[6].image.width == 40 and items[5].image is None
    assert items[6].numbers.utility == 698.0


def test_the_reason_of_a_pick_tells_neighbour_doubt_and_whom_it_stands_for(query):
    assert reason_of(query, 101, LABELS) == (
        "Unlike what comes before it (nearest: task 100, 50 % alike). Not sure of dog and cat. "
        "Stands for 4 similar images."
    )


def torn(share, second=1, **changes):
    return why(boxes=[{"box_index": 2, "class_index": 0, "second_class": second, "second_share": share}], **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cluster_size": 1, "nearest_chosen": None}, "Not sure of dog and cat."),
        ({"cluster_size": 2, "nearest_chosen": None}, "Not sure of dog and cat. Stands for 1 similar image."),
        ({"classes": [], "cluster_size": None}, "Unlike what comes before it (nearest: task 100, 50 % alike)."),
        ({"classes": [], "cluster_size": 1, "nearest_chosen": None}, "The model is unsure of this image as a whole."),
        (
            {"nearest_chosen": 64, "nearest_similarity": 1.68, "cluster_size": 1, "classes": []},
            "Unlike what is labelled (nearest: task 64, 84 % alike).",
        ),
        (
            {"nearest_chosen": -1, "nearest_similarity": 1.9, "cluster_size": 1, "classes": []},
            "Adds to what is labelled (nearest: a labelled image, 95 % alike).",
        ),
        (
            {"nearest_similarity": None, "cluster_size": 1, "classes": []},
            "Unlike what comes before it (nearest: task 100).",
        ),
    ],
)
def test_what_a_strategy_does_not_tell_is_left_out(query, changes, said):
    query.explanations[101] = why(**changes)
    assert reason_of(query, 101, LABELS) == said


@pytest.mark.parametrize(
    ("explained", "said"),
    [
        (torn(0.3), "Not sure: cat or dog."),
        (torn(0.29), "Not sure of dog and cat."),
        (torn(1.0, second=7), "Not sure of dog and cat."),
        (torn(None, second=None), "Not sure of dog and cat."),
    ],
)
def test_two_classes_that_the_model_confuses_are_named(query, explained, said):
    query.explanations[101] = explained | {"cluster_size": 1, "nearest_chosen": None}
    assert reason_of(query, 101, LABELS) == said


def test_no_reason_holds_a_place_by_uncertainty_or_a_number_of_boxes(query):
    query.explanations[101] = why(classes=[{"class_index": 1, "boxes": 100, "contribution": 61.2}])
    said = reason_of(query, 101, LABELS)
    assert "100" not in said.replace("task 100", "") and "61" not in said and "by uncertainty" not in said


def test_numbers_have_a_scale(query):
    (item, *_) = items_on(query, 1, LABELS, {}, {}, 0.3)
    numbers = item.numbers
    assert numbers.utility == 900.0 and numbers.above == 79 / 80 and numbers.of_highest == 1.0
    assert [(label, round(share, 2)) for label, share in numbers.classes] == [("dog", 0.69), ("cat", 0.31)]
    assert numbers.alike == 0.5
    last = items_on(query, 7, LABELS, {}, {}, 0.3)
    assert last[-1].numbers is None, "nobody looked at it"
    assert last[-2].numbers.above == 0.0 and last[-2].numbers.classes == []


def test_what_is_labelled_leaves_the_queue_and_places_stay(query):
    left = without(query, {100, 101, 205, 999})
    assert [(p.name, p.first, p.last) for p in parts_of(left)] == [
        ("next to label", 1, 8), ("also worth it", 9, 37), ("the rest", 38, 77),
    ]  # fmt: skip
    items = items_on(query, 1, LABELS, {}, {}, 0.3, left=left)
    assert [(i.place, i.task_id) for i in items][:2] == [(3, 102), (4, 103)] and len(items) == 12
    assert items[8].task_id == 200 and items[8].part == "also worth it" and items[8].place == 11


def test_tasks_that_were_not_chosen_say_why_they_stand_behind(query):
    assert "images like it come before" in reason_of(query, 205, LABELS)
    assert "surer here" in reason_of(query, 301, LABELS)
    assert "could not be read" in reason_of(query, 999, LABELS)


def test_a_random_queue_gives_no_other_reason():
    query = Query("random", (1,), (1, 2), (1, 2), {1: 0.0, 2: 0.0}, {1: why()})
    assert reason_of(query, 1, ()) == "Drawn at random: there was no model yet."


def test_boxes_below_the_threshold_are_drawn_only_where_they_count(query):
    rows = [Box((0.0, 0.0, 4.0, 4.0), 0, 0.9), Box((1.0, 1.0, 5.0, 5.0), 0, 0.1), Box((2.0, 3.0, 9.0, 8.0), 1, 0.2)]
    (item, *_) = items_on(query, 1, LABELS, {}, {100: rows}, 0.3)
    drawn = [(b.x, b.y, b.width, b.height, b.label, b.counts) for b in item.boxes]
    assert drawn == [(0.0, 0.0, 4.0, 4.0, "cat", False), (2.0, 3.0, 7.0, 5.0, "dog", True)]
