"""The first page at a glance, and the page of all projects with its Connect."""

import html
import re

import pytest
from pydantic import SecretStr

from ppal_backend.operations import control
from ppal_backend.service.dashboard.now import (
    ClassCount,
    Pace,
    balance_in_words,
    class_counts,
    paces,
    quality_in_words,
)
from ppal_backend.service.dashboard.views import EXTENSION, Actions
from ppal_backend.store import Lease, SeenAnnotation
from ppal_backend.structures.quality import count
from tests.doctor.conftest import LabelStudio
from tests.rounds.fakes import FakeWorld
from tests.service.dashboard.conftest import PASSWORD, ShownPlace


def text_of(answer):
    assert answer.status_code == 200, answer.text
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", answer.text).split()))


@pytest.fixture
def client(place):
    return place.app().test_client()


def quality(images, **more):
    """What a round measured on so many images."""
    interval = [0.4, 0.61] if images >= 10 else None
    measured = {"map": 0.5, "interval": interval, "classes": {"cat": 0.5}, "too_few": {"dog": 2}, "images": images}
    return {"map": 0.5, "measured": measured, "image_set": "a", "images_wanted": 40, **more}


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (None, "No model yet: the first one trains by itself after 50 annotations."),
        ({"version": "x"}, "No model yet: the first one trains by itself after 50 annotations."),
        ({"map": 0.9, "images": 40}, "Not measured on a random sample yet."),
        (quality(1), "Measured on 1 image: too few to tell; 39 more come by themselves."),
        (quality(9), "Measured on 9 images: too few to tell; 31 more come by themselves."),
        (quality(40), "mAP 0.500 (0.400 to 0.610), measured on 40 images and 1 of 2 classes."),
        (
            quality(40, active=3, differences={"3": {"map": -0.08, "interval": [-0.12, -0.02]}}),
            "mAP 0.500 (0.400 to 0.610), measured on 40 images and 1 of 2 classes. Worse than round 3's on the same "
            "images: −0.080 (−0.120 to −0.020) mAP.",
        ),
        (
            quality(40, active=3, differences={"3": {"map": 0.01, "interval": [-0.02, 0.03]}}),
            "mAP 0.500 (0.400 to 0.610), measured on 40 images and 1 of 2 classes. Cannot tell whether it is better or "
            "worse than round 3's on the same images: +0.010 (−0.020 to +0.030) mAP.",
        ),
        (
            {"map": None, "measured": {}, "trained_on_everything": True},
            "Not measured: this version was trained on the images that measure, too.",
        ),
    ],
)
def test_quality_is_one_sentence_and_no_figure_of_few_images(metrics, said):
    assert quality_in_words(metrics, 50) == said


def test_classes_come_by_their_boxes_and_rare_ones_are_marked():
    assert class_counts({"cat": 40, "dog": 60, "eel": 5}) == [
        ClassCount("dog", 60, 1.0, False),
        ClassCount("cat", 40, 40 / 60, False),
        ClassCount("eel", 5, 5 / 60, True),
    ]
    assert class_counts({}) == [] and class_counts({"cat": 0}) == [ClassCount("cat", 0, 0.0, True)]


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ({"cat": 40, "dog": 60}, "Evenly spread."),
        ({"cat": 3, "dog": 60}, "dog has 20 times as many boxes as cat."),
        ({"cat": 0, "dog": 60, "eel": 0}, "No box yet of cat, eel."),
        ({f"c{i}": 0 for i in range(7)} | {"dog": 1}, "No box yet of c0, c1, c2, c3, c4 and 2 more."),
        ({"cat": 3}, ""),
        ({}, ""),
    ],
)
def test_balance_is_one_sentence(boxes, said):
    assert balance_in_words(class_counts(boxes)) == said


def test_paces_of_all_come_before_those_of_each_annotator():
    times = {
        "with": {"images": 3, "median_s": 6.0, "out": 1},
        "without": {"images": 2, "median_s": 10.0, "out": 1},
        "without 7": {"images": 2, "median_s": 10.0, "out": 0},
    }
    assert paces(times) == [Pace("", 6.0, 3, 10.0, 2, 2), Pace("7", None, 0, 10.0, 2, 0)]
    assert paces({}) == []


def test_plural_forms():
    assert [count(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert count(2, "more box", "more boxes") == "2 more boxes"


class TimedWorld(FakeWorld):
    """Its snapshot tells how long people took."""

    def __init__(self, cache):
        super().__init__(labelled=10)

    def prepare(self, folder, on_progress):
        data = super().prepare(folder, on_progress)
        times = {"with": {"images": 30, "median_s": 8.4, "out": 1}, "without": {"images": 10, "median_s": 150},
                 "with 5": {"images": 30, "median_s": 8.4, "out": 1}}  # fmt: skip
        return type(data)(**{**vars(data), "report": {**data.report, "times": times}})


def test_the_first_page_tells_how_far_how_fast_and_what_is_next(tmp_path):
    place = ShownPlace(tmp_path / "data", TimedWorld)
    place.train()
    place.store.projects.poll_ended(1, title="Fish & <chips>")
    place.store.projects.set_task_count(1, 90)
    place.store.ledger.see(1, [SeenAnnotation(900 + i, 1000 + i // 2) for i in range(4)])
    answer = place.app().test_client().get("/ui/projects/1/")
    text = text_of(answer)
    assert "Fish &amp; &lt;chips&gt;</h1>" in answer.text and "<title>Fish &amp; &lt;chips&gt;" in answer.text
    assert "Labelled 2 of 90 " in text and 'href="http://ls.test:8080/projects/1/data?labeling=1"' in answer.text
    assert "Next The next training starts by itself after 1 more annotation." in text
    assert (
        "8 s with pre-annotations, 2.5 min without" in text and "30 with, 10 without; 1 far longer one left out" in text
    )
    assert "annotator 5: 8 s with" in text
    assert "Boxes by class" in text and re.search(r"cat .*?\d+ dog", text)
    place.store.close()


def test_what_is_next_follows_the_rounds(place, client):
    assert "after 5 more annotations" in text_of(client.get("/ui/projects/1/"))
    control.pause(place.store, 1)
    assert "Next Paused: nothing starts" in text_of(client.get("/ui/projects/1/"))
    control.resume(place.store, 1)
    record = place.store.rounds.request(1, "rank", "x")
    assert "Next Round 1 starts as soon as a worker is free." in text_of(client.get("/ui/projects/1/"))
    place.store.rounds.claim(1, Lease.mine())
    assert "Next Round 1 is ordering the tasks." in text_of(client.get("/ui/projects/1/"))
    place.store.rounds.release(record.id, 60, "it is down; wait")
    assert "Next Round 1 waits, and is tried again by itself." in text_of(client.get("/ui/projects/1/"))
    place.store.rounds.claim(1, Lease.mine())
    place.store.rounds.fail(record.id, "broken; mend it")
    assert "Next The next training starts by itself after 5 more annotations." in text_of(client.get("/ui/projects/1/"))


def test_after_trainings_that_failed_every_page_tells_the_portion_that_starts_the_next(place, client):
    for _ in range(2):
        place.store.rounds.request(1, "train", "x")
        place.store.rounds.fail(place.store.rounds.claim(1, Lease.mine()).id, "out of memory; take another detector")
    place.store.ledger.see(1, [SeenAnnotation(i, i) for i in range(3)])
    text = text_of(client.get("/ui/projects/1/"))
    assert "Next The next training starts by itself after 7 more annotations." in text
    assert "3 new annotations, 10 start a round by themselves: 7 to go." in text
    again = "after 7 more annotations, or when 2 earlier annotations are corrected or deleted, and round 2 is tried"
    assert f"Take another detector. A training starts by itself {again}" in text
    assert "starts by itself after 10 new annotations, 3 are there." in text_of(client.get("/ui/projects/1/learning"))
    place.store.ledger.used_by(1, 2, [0])
    place.store.ledger.deleted(1, [0])
    text = text_of(client.get("/ui/projects/1/"))
    assert "2 new annotations, 10 start a round by themselves: 3 to go, since 1 correction counts as 5." in text
    assert "after 3 more annotations, or when 1 earlier annotation is corrected or deleted, and round 2" in text


def test_when_all_is_labelled_that_is_said(place, client):
    place.store.projects.set_task_count(1, 1)
    place.store.ledger.see(1, [SeenAnnotation(1, 1001)])
    assert "Next Everything is labelled." in text_of(client.get("/ui/projects/1/"))


class TestConnecting:
    """From the page of all projects."""

    @pytest.fixture
    def label_studio(self, place):
        server = LabelStudio()
        server.project["title"] = "Fish"
        note = {
            "problem": "",
            "projects": [{"id": 1, "title": "Fish", "tasks": 2}, {"id": 4, "title": "<i>", "tasks": 1}],
        }
        place.store.notes.put("label_studio", note)
        return server

    def test_projects_that_are_not_connected_are_listed_with_the_address(self, place, label_studio):
        answer = place.app().test_client().get("/ui/")
        text = text_of(answer)
        assert "Label Studio has 1 project that is not connected" in text and "&lt;i&gt;" in answer.text
        assert "1 task " in text and answer.text.count('aria-label="Connect') == 1
        assert "http://localhost" in text and "paste this backend's address" in text
        assert "http://ppal.local:9090" in text_of(
            place.app(public_url="http://ppal.local:9090").test_client().get("/ui/")
        )

    def test_connect_does_what_the_dialog_does(self, place, label_studio, monkeypatch):
        import httpx

        monkeypatch.setattr(
            "ppal_backend.doctor.installation.service.__defaults__",
            (lambda url, timeout: httpx.Response(200, json={"model_class": "PPALBackend"}),),
        )
        place.store.notes.put("label_studio", {"projects": [{"id": 1, "title": "Fish", "tasks": 2}]})
        app = place.app(public_url="http://ppal.local:9090")
        dashboard = app.extensions[EXTENSION]
        dashboard.actions = Actions(dashboard.runtime, lambda settings, url: label_studio.client(tries=1))
        token = dashboard.tokens.make(1)
        answer = app.test_client().post("/ui/projects/1/connect", data={"token": token})
        assert answer.status_code == 303 and answer.location.endswith("/ui/projects/1/?done=connect")
        (row,) = label_studio.connections
        assert row["url"] == "http://ppal.local:9090"

    def test_only_a_page_of_this_backend_connects(self, place, label_studio):
        client = place.app(basic_auth_user="op", basic_auth_pass=SecretStr(PASSWORD)).test_client()
        assert client.post("/ui/projects/4/connect", data={"token": "x"}).status_code == 401
        answer = client.post("/ui/projects/4/connect", data={"token": "x"}, auth=("op", PASSWORD))
        assert answer.status_code == 403

    def test_what_label_studio_refuses_is_told(self, place, label_studio):
        app = place.app(public_url="http://nodot:9090")
        dashboard = app.extensions[EXTENSION]
        dashboard.actions = Actions(dashboard.runtime, lambda settings, url: label_studio.client(tries=1))
        answer = app.test_client().post("/ui/projects/4/connect", data={"token": dashboard.tokens.make(4)})
        assert answer.status_code == 400 and "has no dot" in answer.text


def test_where_fewer_images_are_left_than_start_a_training_the_page_says_what_to_press(tmp_path):
    place = ShownPlace(tmp_path / "data", TimedWorld)
    place.train()
    place.store.ledger.see(1, [SeenAnnotation(900, 1000)])
    place.store.projects.set_task_count(1, 4)
    text = text_of(place.app().test_client().get("/ui/projects/1/"))
    assert "Only 3 images are left, and 4 more annotations start a training by themselves" in text
    assert "press Train now" in text
