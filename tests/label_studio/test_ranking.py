"""The ranking that a publish keeps aside: what is in it, and that its size does not stand in memory."""

import json
import tracemalloc

import pytest

from ppal_backend.label_studio.publish import QueueItem, Ranking, _Publish
from tests.label_studio.fake import FakeLabelStudio


def test_rows_come_back_in_order_as_often_as_asked():
    items = [QueueItem(7, [{"id": "é", "n": 1.5}]), QueueItem(3), QueueItem(5, [{"a": 1}, {"b": [2]}])]
    with Ranking(iter(items)) as ranking:
        for _ in range(2):
            assert [(i, json.loads(r)) for i, r in ranking.rows()] == [(i.task_id, list(i.result)) for i in items]
        assert ranking.task_ids == [7, 3, 5] and len(ranking) == 3


def test_the_digest_tells_another_order_and_another_number_of_boxes():
    def digest(*items):
        with Ranking(items) as ranking:
            return ranking.digest

    first = digest(QueueItem(1, [{}]), QueueItem(2))
    assert first == digest(QueueItem(1, [{"x": 1}]), QueueItem(2))
    assert first not in (digest(QueueItem(2), QueueItem(1, [{}])), digest(QueueItem(1), QueueItem(2, [{}])))


def test_a_task_ranked_twice_is_refused():
    with pytest.raises(ValueError, match="every task once"):
        Ranking([QueueItem(1), QueueItem(2), QueueItem(1)])


def test_memory_is_that_of_one_body_however_many_tasks():
    """4,000 tasks of 12 boxes are some 13 MB of JSON; bodies are of 1 MB."""

    def items():
        for task in range(4000):
            yield QueueItem(
                task, [{"id": f"{task}x{n}", "value": {"x": n * 1.25}, "pad": "p" * 230} for n in range(12)]
            )

    tracemalloc.start()
    with Ranking(items()) as ranking:
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        run = _Publish(FakeLabelStudio().client(), 1, "r1", ranking, None, 0.0, 1_000_000, True)
        sizes = [len(body) for body in run._bodies("ppal-r1-x")]
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(sizes) >= 13 and max(sizes) <= 1_000_000 and sum(sizes) > 13_000_000
    assert held < 1_500_000 and peak < 5_000_000
