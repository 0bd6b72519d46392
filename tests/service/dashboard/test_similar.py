"""Images like some that people point at, on their page."""

import re

import pytest

from tests.rounds.fakes import detections_of

LEAST = 0.3


@pytest.fixture
def client(place):
    place.train(1)
    return place.app().test_client()


def seen():
    return [i for i in range(1000, 1030) if len(detections_of(i)) > 1]


def page_of(client, query):
    answer = client.get(f"/ui/projects/1/similar?{query}")
    assert answer.status_code == 200, answer.text
    return " ".join(answer.text.split())


def cards(page):
    """Tasks of the cards, first those that are looked for."""
    return [int(i) for i in re.findall(r'<article class="pick">.*?>Task (\d+)</a>', page)]


def test_a_card_leads_to_the_most_similar_images_and_they_can_be_pinned_together(place, client):
    asked = seen()[0]
    assert f'/ui/projects/1/similar?task={asked}"' in client.get("/ui/projects/1/queue?page=1").text + (
        client.get("/ui/projects/1/queue?page=2").text + client.get("/ui/projects/1/queue?page=3").text
    )
    page = page_of(client, f"task={asked}")
    found = cards(page)
    assert found[0] == asked and len(found) == len(set(found)) == len([i for i in range(1000, 1030) if i % 5])
    shares = [int(s) for s in re.findall(r'<span class="place">(\d+) %</span>', page)]
    assert shares == sorted(shares, reverse=True) and len(shares) == len(found) - 1
    token = re.search(r'name="token" value="([0-9a-f]{64})"', page)[1]
    client.post("/ui/projects/1/steer", data={"token": token, "do": "first", "task": found[1:4]})
    assert place.store.steering.of_project(1).first == tuple(found[1:4])


def test_one_box_of_a_card_is_compared_whatever_its_class(client):
    asked = seen()[0]
    whole, one = page_of(client, f"task={asked}"), page_of(client, f"task={asked}&amp;box=1".replace("&amp;", "&"))
    assert f"task={asked}&amp;box=1" in whole and "Objects compare with the chosen box" in one
    assert "class by class (CCMS)" in whole and cards(whole)[0] == cards(one)[0] == asked


def test_it_tells_whether_something_like_it_is_labelled_already(client):
    assert re.search(r"Nothing like this is labelled yet; the nearest is.*alike|Labelled already:.*alike",
                     page_of(client, f"task={seen()[0]}"))  # fmt: skip


def test_of_many_that_were_drawn_round_an_even_sample_is_looked_for(client):
    page = page_of(client, "&".join(f"task={i}" for i in range(1000, 1030)))
    assert "15 images are looked for, evenly; 15 are left out" in page and cards(page)[:2] == [1000, 1002]


@pytest.mark.parametrize(
    ("query", "status", "text"),
    [("", 404, "expected 1 to 20 images"), ("task=x", 404, "expected 1 to 20 images"),
     ("task=31337", 404, "expected objects there"), ("task=1001&box=99", 404, "expected this box"),
     ("task=1001&task=1002&box=0", 404, "a box of one")],
)  # fmt: skip
def test_what_cannot_be_looked_for_is_told(client, query, status, text):
    answer = client.get(f"/ui/projects/1/similar?{query}")
    assert answer.status_code == status and text in answer.text


def test_before_there_is_a_queue_it_says_so(place):
    answer = place.app().test_client().get("/ui/projects/1/similar?task=1")
    assert answer.status_code == 404 and "come with the first model" in answer.text
