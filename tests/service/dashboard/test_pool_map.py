"""The map of the pool: what each point is, and what the page, its script and its images get."""

import re
import shutil
from io import BytesIO

import pytest
from PIL import Image

from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.service.dashboard.project import Query
from ppal_backend.service.dashboard.queue import LISTED, LONGEST_PX, kinds_of, points_of, summary_of
from ppal_backend.store import SeenAnnotation
from tests.service.dashboard.test_pages import text_of
from tests.service.dashboard.test_queue import why

LABELS = ("cat", "dog")
POINTS = "/ui/projects/1/rounds/5/map"


@pytest.fixture
def query():
    queue = (12, 10, 11, 13, 14, 99)
    utilities = {10: 5.0, 11: 4.0, 12: 9.12345, 13: 2.0, 14: 1.0}
    return Query("ppal", (12, 10), (12, 10, 11), queue, utilities, {12: why(), 10: why()})


@pytest.fixture
def drawn():
    labelled = [{"image_id": 1, "path": "/1.jpg", "width": 4, "height": 3, "x": 0.5, "y": -0.5}]
    return {
        "feature": "global", "explained": [0.4, 0.1], "labelled_images": 3, "ids": [10, 11, 12, 13, 14],
        "x": [0.1, 0.2, 0.3, 0.4, 0.45], "y": [0.0, 0.1, 0.0, 0.1, 0.2], "labelled": labelled,
    }  # fmt: skip


def test_every_point_is_of_one_kind(query, drawn):
    assert kinds_of(query, drawn, ()) == "pcprrl"
    assert kinds_of(query, drawn, {10, 14, 777}) == "scprsl", "what was labelled since is no pick any more"


def test_the_summary_counts_and_lists_the_query_set_in_its_order(query, drawn):
    summary = summary_of(query, drawn, {10}, LABELS)
    counts = {layer.name: layer.count for layer in summary.layers}
    assert counts == {"next to label": 1, "also worth it": 1, "the rest": 2, "labelled before": 1, "labelled since": 1}
    assert summary.explained == (0.4, 0.1) and (summary.labelled_images, summary.drawn_labelled) == (3, 1)
    assert [(one.place, one.task_id, one.is_labelled) for one in summary.listed] == [(1, 12, False), (2, 10, True)]
    assert summary.listed[0].reason.endswith("Not sure of dog and cat. Stands for 4 similar images.")


def test_a_long_query_set_is_listed_as_far_as_people_read(drawn):
    ids = tuple(range(1, LISTED + 50))
    query = Query("random", ids, ids, ids)
    assert [one.task_id for one in summary_of(query, drawn, (), LABELS).listed] == list(ids[:LISTED])


def test_points_come_as_lists_of_one_length_with_reasons_for_the_chosen(query, drawn):
    points = points_of(query, drawn, {14}, LABELS)
    assert points["ids"] == [10, 11, 12, 13, 14, 1] and points["kinds"] == "pcprsl"
    assert points["x"][-1] == 0.5 and points["y"][-1] == -0.5 and points["x"][2] == 0.3
    assert points["place"] == [2, 3, 1, 4, 5, 0]
    assert points["utility"] == [5.0, 4.0, 9.123, 2.0, 1.0, None]
    assert list(points["reasons"]) == ["12", "10"] and "Not sure of dog" in points["reasons"]["12"]
    assert "images like it" in points["said"]["c"] and "surer" in points["said"]["r"]
    assert "before" in points["said"]["l"] and "since" in points["said"]["s"]


def test_a_random_queue_has_no_uncertainty(query, drawn):
    points = points_of(Query("random", *(query.image_ids, query.candidate_ids, query.queue, query.utilities)), drawn,
                       (), LABELS)  # fmt: skip
    assert set(points["utility"]) == {None} and "random" in points["said"]["r"]


def test_the_page_tells_what_near_means_and_what_is_drawn(client, trained):
    stored = RoundFolder(trained.folder(5)).read("map.json")
    answer = client.get("/ui/projects/1/queue")
    page, text = answer.text, text_of(answer)
    across, up = stored["explained"]
    shares = f"hold {across + up:.0%} of how the images differ ({across:.0%} across, {up:.0%} up)"
    assert "principal components" in page and shares.replace("%", "\u00a0%") in page and shares not in text, (
        "in a tooltip"
    )
    query = RoundFolder(trained.folder(5)).read("query_set.json")
    candidates = len(set(query["candidate_ids"]) - set(query["image_ids"]))
    assert f"next to label 5 also worth it {candidates} the rest {25 - candidates} labelled before 50" in text
    assert 'value="s"' not in page and f'data-points="{POINTS}"' in page
    listed = re.findall(r'data-task="(\d+)"', page)
    assert [int(t) for t in listed] == query["image_ids"]
    assert f'<a href="http://ls.test:8080/projects/1/data?task={listed[0]}" data-task' in page


def test_what_is_labelled_after_the_round_is_marked(place):
    place.train()
    chosen = RoundFolder(place.folder(1)).read("query_set.json")["image_ids"]
    place.store.ledger.see(1, [SeenAnnotation(900, chosen[1]), SeenAnnotation(901, chosen[2], usable=False)])
    client = place.app().test_client()
    text = text_of(client.get("/ui/projects/1/queue"))
    assert "next to label 4" in text and "labelled since 1" in text and f"Task {chosen[1]} labelled" in text
    points = client.get("/ui/projects/1/rounds/1/map").json
    assert [i for i, kind in zip(points["ids"], points["kinds"], strict=True) if kind == "s"] == [chosen[1]]
    place.store.ledger.used_by(1, 1, [900])
    assert "s" not in client.get("/ui/projects/1/rounds/1/map").json["kinds"], "the round has read it"
    place.store.ledger.see(1, [SeenAnnotation(902, chosen[0])])
    place.store.ledger.used_by(1, 2, [902])
    assert client.get("/ui/projects/1/rounds/1/map").json["kinds"].count("s") == 1, "a later one has"


def test_points_are_sent_once_while_nothing_changes(client):
    first = client.get(POINTS)
    assert first.json["ids"][:2] == [1000, 1001] and len(first.json["ids"]) == 80
    again = client.get(POINTS, headers={"If-None-Match": first.headers["ETag"]})
    assert again.status_code == 304 and not again.data
    assert "no-cache" in first.headers["Cache-Control"] and "private" in first.headers["Cache-Control"]


def test_labelled_images_that_are_drawn_can_be_seen_and_others_cannot(client):
    for task_id, status in ((1, 200), (50, 200), (1003, 200), (51, 404), (5000, 404)):
        for name in ("images", "thumbnails"):
            assert client.get(f"/ui/projects/1/rounds/5/{name}/{task_id}").status_code == status, (name, task_id)


def test_a_thumbnail_is_small_and_of_the_same_shape(place):
    place.train()
    Image.new("RGB", (1600, 800), (200, 30, 30)).save(place.world.cache / "1003.png")
    answer = place.app().test_client().get("/ui/projects/1/rounds/1/thumbnails/1003")
    image = Image.open(BytesIO(answer.data))
    assert answer.mimetype == "image/jpeg" and image.size == (LONGEST_PX, LONGEST_PX // 2)
    assert image.getpixel((5, 5))[0] > 150 > image.getpixel((5, 5))[1]
    assert "private" in answer.headers["Cache-Control"]


def test_a_damaged_image_is_told_and_no_crash(place):
    place.train()
    (place.world.cache / "1003.png").write_bytes(b"no image")
    answer = place.app().test_client().get("/ui/projects/1/rounds/1/thumbnails/1003")
    assert answer.status_code == 404 and "readable image" in answer.text


def test_a_round_without_a_map_says_why(place):
    place.round("rank")
    client = place.app().test_client()
    assert "No map of the pool: round 1 had no model" in text_of(client.get("/ui/projects/1/queue"))
    assert client.get("/ui/projects/1/rounds/1/map").status_code == 404


def test_missing_features_of_labelled_images_are_told(place):
    place.train()
    folder = RoundFolder(place.folder(1))
    stored = folder.read("map.json")
    client = place.app().test_client()
    folder.write("map.json", {**stored, "labelled": stored["labelled"][:4]})
    assert "Of 10 labelled images 4 are drawn" in text_of(client.get("/ui/projects/1/queue"))
    folder.write("map.json", {**stored, "labelled": []})
    assert "None of the 10 labelled images is drawn" in text_of(client.get("/ui/projects/1/queue"))


def test_the_map_outlives_the_rounds_heavy_files(place):
    place.train()
    for name in ("dataset", "detections", "labelled_detections"):
        shutil.rmtree(place.folder(1) / name)
    client = place.app().test_client()
    assert len(client.get("/ui/projects/1/rounds/1/map").json["ids"]) == 40
    (place.folder(1) / "map.json").write_text("{broken")
    assert "damaged file" in client.get("/ui/projects/1/queue").text
