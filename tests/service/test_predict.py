"""/predict: exactly one entry per task, in order, whatever happens to any of them."""

import time

import pytest

from ppal_backend.engines.live import LiveModel, PredictionTimeout
from ppal_backend.errors import CheckpointError, ImageError, LabelStudioUnavailable
from ppal_backend.service.runtime import EXTENSION
from tests.service.conftest import (
    CONFIG,
    OTHER_CONFIG,
    activate,
    annotation_payload,
    predict_payload,
    setup_payload,
    task,
)

EMPTY = {"result": [], "score": 4.9e-5, "model_version": "ppal-7-r1"}


@pytest.fixture
def trained(connected, store):
    activate(store)


def post(client, *tasks, **changes):
    answer = client.post("/predict", json=predict_payload(*tasks, **changes))
    assert answer.status_code == 200
    assert len(answer.json["results"]) == len(tasks)
    assert all(isinstance(entry["model_version"], str) for entry in answer.json["results"])
    return answer.json


def test_boxes_in_percent_with_their_own_score(client, trained):
    (entry,) = post(client, task(5))["results"]
    assert (entry["score"], entry["model_version"]) == (4.9e-5, "ppal-7-r1")
    (region,) = entry["result"]
    assert (region["from_name"], region["to_name"], region["type"]) == ("label", "image", "rectanglelabels")
    value = region["value"]
    assert (value["x"], value["y"], value["width"], value["height"]) == (0.0, 0.0, 50.0, 100.0)
    assert value["rectanglelabels"] == ["Dog"]
    assert region["score"] == pytest.approx(0.9)


def test_the_detector_gets_the_active_model_and_the_cached_files(client, trained, predictor, images, settings):
    post(client, task(5), task(6))
    ((model, asked, timeout_s),) = predictor.calls
    checkpoint = settings.model_dir.resolve() / "projects/7/rounds/1/model.pth"
    assert model == LiveModel("retinanet_tiny", str(checkpoint), ("Cat", "Dog"))
    assert asked == [(5, str(images.root / "5.jpg")), (6, str(images.root / "6.jpg"))]
    assert 0 < timeout_s <= 80
    assert images.asked == [(5, "/data/upload/7/5.jpg"), (6, "/data/upload/7/6.jpg")]


def test_the_address_of_a_template_is_that_of_each_task(client, images, store, caplog):
    config = CONFIG.replace("$image", "https://host.test/$dir/$file")
    assert client.post("/setup", json=setup_payload(schema=config)).status_code == 200
    activate(store)
    tasks = [task(i, data={"dir": i, "file": f"{i}.jpg"}) for i in (5, 6)]
    answer = post(client, *tasks, task(8, data={"file": "8.jpg"}), label_config=config)
    assert images.asked == [(i, f"https://host.test/{i}/{i}.jpg") for i in (5, 6)]
    assert [len(entry["result"]) for entry in answer["results"]] == [1, 1, 0]
    assert "task 8 not predicted: its data has no image under 'dir' and 'file'" in caplog.text


def test_the_projects_score_threshold_counts(client, connected, store, jobs):
    client.post("/setup", json=setup_payload(extra_params={"score_threshold": 0.95}))
    activate(store)
    assert post(client, task(5))["results"] == [EMPTY]


def test_a_class_that_the_config_no_longer_has_is_left_out(client, trained, predictor):
    activate_labels = ("Cat", "Wolf")
    predictor.class_index = 1
    store = client.application.extensions[EXTENSION].store
    activate(store, labels=activate_labels)
    assert post(client, task(5))["results"] == [EMPTY]


def test_no_model_yet(client, connected, predictor, images, caplog):
    caplog.set_level("INFO")
    answer = post(client, task(5), task(6))
    assert answer["model_version"] == "ppal-untrained"
    assert answer["results"] == [{"result": [], "score": 4.9e-5, "model_version": "ppal-untrained"}] * 2
    assert (predictor.calls, images.asked) == ([], [])
    assert "no model is trained yet" in caplog.text


def test_a_random_order_without_a_model_carries_the_queues_version(client, connected, store, predictor):
    activate(store, version="ppal-7-r0", checkpoint="")
    answer = post(client, task(5))
    assert answer["model_version"] == answer["results"][0]["model_version"] == "ppal-7-r0"
    assert predictor.calls == []


def test_an_unknown_project(client, predictor, caplog):
    answer = post(client, task(5), project="99.1")
    assert answer["results"] == [{"result": [], "score": 4.9e-5, "model_version": "ppal-untrained"}]
    assert "not connected" in caplog.text


def test_two_projects_each_with_their_own_model(client, trained, store, predictor):
    client.post("/setup", json=setup_payload(project="8.1", schema=OTHER_CONFIG))
    activate(store, 8, "ppal-8-r1", "projects/8/rounds/1/model.pth", ("Car",))
    predictor.class_index = 0
    payload = predict_payload(task(5, data={"url": "http://h/5.jpg"}), project="8.1", label_config=OTHER_CONFIG)
    other = client.post("/predict", json=payload).json["results"][0]
    own = post(client, task(5))["results"][0]
    assert (other["model_version"], own["model_version"]) == ("ppal-8-r1", "ppal-7-r1")
    assert other["result"][0]["value"]["rectanglelabels"] == ["Car"]
    assert (other["result"][0]["from_name"], other["result"][0]["to_name"]) == ("box", "pic")
    assert own["result"][0]["value"]["rectanglelabels"] == ["Cat"]


BAD_TASKS = {
    "no object": "x",
    "null": None,
    "no id": {"data": {"image": "a.jpg"}},
    "id is text": {"id": "5", "data": {"image": "a.jpg"}},
    "id is true": {"id": True, "data": {"image": "a.jpg"}},
    "id too large": {"id": 10**30, "data": {"image": "a.jpg"}},
    "no data": {"id": 5},
    "data is a list": {"id": 5, "data": ["a.jpg"]},
    "no image": {"id": 5, "data": {"text": "a"}},
    "image is null": {"id": 5, "data": {"image": None}},
    "image is a list": {"id": 5, "data": {"image": ["a.jpg"]}},
}


@pytest.mark.parametrize("bad", BAD_TASKS.values(), ids=BAD_TASKS.keys())
def test_a_bad_task_spoils_no_other(client, trained, caplog, bad):
    first, middle, last = post(client, task(5), bad, task(6))["results"]
    assert first["result"] and last["result"]
    assert middle == EMPTY
    assert "not predicted" in caplog.text


@pytest.mark.parametrize(
    "error", [ImageError("task 6: truncated"), ImageError("task 6: 200 megapixels"), LabelStudioUnavailable("down")]
)
def test_an_unreadable_image_spoils_no_other(client, trained, images, caplog, error):
    images.broken["/data/upload/7/6.jpg"] = error
    first, middle, last = post(client, task(5), task(6), task(7))["results"]
    assert (bool(first["result"]), middle, bool(last["result"])) == (True, EMPTY, True)
    assert str(error) in caplog.text


def test_an_image_that_only_the_detector_cannot_read(client, trained, predictor, caplog):
    predictor.unreadable = {6}
    first, middle, last = post(client, task(5), task(6), task(7))["results"]
    assert (bool(first["result"]), middle, bool(last["result"])) == (True, EMPTY, True)


def test_many_tasks_keep_their_order(client, trained, images, predictor):
    numbers = list(range(30, 0, -1))
    for number in numbers[::3]:
        images.broken[f"/data/upload/7/{number}.jpg"] = ImageError("gone")
    results = post(client, *[task(n) for n in numbers])["results"]
    assert [bool(r["result"]) for r in results] == [i % 3 != 0 for i in range(30)]
    assert len(predictor.calls) > 1  # in chunks, so that a deadline can be kept


@pytest.mark.parametrize("error", [CheckpointError("damaged"), PredictionTimeout("busy")])
def test_a_detector_that_fails_gives_empty_results(client, trained, predictor, caplog, error):
    predictor.error = error
    answer = post(client, *[task(n) for n in range(1, 21)])
    assert answer["results"] == [EMPTY] * 20
    assert len(predictor.calls) == 1  # the rest of the batch is not tried
    assert str(error) in caplog.text


def test_tasks_beyond_the_deadline_get_an_empty_result(client, trained, images, caplog):
    runtime = client.application.extensions[EXTENSION]
    object.__setattr__(runtime, "predict_deadline_s", 0.3)
    slow = images.get
    images.get = lambda task_id, url: time.sleep(0.25) or slow(task_id, url)
    start = time.perf_counter()
    results = post(client, *[task(n) for n in range(1, 25)])["results"]
    assert time.perf_counter() - start < 2
    assert results[0]["result"]
    assert results[-1] == EMPTY
    assert "not predicted" in caplog.text


def test_an_image_that_never_comes_does_not_hold_the_batch(client, trained, images):
    runtime = client.application.extensions[EXTENSION]
    object.__setattr__(runtime, "predict_deadline_s", 0.3)
    images.get = lambda task_id, url: time.sleep(3)
    start = time.perf_counter()
    assert post(client, task(1))["results"] == [EMPTY]
    assert time.perf_counter() - start < 1.5


def test_predictions_under_way_never_take_every_thread(client, trained, predictor):
    slots = client.application.extensions[EXTENSION].predict_slots
    predictor.error = CheckpointError("damaged")
    post(client, task(5))  # gives its slot back, also when it fails
    taken = 0
    while slots.acquire(blocking=False):
        taken += 1
    assert taken == 16
    answer = client.post("/predict", json=predict_payload(task(5)))
    assert (answer.status_code, set(answer.json)) == (503, {"error"})
    assert client.post("/webhook", json=annotation_payload()).status_code == 201
    slots.release()
    post(client, task(5))


def test_no_tasks(client, trained):
    assert post(client) == {"results": [], "model_version": "ppal-7-r1"}


@pytest.mark.parametrize(
    "changes", [{"tasks": None}, {"tasks": {}}, {"project": None}, {"project": "x"}, {"project": -1}]
)
def test_a_request_without_its_fields_is_refused(client, trained, changes):
    answer = client.post("/predict", json={**predict_payload(task(5)), **changes})
    assert answer.status_code == 400
    assert "expected" in answer.json["error"]


@pytest.mark.parametrize(
    "changes", [{"params": None}, {"params": []}, {"params": {"context": {}}}, {"label_config": 5}]
)
def test_what_is_not_used_may_be_anything(client, trained, changes):
    assert post(client, task(5), **changes)["results"][0]["result"]
