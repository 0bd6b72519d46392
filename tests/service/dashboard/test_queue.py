"""The queue in words: parts, pages, reasons and boxes."""

import pytest

from ppal_backend.rounds.detections_store import Box
from ppal_backend.service.dashboard.project import PoolImage, Query
from ppal_backend.service.dashboard.queue import ids_on, items_on, pages_of, parts_of, reason_of

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
    assert parts == [("query set", 1, 10, 1), ("candidates", 11, 40, 1), ("the rest", 41, 81, 4)]
    assert pages_of(query) == 7
    assert sum((ids_on(query, page) for page in range(1, 8)), ()) == query.queue


def test_an_item_knows_its_place_part_and_image(query):
    items = items_on(query, 4, LABELS, {302: PoolImage("/a/302.png", 40, 30)}, {}, 0.3)
    assert [(i.place, i.task_id, i.part) for i in items][3:5] == [(40, 229, "candidates"), (41, 300, "the rest")]
    assert items[6].task_id == 302 and items[6].image.width == 40 and items[5].image is None
    assert items[6].utility == 698.0


def test_the_reason_of_a_pick_names_classes_place_cluster_and_neighbour(query):
    assert reason_of(query, 101, LABELS) == (
        "Unsure about dog (3 boxes, 6.20) and cat (1 box, 2.80). Number 4 of 80 by uncertainty. "
        "Stands for 4 similar candidates. Of those before it, task 100 is nearest (50% alike)."
    )


@pytest.mark.parametrize(
    ("changes", "has", "has_not"),
    [
        ({"cluster_size": 1, "nearest_chosen": None}, "by uncertainty.", "Stands"),
        ({"cluster_size": 2}, "Stands for 1 similar candidate.", "candidates"),
        ({"classes": []}, "No box that the model is unsure about.", "Unsure about"),
        ({"nearest_chosen": -1}, "an image that is labelled is nearest (50% alike)", "task -1"),
        ({"nearest_similarity": None}, "task 100 is nearest.", "alike"),
    ],
)
def test_what_a_strategy_does_not_tell_is_left_out(query, changes, has, has_not):
    query.explanations[101] = why(**changes)
    said = reason_of(query, 101, LABELS)
    assert has in said and has_not not in said


def test_tasks_that_were_not_chosen_say_why_they_stand_behind(query):
    assert "like others that were chosen" in reason_of(query, 205, LABELS)
    assert "Less uncertain" in reason_of(query, 301, LABELS)
    assert "could not be read" in reason_of(query, 999, LABELS)


def test_a_random_queue_gives_no_other_reason():
    query = Query("random", (1,), (1, 2), (1, 2), {1: 0.0, 2: 0.0}, {1: why()})
    assert reason_of(query, 1, ()) == "Drawn at random: there was no model yet."


def test_boxes_below_the_threshold_are_drawn_only_where_they_count(query):
    rows = [Box((0.0, 0.0, 4.0, 4.0), 0, 0.9), Box((1.0, 1.0, 5.0, 5.0), 0, 0.1), Box((2.0, 3.0, 9.0, 8.0), 1, 0.2)]
    (item, *_) = items_on(query, 1, LABELS, {}, {100: rows}, 0.3)
    drawn = [(b.x, b.y, b.width, b.height, b.label, b.counts) for b in item.boxes]
    assert drawn == [(0.0, 0.0, 4.0, 4.0, "cat", False), (2.0, 3.0, 7.0, 5.0, "dog", True)]
