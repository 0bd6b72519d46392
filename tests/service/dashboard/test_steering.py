"""Buttons that steer the queue, and what the page then says."""

import re

import pytest

from ppal_backend.structures.steering import Quota


@pytest.fixture
def client(place):
    place.train(1)
    return place.app().test_client()


def page_of(client, query=""):
    answer = client.get(f"/ui/projects/1/queue{query}")
    assert answer.status_code == 200
    return " ".join(answer.text.split())


def press(client, follow=True, **fields):
    token = re.search(r'name="token" value="([0-9a-f]{64})"', client.get("/ui/projects/1/queue").text)[1]
    return client.post("/ui/projects/1/steer", data={"token": token, **fields}, follow_redirects=follow)


def card(page, task_id):
    (found,) = [c for c in re.findall(r'<article class="pick">.*?</article>', page) if f"Task {task_id}<" in c]
    return found


def test_label_next_on_a_card_puts_the_task_in_front_and_can_be_taken_back(place, client):
    last = place.store.versions.of_project(1)[0]
    task_id = 1029 if "Task 1029<" in page_of(client) else 1000
    assert last.active and "Label next" in card(page_of(client), task_id)
    answer = press(client, do="first", task=task_id, page=1)
    page = " ".join(answer.text.split())
    assert answer.status_code == 200 and "Kept. The queue comes in its new order" in page
    assert "1 pinned, 0 quotas" in page and "with the next order" in page and "round 2, which is asked for" in page
    assert place.jobs.synced == [1] and ">label next<" in card(page, task_id)
    place.run()
    page = page_of(client)
    assert "Pinned: somebody wants it labelled next." in card(page, task_id)
    assert '<span class="place">1</span>' in card(page, task_id) and "with the next order" not in page
    press(client, do="unpin", task=task_id)
    assert place.store.steering.of_project(1).first == ()


def test_not_this_one_takes_a_task_to_the_end(place, client):
    press(client, do="last", task=[1003, 1004])
    place.run()
    assert place.label_studio.project["model_version"] in place.versions()
    page = page_of(client, "?page=3")
    assert page.index("Task 1003<") < page.index("Task 1004<")
    assert page.count("Put at the end by hand.") == 2 and card(page, 1004).count('<span class="place">30</span>') == 1


def test_a_quota_is_kept_told_and_taken_back(place, client):
    page = press(client, do="quota", share="80", kind="label", what="cat").text
    assert "at least 80 % with cat" in page
    place.run()
    page = page_of(client)
    reached = re.search(r"at least 80 % with cat: <b[^>]*>(\d) of 4</b>", page)
    assert reached and int(reached[1]) >= 4
    assert "quota: at least 80 % with cat." in page, "the reasons of the picks"
    (quota,) = place.store.steering.of_project(1).quotas
    assert quota == Quota("label", "cat", 0.8, "", quota.id)
    press(client, do="unquota", quota=quota.id)
    assert place.store.steering.of_project(1).quotas == ()


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"do": "quota", "share": "0", "kind": "label", "what": "cat"}, 404, "between 0 and 100 %"),
        ({"do": "quota", "share": "9", "kind": "label", "what": "<b>wolf"}, 404, "&lt;b&gt;wolf"),
        ({"do": "first"}, 404, "expected ids of tasks"),
        ({"do": "first", "task": "x"}, 404, "expected ids of tasks"),
        ({"do": "unquota", "quota": "7"}, 404, "has no quota 7"),
        ({"do": "dance"}, 400, "what to do with the queue"),
        ({}, 400, "what to do with the queue"),
    ],
)
def test_what_cannot_be_asked_is_told_and_changes_nothing(place, client, fields, status, text):
    answer = press(client, **fields)
    assert answer.status_code == status and text in answer.text
    assert place.store.rounds.last(1).number == 1


def test_only_a_page_of_this_backend_steers(place, client):
    answer = client.post("/ui/projects/1/steer", data={"token": "0" * 64, "do": "first", "task": 1000})
    assert answer.status_code == 403 and place.store.steering.of_project(1).first == ()
