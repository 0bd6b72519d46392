"""The page Quality: what the comparison and the counts of a round become in words and boxes."""

import re
import shutil

import pytest

from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.service.dashboard.quality import agreement_rows, doubtful_on, pages_of, people_shown, total_of
from tests.service.dashboard.conftest import COUNTS, ReviewedWorld, ShownPlace
from tests.service.dashboard.test_pages import text_of


@pytest.fixture
def reviewed(tmp_path):
    place = ShownPlace(tmp_path / "data", ReviewedWorld)
    place.train(2)
    yield place
    place.store.close()


def dispute(**changes):
    base = {"kind": "overlooked", "score": 0.2, "annotated": None, "box_xyxy": [50, 20, 60, 40], "label": "dog"}
    return {**base, "confidence": 0.875, **changes}


def review_with(*tasks):
    frame = {"round": 3, "width": 100, "height": 80, "annotated": [{"box_xyxy": [1, 2, 11, 22], "label": "cat"}]}
    return {"tasks": [{**frame, "task_id": n, **task} for n, task in enumerate(tasks, start=1)]}


def test_the_share_is_of_all_boxes_shown_or_drawn():
    (row,) = agreement_rows({"v1": COUNTS}, ["v1"])
    assert (row.proposed, row.saved) == (6, 3 / 8)
    both = total_of([row, row])
    assert (both.tasks, both.kept, both.added, both.saved) == (4, 6, 4, 3 / 8)
    assert total_of([]).saved is None


def test_versions_come_in_their_order_and_only_where_they_proposed_something():
    nothing = {**dict.fromkeys(COUNTS, 0), "tasks": 4, "added": 9}
    counts = {"r10": COUNTS, "r9": COUNTS, "start": nothing, "gone": COUNTS}
    assert [r.version for r in agreement_rows(counts, ["r9", "r10"])] == ["gone", "r9", "r10"]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "Overlooked? The model sees dog (0.88) where no box is."),
        ({"kind": "swapped", "annotated": 0}, "Another label? A box says cat where the model sees dog (0.88)."),
        (
            {"kind": "badly located", "annotated": 0, "label": "cat"},
            "Out of place? The model sees cat (0.88) beside the box that says so.",
        ),
    ],
)
def test_the_reason_says_what_is_doubted(changes, wanted):
    (item,) = doubtful_on(review_with({"disputes": [dispute(**changes)]}), 1, [3])
    assert item.reasons == [wanted]
    people, model = item.boxes
    assert people.style == ("people" if changes == {} else "people doubted") and people.text == "annotated: cat"
    assert (people.x, people.y, people.width, people.height) == (1, 2, 10, 20)
    assert (model.x, model.y, model.width, model.height, model.style) == (50, 20, 10, 20, "model")


def test_pages_and_images_that_are_gone():
    review = review_with(*({"disputes": [dispute()], "round": 3 + n % 2} for n in range(25)))
    assert pages_of(review) == 3 and pages_of({"tasks": []}) == 1
    last = doubtful_on(review, 3, [4])
    assert [(i.place, i.task_id, i.round_number) for i in last] == [(25, 25, None)]
    assert [i.round_number for i in doubtful_on(review, 1, [4])[:2]] == [None, 4]


def test_the_page_shows_swapped_labels_with_image_boxes_and_link(reviewed):
    client = reviewed.app().test_client()
    page, text = client.get("/ui/projects/1/quality").text, text_of(client.get("/ui/projects/1/quality"))
    review = RoundFolder(reviewed.folder(2)).read("dataset/quality.json")
    assert review["compared"] == 20 and 5 <= review["disputed"] <= 16, "four of the images hold nothing"
    assert "Compared are 20 of 40 labelled images" in text and f"{review['disputed']} of them hold" in text
    tasks = [int(t) for t in re.findall(r">Task (\d+)</a>", page)]
    assert tasks == [t["task_id"] for t in review["tasks"][:12]]
    assert f"http://ls.test:8080/projects/1/data?task={tasks[0]}" in page
    assert "Another label?" in text and 'class="people doubted"' in page and 'class="model"' in page
    (source,) = re.findall(rf'src="(/ui/projects/1/rounds/1/images/{tasks[0]})"', page)
    assert client.get(source).mimetype == "image/png"


def test_the_page_tells_what_was_saved(reviewed):
    text = text_of(reviewed.app().test_client().get("/ui/projects/1/quality"))
    assert "38 % of all boxes needed no hand" in text and "3 of the 6 proposed ones" in text
    assert "ppal-r1-x 2 3 1 1 1 2 38 %" in text and "ppal-r0-y" not in text, "it proposed nothing"


def test_images_of_pruned_rounds_are_not_asked_for(reviewed):
    shutil.rmtree(reviewed.folder(1) / "dataset")
    page = reviewed.app().test_client().get("/ui/projects/1/quality").text
    assert "no image on disk" in page and "<img" not in page


def test_without_rounds_comparison_or_answers_the_page_says_so(place):
    client = place.app().test_client()
    text = text_of(client.get("/ui/projects/1/quality"))
    assert "Nothing to tell yet" in text and "No round has read the annotations yet" in text
    place.train()
    text = text_of(client.get("/ui/projects/1/quality"))
    assert "None of the 10 labelled images has been looked at by a model before" in text
    assert "Several people" not in text
    (place.folder(1) / "dataset/quality.json").unlink()
    assert "Round 1 has no comparison" in text_of(client.get("/ui/projects/1/quality"))


def test_the_page_shows_what_the_training_learned_from_and_what_not(reviewed):
    page = reviewed.app().test_client().get("/ui/projects/1/quality")
    text = text_of(page)
    for told in (
        "61 boxes on 30 images, 2 of them without a box",
        "6 rotated boxes: the upright box around each is learned",
        "7 boxes were cut at the border",
        "3 tasks were skipped",
        "4 annotated tasks are left out: the image cannot be used",
        "8 boxes are left out: less than a pixel",
        "9 regions are left out: no usable numbers",
        "5 boxes are left out: the labeling config has no label",
        "10 regions are left out: polygonlabels",
    ):
        assert told in text, told
    assert "&lt;zebra&gt;" in page.text and "<zebra>" not in page.text


def test_people_are_listed_with_the_least_agreement_first():
    kinds = {"same": 6, "other_label": 2, "alone": 2}
    found = {
        "tasks": 3,
        "worst": [{"task": 5, "agreement": 0.25, "people": [1, 2]}, {"task": 6, "agreement": 1.0, "people": [1, 2]}],
        "by_task": [[5, 0.25], [6, 1.0], [9, 0.5]],
        "classes": {"cat": {"same": 4, "other_label": 0, "alone": 0}, "dog": kinds},
        "pairs": [{"people": [1, 2], "tasks": 3, **kinds}],
    }
    shown = people_shown(found, {5, 9})
    assert [(row.what, row.share) for row in shown["classes"]] == [("dog", 0.6), ("cat", 1.0)]
    assert [(row.what, row.tasks, row.share) for row in shown["pairs"]] == [("person 1 and person 2", 3, 0.6)]
    assert [row["task"] for row in shown["worst"]] == [5], "where all agree there is nothing to look at"
    assert (shown["measuring"], shown["measured"]) == (2, 0.375)
    assert people_shown({}, {5}) is None and people_shown(found, set())["measured"] is None


def test_the_page_tells_where_people_differ(reviewed):
    page = reviewed.app().test_client().get("/ui/projects/1/quality")
    text = text_of(page)
    assert "3 tasks have annotations of several people" in text
    assert "person 1 and person 2 3 6 2 2 60 %" in text and "<dog> 6 2 2 60 %" in text.replace("&lt;", "<").replace(
        "&gt;", ">"
    )
    assert "http://ls.test:8080/projects/1/data?task=4" in page.text and "(25 %)" in text
    assert "<dog>" not in page.text, "labels are text"


def test_it_stays_behind_the_dashboards_login(reviewed):
    from pydantic import SecretStr

    client = reviewed.app(basic_auth_user="ls", basic_auth_pass=SecretStr("a-long-password")).test_client()
    assert client.get("/ui/projects/1/quality").status_code == 401
    known = {"auth": ("ls", "a-long-password")}
    assert "Several people" in client.get("/ui/projects/1/quality", **known).text
    assert "person" not in client.get("/metrics", **known).text


def listed(answer):
    return [int(t) for t in re.findall(r">Task (\d+)</a>", answer.text)]


def press(client, answer, task):
    """Press the button of a task's card."""
    (form,) = re.findall(
        rf'<form method="post"[^>]*>(?:(?!</form>).)*name="task" value="{task}".*?</form>', answer.text, re.S
    )
    fields = dict(re.findall(r'name="(\w+)" value="([^"]*)"', form))
    (address,) = re.findall(r'action="([^"]+)"', form)
    return client.post(address, data=fields)


def test_a_doubt_is_dismissed_remembered_and_taken_back(reviewed):
    client = reviewed.app().test_client()
    before = client.get("/ui/projects/1/quality")
    task = listed(before)[0]
    answer = press(client, before, task)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/ui/projects/1/quality")
    after = reviewed.app().test_client().get("/ui/projects/1/quality")
    assert task not in listed(after) and listed(after) == listed(before)[1:] and "1 dismissed" in text_of(after)
    client = reviewed.app().test_client()
    dismissed = client.get("/ui/projects/1/quality?dismissed=1")
    assert listed(dismissed) == [task] and "Doubt again" in text_of(dismissed)
    assert press(client, dismissed, task).headers["Location"] == "/ui/projects/1/quality?dismissed=1"
    assert listed(client.get("/ui/projects/1/quality")) == listed(before)
    assert "None of the dismissed ones fits" in text_of(client.get("/ui/projects/1/quality?dismissed=1"))


def test_a_dismissal_ends_with_the_boxes_that_were_seen(reviewed):
    client = reviewed.app().test_client()
    before = client.get("/ui/projects/1/quality")
    task = listed(before)[0]
    reviewed.store.dismissals.add(1, task, "the digest of other boxes")
    assert listed(client.get("/ui/projects/1/quality")) == listed(before)


def test_only_the_page_s_own_form_dismisses(reviewed):
    answer = reviewed.app().test_client().post("/ui/projects/1/dismiss", data={"task": "1014", "token": "x"})
    assert answer.status_code == 403 and reviewed.store.dismissals.of_project(1) == {}


def test_doubts_are_filtered_by_label_and_annotator(reviewed):
    path = reviewed.folder(2) / "dataset/quality.json"
    review = RoundFolder(reviewed.folder(2)).read("dataset/quality.json")
    for number, task in enumerate(review["tasks"]):
        task["annotator"] = (4, 9, None)[number % 3]
    RoundFolder(reviewed.folder(2)).write("dataset/quality.json", review)
    assert path.is_file()
    client = reviewed.app().test_client()
    wanted = [t["task_id"] for t in review["tasks"] if t["annotator"] == 9]
    assert wanted and listed(client.get("/ui/projects/1/quality?annotator=9")) == wanted
    assert "all user 4 user 9" in text_of(client.get("/ui/projects/1/quality"))
    of_dogs = [t["task_id"] for t in review["tasks"] if any(d["label"] == "dog" or (d["annotated"] is not None
               and t["annotated"][d["annotated"]]["label"] == "dog") for d in t["disputes"])]  # fmt: skip
    assert listed(client.get("/ui/projects/1/quality?label=dog")) == of_dogs
    assert "Nothing is left to look at" in text_of(client.get("/ui/projects/1/quality?label=zebra"))


def test_classes_that_are_left_out_are_told_with_the_reason(reviewed):
    review = RoundFolder(reviewed.folder(2)).read("dataset/quality.json")
    review["left_out"] = [{"label": "emu", "ap": None}, {"label": "yak", "ap": 0.0312}]
    RoundFolder(reviewed.folder(2)).write("dataset/quality.json", review)
    text = text_of(reviewed.app().test_client().get("/ui/projects/1/quality"))
    assert "Left out, since the model is too weak there to doubt people: yak (AP 0.031); not measured yet: emu." in text
    assert "from a measured AP of 0.100 on" in text
