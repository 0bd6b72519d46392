"""Publishing: all or nothing, in order, and after a kill in any state."""

from __future__ import annotations

import json
from itertools import pairwise

import httpx
import pytest

from ppal_backend.errors import LabelStudioUnavailable, PublishError
from ppal_backend.label_studio.publish import (
    END_OF_QUEUE,
    LabelStudioPublisher,
    QueueItem,
    delete_version,
    front_of,
    prune_versions,
    publish,
    queue_scores,
)
from ppal_backend.rounds.ports import QueueEntry
from tests.label_studio.fake import FakeLabelStudio
from tests.place import CONFIG
from tests.rounds.fakes import SPEC

ORDER = (3, 1, 5, 2, 4)
ITEMS = [QueueItem(i) for i in ORDER]


class Killed(BaseException):
    """A kill -9: nothing after it runs."""


def kill_after(count, states):
    """An ``on_state`` that stores states and kills the process when the given number is stored."""

    def store(state):
        states.append(json.loads(json.dumps(state)))
        if len(states) == count:
            raise Killed

    return store


def one_prediction_each(fake):
    pairs = [(p["task"], p["model_version"]) for p in fake.predictions]
    return len(pairs) == len(set(pairs))


def test_published_order_is_the_served_order():
    fake, states = FakeLabelStudio(), []
    result = publish(fake.client(), 1, "r1", ITEMS, on_state=states.append)
    assert fake.served() == list(ORDER)
    assert fake.project["model_version"] == result.version
    assert fake.project["sampling"] == "Uncertainty sampling"
    assert result.created == 5
    assert result.version.startswith("ppal-r1-")
    assert [p["score"] for p in fake.predictions] == [1e-10, 2e-10, 3e-10, 4e-10, 5e-10]
    assert [s["state"] for s in states] == ["importing", "imported", "activating", "done"]
    assert fake.paths("POST") == ["/api/projects/1/import/predictions"]
    assert fake.paths("PATCH") == ["/api/projects/1/"]


def test_boxes_travel_and_versions_differ_between_attempts():
    fake = FakeLabelStudio()
    box = {"id": "a", "score": 0.5}
    first = publish(fake.client(), 1, "ppal-x", [QueueItem(1, [box])])
    second = publish(fake.client(), 1, "ppal-x", [QueueItem(1, [box])])
    assert fake.predictions[0]["result"] == [box]
    assert first.version != second.version
    assert first.version.startswith("ppal-x-")


def test_an_empty_ranking_changes_nothing():
    fake = FakeLabelStudio()
    assert publish(fake.client(), 1, "r1", []).version is None
    assert fake.requests == []


def test_a_task_ranked_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        publish(FakeLabelStudio().client(), 1, "r1", [QueueItem(1), QueueItem(1)])


def test_dropped_items_leave_the_queue_as_it_was():
    fake = FakeLabelStudio()
    before = publish(fake.client(), 1, "r1", ITEMS).version
    fake.drop = lambda item: item["task"] == 5
    with pytest.raises(PublishError, match="store 5 predictions, got 4"):
        publish(fake.client(), 1, "r2", [QueueItem(i) for i in (1, 2, 3, 4, 5)])
    assert fake.project["model_version"] == before
    assert fake.served() == list(ORDER)
    assert list(fake.counts()) == [before]


def test_an_import_that_raises_ends_as_one_that_drops(caplog):
    """With prediction validation switched on Label Studio refuses the whole request instead of leaving items out."""
    fake = FakeLabelStudio()
    before = publish(fake.client(), 1, "r1", ITEMS).version
    errors = {"detail": "Validation error", "validation_errors": {"non_field_errors": ["Prediction 4: unknown label"]}}
    fake.fault = lambda request: (
        httpx.Response(400, json=errors) if request.url.path.endswith("/import/predictions") else None
    )
    with pytest.raises(
        PublishError, match=r"store 5 predictions, got 0; it answered: .*unknown label.*as it was before"
    ):
        publish(fake.client(), 1, "r2", [QueueItem(i) for i in (1, 2, 3, 4, 5)])
    assert fake.project["model_version"] == before and fake.served() == list(ORDER)
    assert list(fake.counts()) == [before]


def test_a_live_backends_title_survives_the_removal_of_a_failed_version():
    fake = FakeLabelStudio()
    fake.project["model_version"] = "Live backend"
    fake.drop = lambda item: True
    with pytest.raises(PublishError):
        publish(fake.client(), 1, "r1", ITEMS)
    assert fake.project["model_version"] == "Live backend"


def test_deleted_tasks_are_left_out_and_told():
    fake = FakeLabelStudio()
    del fake.tasks[5]
    result = publish(fake.client(), 1, "r1", ITEMS)
    assert fake.served() == [3, 1, 2, 4]
    assert (result.gone_task_ids, result.created) == ((5,), 4)


def test_tasks_deleted_all_the_time_end_in_an_error():
    fake = FakeLabelStudio()

    def fault(request):
        if request.url.path.endswith("/import/predictions"):
            fake.tasks.pop(max(fake.tasks))
        return None

    fake.fault = fault
    with pytest.raises(PublishError, match="invalid task"):
        publish(fake.client(), 1, "r1", ITEMS)
    assert fake.project["model_version"] == ""


def test_refused_version_is_removed_and_the_queue_stays():
    fake = FakeLabelStudio()
    before = publish(fake.client(), 1, "r1", ITEMS).version
    fake.fault = lambda request: httpx.Response(400, json={"detail": "no"}) if request.method == "PATCH" else None
    with pytest.raises(PublishError, match="refusal"):
        publish(fake.client(), 1, "r2", ITEMS)
    assert (fake.project["model_version"], list(fake.counts())) == (before, [before])


def test_a_lost_answer_is_read_back_not_sent_again():
    fake = FakeLabelStudio()

    def lose(request, response):
        if request.url.path.endswith("/import/predictions"):
            raise httpx.ReadTimeout("slow", request=request)
        return response

    fake.after = lose
    publish(fake.client(), 1, "r1", ITEMS)
    assert fake.paths("POST") == ["/api/projects/1/import/predictions"]
    assert fake.served() == list(ORDER)


def test_half_an_import_before_an_error_is_removed_whole_and_sent_again():
    fake, left = FakeLabelStudio(), [1]

    def fault(request):
        if request.url.path.endswith("/import/predictions") and left[0]:
            left[0] -= 1
            fake.predictions += json.loads(request.content)[:2]
            return httpx.Response(500)
        return None

    fake.fault = fault
    publish(fake.client(), 1, "r1", ITEMS)
    assert fake.served() == list(ORDER)
    assert list(fake.counts().values()) == [5]


def test_an_import_stored_twice_is_not_published():
    fake, left = FakeLabelStudio(), [1]

    def double(request, response):
        if request.url.path.endswith("/import/predictions") and left[0]:
            left[0] -= 1
            fake.predictions += json.loads(request.content)
        return response

    fake.after = double
    with pytest.raises(PublishError, match="got 10"):
        publish(fake.client(), 1, "r1", ITEMS)
    assert fake.predictions == []


def test_down_for_good_is_unavailable_and_keeps_the_state():
    fake, states = FakeLabelStudio(), []
    fake.fault = lambda request: httpx.Response(503)
    with pytest.raises(LabelStudioUnavailable):
        publish(fake.client(tries=2), 1, "r1", ITEMS, on_state=states.append)
    assert [s["state"] for s in states] == ["importing"]
    fake.fault = lambda request: None
    publish(fake.client(), 1, "r1", ITEMS, resume_state=states[-1], settle_s=4)
    assert fake.served() == list(ORDER)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_killed_in_each_state_then_resumed(count):
    fake, states = FakeLabelStudio(), []
    with pytest.raises(Killed):
        publish(fake.client(), 1, "r1", ITEMS, on_state=kill_after(count, states))
    result = publish(fake.client(), 1, "r1", ITEMS, resume_state=states[-1], on_state=states.append, settle_s=4)
    assert fake.served() == list(ORDER)
    assert one_prediction_each(fake)
    assert list(fake.counts()) == [result.version]
    assert states[-1]["state"] == "done"
    assert len([p for p in fake.paths("POST") if "import" in p]) == 1


def test_killed_while_the_import_still_runs_waits_for_it():
    fake, states = FakeLabelStudio(), []
    with pytest.raises(Killed):
        publish(fake.client(), 1, "r1", ITEMS, on_state=kill_after(1, states))
    version, looks = states[-1]["version"], [0]
    rows = [{"task": i, "result": [], "score": n / 5, "model_version": version} for n, i in enumerate(ORDER)]

    def arrive(request):
        if request.url.path.endswith("/model-versions") and request.method == "GET":
            looks[0] += 1
            if looks[0] == 3:
                fake.predictions += rows
        return None

    fake.fault = arrive
    assert publish(fake.client(), 1, "r1", ITEMS, resume_state=states[-1], settle_s=20).version == version
    assert fake.paths("POST") == []


def test_killed_with_half_an_import_starts_a_fresh_version():
    fake, states = FakeLabelStudio(), []
    with pytest.raises(Killed):
        publish(fake.client(), 1, "r1", ITEMS, on_state=kill_after(1, states))
    version = states[-1]["version"]
    fake.predictions = [{"task": i, "result": [], "score": 0.1, "model_version": version} for i in (3, 1)]
    result = publish(fake.client(), 1, "r1", ITEMS, resume_state=states[-1], on_state=states.append, settle_s=4)
    assert result.version != version
    assert list(fake.counts()) == [result.version]
    assert version in states[-1]["abandoned"]


def test_killed_between_the_effect_of_the_patch_and_its_note():
    fake, states = FakeLabelStudio(), []
    with pytest.raises(Killed):
        publish(fake.client(), 1, "r1", ITEMS, on_state=kill_after(3, states))
    fake.project.update(model_version=states[-1]["version"], sampling="Uncertainty sampling")
    result = publish(fake.client(), 1, "r1", ITEMS, resume_state=states[-1])
    assert result.version == states[-1]["version"]
    assert fake.paths("POST") == ["/api/projects/1/import/predictions"]


def test_state_of_another_ranking_is_not_reused():
    fake, states = FakeLabelStudio(), []
    with pytest.raises(Killed):
        publish(fake.client(), 1, "r1", ITEMS, on_state=kill_after(2, states))
    result = publish(fake.client(), 1, "r1", ITEMS[::-1], resume_state=states[-1], settle_s=2)
    assert fake.served() == list(reversed(ORDER))
    assert list(fake.counts()) == [result.version]


@pytest.mark.parametrize("keep", [1, 3])
def test_a_finished_publish_is_believed_only_while_its_version_is_in_force(keep):
    """Somebody went back to another version before the round had noted that it was published."""
    fake, states = FakeLabelStudio(), []
    first = publish(fake.client(), 1, "r1", ITEMS, on_state=states.append).version
    other = publish(fake.client(), 1, "r2", ITEMS[::-1], keep=keep).version
    assert fake.project["model_version"] == other and (first in fake.counts()) is (keep == 3)
    again = publish(fake.client(), 1, "r1", ITEMS, resume_state=states[-1], keep=keep)
    assert fake.project["model_version"] == again.version and fake.served() == list(ORDER)
    assert (again.version == first) is (keep == 3), "it is imported again only where it is gone"
    assert one_prediction_each(fake)


def test_nonsense_state_is_refused():
    with pytest.raises(PublishError, match="reported by publish"):
        publish(FakeLabelStudio().client(), 1, "r1", ITEMS, resume_state={"version": "other", "state": "imported"})


def test_gone_tasks_are_remembered_over_a_kill():
    fake, states = FakeLabelStudio(), []
    del fake.tasks[5]
    with pytest.raises(Killed):
        publish(fake.client(), 1, "r1", ITEMS, on_state=kill_after(3, states))
    assert states[-1]["gone"] == [5]
    result = publish(fake.client(), 1, "r1", ITEMS, resume_state=states[-1])
    assert (result.version, result.gone_task_ids, result.created) == (states[-1]["version"], (5,), 4)


def test_large_bodies_are_split_into_as_few_as_fit():
    fake = FakeLabelStudio(tasks=40)
    items = [QueueItem(i, [{"id": "x" * 50}]) for i in range(40, 0, -1)]
    publish(fake.client(), 1, "r1", items, max_body_bytes=3000)
    bodies = [r.content for r in fake.requests if r.url.path.endswith("/import/predictions")]
    assert all(len(body) <= 3000 for body in bodies)
    total = sum(len(json.dumps(row, separators=(",", ":"))) + 1 for body in bodies for row in json.loads(body))
    assert len(bodies) == -(-total // 2900)
    assert fake.served() == list(range(40, 0, -1))


def limited(fake, limit):
    """A proxy before Label Studio that takes no larger bodies."""

    def fault(request):
        if request.url.path.endswith("/import/predictions") and len(request.content) > limit:
            return httpx.Response(413, html="<html>413 Request Entity Too Large</html>")
        return None

    fake.fault = fault


def test_one_task_that_is_too_large_ends_it():
    fake = FakeLabelStudio(tasks=4)
    limited(fake, 100_000)
    items = [QueueItem(1, [{"id": "x" * 300_000}]), *(QueueItem(i) for i in (2, 3, 4))]
    with pytest.raises(PublishError, match="status 413"):
        publish(fake.client(), 1, "r1", items)
    assert fake.counts() == {}


@pytest.mark.parametrize("limit", [150_000, 1_000_000])
def test_a_proxy_that_takes_small_bodies_only_gets_smaller_ones(limit):
    """An ingress takes 1 MB unless told otherwise: no queue of some hundred images with boxes was ever published."""
    fake = FakeLabelStudio(tasks=40)
    limited(fake, limit)
    items = [QueueItem(i, [{"id": "x" * 30_000}, {"id": "y" * 30_000}]) for i in range(40, 0, -1)]
    before = publish(fake.client(), 1, "r0", [QueueItem(1)]).version
    result = publish(fake.client(), 1, "r1", items)
    assert fake.served() == list(range(40, 0, -1)) and fake.counts() == {before: 1, result.version: 40}


def test_a_proxy_that_takes_not_even_one_task_is_told_with_what_to_do():
    fake = FakeLabelStudio(tasks=4)
    limited(fake, 50)
    with pytest.raises(PublishError, match=r"store 4 predictions, got 0.*status 413.*raise its limit.*client_max_body"):
        publish(fake.client(), 1, "r1", [QueueItem(i) for i in (1, 2, 3, 4)])
    assert fake.counts() == {} and len(fake.paths("POST")) < 6


def test_prune_keeps_the_last_three_the_active_one_and_other_peoples():
    fake = FakeLabelStudio()
    versions = [publish(fake.client(), 1, f"r{i}", ITEMS, keep=None).version for i in range(5)]
    fake.predictions.insert(0, {"task": 1, "result": [], "score": 0.1, "model_version": "theirs"})
    fake.project["model_version"] = versions[0]
    pruned = prune_versions(fake.client(), 1, keep=3)
    assert pruned == [versions[1]]
    assert set(fake.counts()) == {"theirs", versions[0], *versions[2:]}
    assert fake.project["model_version"] == versions[0]


def test_publish_prunes_by_itself_and_survives_a_failure_of_that():
    fake = FakeLabelStudio()
    versions = [publish(fake.client(), 1, f"r{i}", ITEMS).version for i in range(4)]
    assert set(fake.counts()) == set(versions[1:])
    fake.fault = lambda request: httpx.Response(500) if request.method == "DELETE" else None
    last = publish(fake.client(tries=1), 1, "r5", ITEMS)
    assert last.pruned == ()
    assert fake.project["model_version"] == last.version


def test_the_active_version_cannot_be_deleted():
    fake = FakeLabelStudio()
    version = publish(fake.client(), 1, "r1", ITEMS).version
    with pytest.raises(PublishError, match="active"):
        delete_version(fake.client(), 1, version)


def test_scores_rise_strictly_for_huge_pools():
    scores = queue_scores(200_000)
    assert scores[0] > 0.0
    assert scores[-1] < 1.0
    assert all(a < b for a, b in pairwise(scores))
    assert queue_scores(0) == []


@pytest.mark.parametrize("count", [1, 24, 5000, 400_000, 600_000])
def test_no_place_in_the_queue_reads_as_a_confidence(count):
    """Label Studio shows a prediction's score as a percentage with two decimals, and beside a task nothing else."""
    scores = queue_scores(count)
    assert {f"{100 * score:.2f}%" for score in scores} == {"0.00%"}
    assert f"{100 * END_OF_QUEUE:.2f}%" == "0.00%" and scores[-1] < END_OF_QUEUE
    assert scores[0] > 0.0 and all(a < b for a, b in pairwise(json.loads(json.dumps(scores))))
    if count <= 400_000:
        assert [round(score * 1e10) for score in scores] == list(range(1, count + 1)), "the place can be worked out"


@pytest.mark.parametrize(
    ("ranked", "most", "budget", "front"),
    [(200_000, 5_000, 50, 5_000), (3_000, 5_000, 50, 3_000), (200_000, 5_000, 2_000, 8_000), (200_000, 0, 50, 200_000),
     (0, 5_000, 50, 0), (100, 5_000, 2_000, 100)],
)  # fmt: skip
def test_the_front_holds_four_query_sets_at_least_and_never_more_than_there_are(ranked, most, budget, front):
    assert front_of(ranked, most, budget) == front


def test_of_a_long_queue_the_front_is_published_in_its_order_and_nothing_else_is_read():
    """Label Studio took 170 s to delete the predictions of 20,000 tasks, of which a few thousand are ever served."""
    fake, states, read = FakeLabelStudio(tasks=60), [], []

    class Queue(list):
        def __iter__(self):
            for entry in super().__iter__():
                read.append(entry.task_id)
                yield entry

    order = [*range(60, 30, -1), *range(1, 31)]
    fake.project["label_config"] = CONFIG
    publisher = LabelStudioPublisher(fake.client(), most=SPEC.budget)
    queue = Queue(QueueEntry(task, None) for task in order)
    version = publisher.publish(SPEC, None, queue, None, states.append)
    front = 4 * SPEC.budget
    assert 0 < front < 60 and fake.served() == order[:front] == read
    assert fake.counts() == {version: front} and states[-1]["expected"] == front
    assert publisher.publish(SPEC, None, queue, states[-1], states.append) == version, "what is there is not sent again"
    assert fake.counts() == {version: front}


def test_all_of_it_is_published_when_no_front_is_asked_for():
    fake = FakeLabelStudio(tasks=60)
    fake.project["label_config"] = CONFIG
    queue = [QueueEntry(task, None) for task in range(60, 0, -1)]
    LabelStudioPublisher(fake.client()).publish(SPEC, None, queue, None, lambda state: None)
    assert fake.served() == list(range(60, 0, -1))
