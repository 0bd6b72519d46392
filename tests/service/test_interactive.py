"""/predict with a context: what is drawn becomes the detection of that place, and nothing else."""

import itertools
import logging
import random

import numpy as np
import pytest

from ppal_backend.label_studio.schema import parse_label_config
from ppal_backend.rounds.detections_store import DetectionsWriter
from ppal_backend.service import interactive
from ppal_backend.service.interactive import Mark, Places, candidates
from ppal_backend.structures.detections import Detections
from tests.service.conftest import CONFIG, activate, predict_payload, task

WIDTH, HEIGHT = 200, 100
CAT, DOG = (20, 20, 60, 60), (100, 10, 180, 90)
DETECTIONS = [  # corners in pixels, class, score
    (CAT, 0, 0.9),
    ((24, 22, 66, 64), 1, 0.5),  # at the cat's place, taken for a dog
    (DOG, 1, 0.8),
    ((0, 0, 200, 100), 0, 0.04),  # below the least score
]


@pytest.fixture(autouse=True)
def places(monkeypatch):
    monkeypatch.setattr(interactive, "_places", Places())


@pytest.fixture
def seen(connected, store, settings):
    """Project 7 with a round that looked at task 5."""
    activate(store)
    folder = settings.project_folder(7) / "rounds" / "1" / "detections"
    write(folder, 5, DETECTIONS)
    return folder


def write(folder, task_id, rows, size=(WIDTH, HEIGHT)):
    writer = DetectionsWriter(folder)
    boxes, classes, scores = zip(*rows, strict=True)
    found = Detections(
        task_id, np.array(boxes, np.float32), np.array(scores, np.float32), np.array(classes),
        np.zeros((len(rows), 4), np.float32), image_size=size,
    )  # fmt: skip
    writer.add(found, {})
    writer.flush()


def drawn(corners, label="Cat", region_id="r1", kind="rectanglelabels", control="label", **changes):
    """A region as Label Studio 1.23 sends it."""
    x1, y1, x2, y2 = corners
    value = {"x": x1 / WIDTH * 100, "y": y1 / HEIGHT * 100, "rotation": 0}
    value |= {"width": (x2 - x1) / WIDTH * 100, "height": (y2 - y1) / HEIGHT * 100}
    if label is not None and kind.endswith("labels"):
        value[kind] = [label]
    return {
        "id": region_id, "from_name": control, "to_name": "image", "type": kind, "original_width": WIDTH,
        "original_height": HEIGHT, "image_rotation": 0, "origin": "manual", "value": value, **changes,
    }  # fmt: skip


def click(x, y, label="Cat", region_id="k1"):
    kind = "keypoint" if label is None else "keypointlabels"
    region = drawn((x, y, x, y), label, region_id, kind, "point", is_positive=True)
    region["value"] = {"x": x / WIDTH * 100, "y": y / HEIGHT * 100, "width": 0.3, "labels": []} | (
        {} if label is None else {"keypointlabels": [label]}
    )
    return region


def asked(client, *regions, task_id=5, **changes):
    body = predict_payload(task(task_id, **changes), params={"context": {"result": list(regions)}})
    answer = client.post("/predict", json=body)
    assert answer.status_code == 200, answer.json
    (entry,) = answer.json["results"]
    assert entry["model_version"] == answer.json["model_version"]
    return entry["result"]


def shown(region):
    value = region["value"]
    x, y = value["x"] * WIDTH / 100, value["y"] * HEIGHT / 100
    corners = (x, y, x + value["width"] * WIDTH / 100, y + value["height"] * HEIGHT / 100)
    return tuple(round(n) for n in corners), *value.get("rectanglelabels", [None])


def test_a_rough_box_becomes_the_detection_of_its_place(client, seen):
    (region,) = asked(client, drawn((12, 14, 66, 68)))
    assert shown(region) == (CAT, "Cat")
    assert (region["from_name"], region["to_name"], region["type"]) == ("label", "image", "rectanglelabels")
    assert region["score"] == pytest.approx(0.9)


def test_the_label_that_was_chosen_stays(client, seen):
    (region,) = asked(client, drawn((98, 5, 185, 96), "Cat"))
    assert shown(region) == (DOG, "Cat")


def test_a_detection_of_the_chosen_label_goes_first(client, seen):
    (region,) = asked(client, drawn((20, 20, 62, 62), "Dog"))
    assert shown(region) == ((24, 22, 66, 64), "Dog")


def test_without_a_label_the_predicted_one_is_taken_in_the_projects_control(client, seen):
    rough = drawn((98, 5, 185, 96), None, kind="rectangle", control="rough")
    (region,) = asked(client, rough)
    assert shown(region) == (DOG, "Dog")
    assert (region["type"], region["from_name"]) == ("rectanglelabels", "label")


@pytest.mark.parametrize(
    "corners", [(0, 0, 200, 100), (62, 20, 98, 60), (20, 20, 35, 60), (181, 91, 199, 99)],
    ids=["the whole image", "between two", "a third of one", "nobody there"],
)  # fmt: skip
def test_a_box_that_nobody_detected_comes_back_as_it_was_drawn(client, seen, corners):
    rough = drawn(corners, "Dog")
    (region,) = asked(client, rough)
    assert region["value"] == rough["value"]
    assert (region["type"], region["from_name"]) == ("rectanglelabels", "label")
    assert "score" not in region and region["id"] != rough["id"]


def test_a_box_without_label_that_nobody_detected_keeps_its_control(client, seen):
    rough = drawn((181, 91, 199, 99), None, kind="rectangle", control="rough")
    (region,) = asked(client, rough)
    assert (region["type"], region["from_name"], region["value"]) == ("rectangle", "rough", rough["value"])


def test_a_turned_rough_box_counts_by_its_hull(client, seen):
    rough = drawn((60, 20, 100, 60))
    rough["value"]["rotation"] = 90  # about (60, 20): the hull is the cat's box
    (region,) = asked(client, rough)
    assert shown(region) == (CAT, "Cat") and region["value"]["rotation"] == 0


def test_a_click_becomes_the_surest_detection_under_it(client, seen):
    assert [shown(r) for r in asked(client, click(140, 50, "Dog"))] == [(DOG, "Dog")]
    assert [shown(r) for r in asked(client, click(140, 50, None))] == [(DOG, "Dog")]
    assert asked(client, click(195, 95, "Dog")) == []


def test_the_same_place_again_gives_the_next_one_in_the_same_region(client, seen):
    rough = (20, 20, 62, 62)
    answers = [asked(client, drawn(rough, "Cat", f"r{n}"))[0] for n in range(4)]
    assert [shown(a) for a in answers] == [
        (CAT, "Cat"), ((24, 22, 66, 64), "Cat"), (rough, "Cat"), (CAT, "Cat"),
    ]  # fmt: skip
    assert len({a["id"] for a in answers}) == 1, "the editor replaces the region of that id"
    clicks = [asked(client, click(40, 40, "Cat", f"k{n}"))[0] for n in range(3)]
    assert [shown(a)[0] for a in clicks] == [CAT, (24, 22, 66, 64), CAT]


def test_another_place_or_label_begins_anew(client, seen):
    first = asked(client, drawn((20, 20, 62, 62), "Cat", "a"))[0]
    other_label = asked(client, drawn((20, 20, 62, 62), "Dog", "b"))[0]
    other_place = asked(client, drawn((98, 5, 185, 96), "Cat", "c"))[0]
    other_task = asked(client, drawn((20, 20, 62, 62), "Cat", "d"), task_id=6)[0]
    assert shown(other_label) == ((24, 22, 66, 64), "Dog")
    assert shown(other_place) == (DOG, "Cat")
    assert shown(other_task) == ((20, 20, 62, 62), "Cat")
    assert len({first["id"], other_label["id"], other_place["id"], other_task["id"]}) == 4


def test_everything_that_waits_on_the_screen_is_answered_once_a_place(client, seen):
    """Without Auto-Accept the editor sends all rough boxes and shows what the last answer holds."""
    cat, dog = drawn((18, 18, 62, 62), "Dog", "a"), drawn((98, 5, 185, 96), "Dog", "b")
    assert [shown(r)[0] for r in asked(client, cat)] == [(24, 22, 66, 64)]
    assert [shown(r)[0] for r in asked(client, cat, dog)] == [(24, 22, 66, 64), DOG]
    again = drawn((18, 18, 62, 62), "Dog", "c")
    assert [shown(r)[0] for r in asked(client, cat, dog, again)] == [DOG, CAT]


def test_regions_that_were_accepted_are_not_answered_again(client, seen):
    """With Auto-Accept the editor sends them along with the next rough box; answered again they would stand twice."""
    (cat,) = asked(client, drawn((18, 18, 62, 62), "Cat", "a"))
    accepted = drawn(shown(cat)[0], "Cat", cat["id"])
    (dog,) = asked(client, accepted, drawn((98, 5, 185, 96), "Dog", "b"))
    assert shown(dog)[0] == DOG
    (again,) = asked(client, accepted, drawn((18, 18, 62, 62), "Cat", "c"))
    assert again["id"] == cat["id"] and shown(again)[0] != shown(cat)[0], "the next one, in the place of the last one"


def test_a_place_is_forgotten_after_a_while():
    now = [0.0]
    places = Places(lambda: now[0])
    schema = parse_label_config(CONFIG)
    marks = [interactive.read_marks({"result": [drawn((20, 20, 62, 62), "Cat", str(n))]}, schema) for n in range(4)]
    assert [places.turns(7, 5, m)[0][1] for m in marks[:2]] == [0, 1]
    now[0] += interactive.AGAIN_S + 1
    assert places.turns(7, 5, marks[2])[0][1] == 0
    assert places.turns(8, 5, marks[3])[0][1] == 0, "a task of another project"
    for number in range(interactive.MOST_TASKS + 50):
        places.turns(9, number, marks[0])
    assert len(places._tasks) == interactive.MOST_TASKS


def test_a_task_that_no_round_has_seen_gets_the_boxes_it_was_shown(client, seen):
    region = drawn(DOG, "Dog", "p1", score=0.7)
    mine = {"model_version": "ppal-7-r1", "result": [region, "junk", {"type": "rectanglelabels", "value": {"x": "a"}}]}
    others = {"model_version": "else", "result": [drawn((18, 18, 62, 62), "Cat", "p2", score=0.9)]}
    shown_before = {"task_id": 99, "predictions": [mine, others, None, {"model_version": "ppal-7-r1", "result": 3}]}
    assert [shown(r) for r in asked(client, drawn((98, 5, 185, 96), "Dog"), **shown_before)] == [(DOG, "Dog")]
    rough = drawn((20, 20, 62, 62), "Cat", "b")
    assert asked(client, rough, **shown_before)[0]["value"] == rough["value"], "another version's boxes do not count"


def test_labelled_images_are_known_too(client, seen):
    write(seen.parent / "labelled_detections", 8, [(DOG, 1, 0.6)])
    assert [shown(r) for r in asked(client, click(140, 50, "Dog"), task_id=8)] == [(DOG, "Dog")]


def test_a_new_shard_is_noticed(client, seen):
    assert asked(client, click(140, 50, "Dog"), task_id=6) == []
    write(seen, 6, [(DOG, 1, 0.6)])
    assert [shown(r) for r in asked(client, click(140, 50, "Dog", "k2"), task_id=6)] == [(DOG, "Dog")]


def test_a_damaged_shard_moves_nothing(client, seen, caplog):
    next(seen.glob("*.npz")).write_bytes(b"PK\x03\x04 no")
    rough = drawn((12, 14, 66, 68))
    assert asked(client, rough)[0]["value"] == rough["value"]
    assert "cannot be read" in caplog.text and "Traceback" not in caplog.text


def test_before_any_round_boxes_stay_as_drawn(client, connected, caplog):
    caplog.set_level("INFO")
    rough = drawn((12, 14, 66, 68))
    assert asked(client, rough)[0]["value"] == rough["value"]
    assert "no round is done yet" in caplog.text


def test_nothing_is_drawn_any_more(client, seen):
    """The editor says so when the last rough box is deleted."""
    assert asked(client) == []


def without(region, *names):
    return {name: value for name, value in region.items() if name not in names}


ROUGH = drawn((12, 14, 66, 68))
BAD = {
    "no result": ({"results": []}, "expected 'result' of the context to list"),
    "result is text": ({"result": "x"}, "expected 'result' of the context to list"),
    "too many": ({"result": [ROUGH] * 201}, "got 201 of them"),
    "a region is text": ({"result": ["x"]}, "expected a drawn rectangle or key point"),
    "a brush": ({"result": [{**ROUGH, "type": "brushlabels"}]}, "got brushlabels"),
    "no value": ({"result": [without(ROUGH, "value")]}, "expected a drawn rectangle"),
    "another control": ({"result": [{**ROUGH, "from_name": "other"}]}, "got one of 'other'"),
    "another image": ({"result": [{**ROUGH, "to_name": "second"}]}, "on 'second'"),
    "no size": ({"result": [without(ROUGH, "original_width")]}, "expected original_width"),
    "a size of 0": ({"result": [{**ROUGH, "original_height": 0}]}, "expected original_width"),
    "text for numbers": ({"result": [{**ROUGH, "value": {"x": "1"}}]}, "expected numbers"),
    "beyond numbers": (
        {"result": [{**ROUGH, "value": {"x": 1e308, "y": 1e308, "width": 1e308, "height": -1e308, "rotation": 45}}]},
        "expected numbers",
    ),
    "out of the image": ({"result": [drawn((300, 10, 340, 40))]}, "expected a region inside the image"),
    "no area": ({"result": [drawn((20, 20, 20, 40))]}, "without an area"),
    "a click out of the image": ({"result": [click(-5, 10)]}, "expected a region inside the image"),
}


@pytest.mark.parametrize(("context", "text"), BAD.values(), ids=BAD.keys())
def test_a_context_that_cannot_be_used_is_refused(client, seen, caplog, context, text):
    caplog.set_level(logging.INFO)
    answer = client.post("/predict", json=predict_payload(task(5), params={"context": context}))
    assert answer.status_code == 400
    assert text in answer.json["error"] and len(answer.json["error"]) < 300
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "tasks", [[], [task(5), task(6)], [{"id": "5"}], ["x"]], ids=["none", "two", "text id", "text"]
)
def test_a_context_belongs_to_one_task(client, seen, tasks):
    body = predict_payload(*tasks, params={"context": {"result": [ROUGH]}})
    answer = client.post("/predict", json=body)
    assert (answer.status_code, "expected one task" in answer.json["error"]) == (400, True)


def test_a_project_that_is_not_connected(client):
    body = predict_payload(task(5), project="99.1", params={"context": {"result": [ROUGH]}})
    answer = client.post("/predict", json=body)
    assert (answer.status_code, "Settings > Model" in answer.json["error"]) == (400, True)


# The rule once more, slowly and in pixels.


def slow_overlap(a, b):
    inner = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return inner / (sum(areas) - inner) if inner else 0.0


def slow_candidates(corners, label, is_click, rows):
    fitting = []
    for box, name, score in rows:
        if is_click:
            fits = box[0] <= corners[0] <= box[2] and box[1] <= corners[1] <= box[3]
            worth = score
        else:
            fits, worth = slow_overlap(box, corners) >= 0.4, slow_overlap(box, corners) * score
        if fits:
            fitting.append((label is not None and name != label, -worth, box, label or name))
    found = []
    for _, _, box, name in sorted(fitting, key=lambda row: row[:2]):
        if not any(other == name and slow_overlap(box, taken) >= 0.9 for taken, other in found):
            found.append((box, name))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_candidates_are_those_of_the_slow_rule(seed):
    rng = random.Random(seed)
    rows = []
    for _ in range(rng.randint(0, 25)):
        x, y = rng.uniform(0, 120), rng.uniform(0, 50)
        box = (x, y, x + rng.uniform(20, 80), y + rng.uniform(20, 50))
        rows += [(box, rng.choice(["Cat", "Dog"]), rng.random()) for _ in range(rng.randint(1, 2))]
    known = [drawn(box, name, score=score) for box, name, score in rows]
    for is_click, label in itertools.product([True, False], ["Cat", "Dog", None]):
        x, y = rng.uniform(20, 140), rng.uniform(20, 60)
        corners = (x, y, x, y) if is_click else (x - 20, y - 15, x + 40, y + 30)
        scale = (100 / WIDTH, 100 / HEIGHT) * 2
        box_pct = tuple(n * s for n, s in zip(corners, scale, strict=True))
        got = [shown(r) for r in candidates(Mark("m", {}, box_pct, label, is_click, WIDTH, HEIGHT), known)]
        want = [(tuple(round(n) for n in box), name) for box, name in slow_candidates(corners, label, is_click, rows)]
        assert got == want


class Point:
    """An entry point; ``error`` is raised when it is loaded."""

    name = "test"

    def __init__(self, finder, error=None):
        self.finder, self.error = finder, error

    def load(self):
        if self.error:
            raise self.error
        return self.finder


@pytest.fixture
def plug_in(monkeypatch):
    def install(*points):
        interactive._plugin.cache_clear()
        monkeypatch.setattr(interactive, "entry_points", lambda group: points)

    yield install
    interactive._plugin.cache_clear()


def test_a_plug_in_is_asked_where_nothing_was_detected(client, seen, plug_in, images):
    calls = []

    def finder(image, box_xyxy, point):
        calls.append((image, box_xyxy, point))
        return (182, 92, 198, 99) if box_xyxy else (180, 90, 199, 99)

    plug_in(Point(None, ImportError("no torch")), Point(finder))
    assert [shown(r) for r in asked(client, drawn((181, 91, 199, 99), "Dog"))] == [((182, 92, 198, 99), "Dog")]
    assert [shown(r) for r in asked(client, click(190, 95, "Dog"))] == [((180, 90, 199, 99), "Dog")]
    asked(client, click(140, 50, "Dog"))
    (_, box, _), (_, _, point) = calls
    assert box == pytest.approx((181, 91, 199, 99)) and point == pytest.approx((190, 95))
    assert [image for image, _, _ in calls] == [images.root / "5.jpg"] * 2


@pytest.mark.parametrize("corners", [(0, 0, 20, 20), None, "junk", (1, 2)], ids=["elsewhere", "none", "text", "two"])
def test_a_plug_in_cannot_move_a_box_elsewhere(client, seen, plug_in, corners):
    plug_in(Point(lambda *_: corners))
    rough = drawn((181, 91, 199, 99), "Dog")
    assert asked(client, rough)[0]["value"] == rough["value"]
