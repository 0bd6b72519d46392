"""The annotator against a small stand-in that answers as Label Studio does."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ppal_backend.datasets.ground_truth import ImageTruth
from ppal_backend.demo.annotator import ScriptedAnnotator
from ppal_backend.errors import (
    DatasetError,
    LabelConfigError,
    LabelStudioAuthError,
    LabelStudioError,
    LabelStudioUnavailable,
)
from ppal_backend.rig.session import LabelStudioSession

PAT = "head.body.signature"
RECTANGLES = {
    "choice": {"type": "Choices", "to_name": ["image"], "inputs": [{"type": "Image", "value": "photo"}]},
    "label": {"type": "RectangleLabels", "to_name": ["image"], "inputs": [{"type": "Image", "value": "photo"}]},
}


class Stub:
    """State of the stand-in: a queue of tasks, the accepted access tokens, and what it was asked."""

    def __init__(self):
        self.queue = []
        self.submitted = {}
        self.parents = {}
        self.calls = []
        self.views = [{"id": 5}]
        self.parsed = RECTANGLES
        self.refreshes = 0
        self.expire_after = 10**9
        self.uses = 0
        self.broken = {}

    def access(self):
        return f"access-{self.refreshes}"

    def allowed(self, authorization):
        if authorization == "Token legacy":
            return True
        self.uses += 1
        return authorization == f"Bearer {self.access()}" and self.uses <= self.expire_after

    def answer(self, method, path, authorization, body):
        if path == "/api/token/refresh/":
            if body["refresh"] != PAT:
                return 401, {"detail": "no"}
            self.refreshes, self.uses = self.refreshes + 1, 0
            return 200, {"access": self.access()}
        if not self.allowed(authorization):
            return 401, {"detail": "expired"}
        route = path.split("?")[0]
        if route in self.broken:
            return self.broken[route]
        if route == "/api/dm/views" and method == "GET":
            return 200, self.views
        if route == "/api/dm/views/":
            return 201, {"id": 77}
        if route == "/api/dm/actions":
            waiting = [task for task in self.queue if task["id"] not in self.submitted]
            return (200, waiting[0]) if waiting else (404, {"detail": "There are no tasks for demo"})
        if route == "/api/projects/3/":
            return 200, {"parsed_label_config": self.parsed}
        if found := re.fullmatch(r"/api/tasks/(\d+)/annotations/", route):
            self.submitted[int(found[1])] = body["result"]
            self.parents[int(found[1])] = body.get("parent_prediction")
            return 201, {"id": 1000 + int(found[1])}
        return 404, {"detail": "Not found"}


@pytest.fixture
def stub():
    state = Stub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self):
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size) or "null")
            state.calls.append((self.command, self.path, body))
            status, answer = state.answer(self.command, self.path, self.headers.get("Authorization"), body)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = handle_any

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def task(task_id, name="x.jpg", **more):
    return {"id": task_id, "data": {"photo": f"/data/upload/3/{name}"}, "predictions": [], "queue": "q", **more}


def annotator(stub, truth, token=PAT):
    return ScriptedAnnotator(stub.url, token, 3, truth)


def test_boxes_are_sent_as_percent_of_the_image(stub):
    stub.queue = [task(11)]
    truth = {11: ImageTruth(200, 50, (("wolf", 20.0, 5.0, 100.0, 10.0),))}
    assert annotator(stub, truth).label_next() == 11
    (region,) = stub.submitted[11]
    assert region["value"] == {
        "x": 10.0, "y": 10.0, "width": 50.0, "height": 20.0, "rotation": 0, "rectanglelabels": ["wolf"],
    }  # fmt: skip
    assert (region["from_name"], region["to_name"], region["type"]) == ("label", "image", "rectanglelabels")
    assert (region["original_width"], region["original_height"]) == (200, 50)


def test_an_image_without_objects_is_submitted_empty(stub):
    stub.queue = [task(11)]
    annotator(stub, {11: ImageTruth(10, 10)}).label_next()
    assert stub.submitted == {11: []}


def test_tasks_are_labelled_in_the_order_they_are_served(stub):
    stub.queue = [task(9), task(2), task(7)]
    done = []
    worker = annotator(stub, {n: ImageTruth(10, 10) for n in (2, 7, 9)})
    assert worker.label(2, lambda task_id, count: done.append((task_id, count))) == [9, 2]
    assert done == [(9, 1), (2, 2)]
    assert [served.task_id for served in worker.served] == [9, 2]
    assert worker.label(5) == [7] and worker.label_next() is None


def test_it_asks_as_the_labeling_screen_does(stub):
    stub.queue = [task(9)]
    annotator(stub, {9: ImageTruth(10, 10)}).next_task()
    assert ("POST", "/api/dm/actions?id=next_task&project=3&tabID=5", {"project": "3"}) in stub.calls


def test_a_tab_is_made_when_there_is_none(stub):
    stub.views, stub.queue = [], [task(9)]
    annotator(stub, {9: ImageTruth(10, 10)}).next_task()
    assert any("tabID=77" in path for _, path, _ in stub.calls)


def test_pre_annotations_and_queue_are_kept(stub):
    stub.queue = [task(9, predictions=[{"score": 0.25, "model_version": "v1"}], queue="Active learning")]
    served = annotator(stub, {}).next_task()
    assert (served.predictions[0]["model_version"], served.queue) == ("v1", "Active learning")


def test_pre_annotations_are_corrected_and_named_as_parent(stub):
    value = {"x": 10.0, "y": 10.0, "width": 50.0, "height": 21.0, "rotation": 0, "rectanglelabels": ["wolf"]}
    region = {"id": "kept", "from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value}
    stub.queue = [task(11, predictions=[{"id": 70, "score": 0.1, "result": [region]}]), task(12)]
    truth = {11: ImageTruth(200, 50, (("wolf", 20.0, 5.0, 100.0, 10.0),)), 12: ImageTruth(10, 10)}
    annotator(stub, truth).label(2)
    assert stub.submitted[11] == [{**region, "origin": "prediction"}]
    assert stub.parents == {11: 70, 12: None}


@pytest.mark.parametrize("name", ["a%20b.jpg", "0123abcd-a%20b.jpg"])
def test_truth_by_file_name_ignores_the_upload_prefix(stub, name):
    stub.queue = [task(9, name)]
    assert annotator(stub, {"a b.jpg": ImageTruth(10, 10)}).label_next() == 9


def test_a_task_without_truth_is_named_and_not_submitted(stub):
    stub.queue = [task(9, "odd.jpg")]
    with pytest.raises(DatasetError, match=r"task 9 \(odd\.jpg\)"):
        annotator(stub, {8: ImageTruth(10, 10)}).label_next()
    assert stub.submitted == {}


def test_no_rectangles_in_the_labeling_config(stub):
    stub.queue, stub.parsed = [task(9)], {"choice": RECTANGLES["choice"]}
    with pytest.raises(LabelConfigError, match="RectangleLabels"):
        annotator(stub, {9: ImageTruth(10, 10)}).label_next()


def test_an_expired_access_token_is_renewed(stub):
    stub.expire_after = 3
    stub.queue = [task(n) for n in range(6)]
    assert annotator(stub, {n: ImageTruth(10, 10) for n in range(6)}).label(6) == list(range(6))
    assert stub.refreshes >= 3


def test_a_personal_token_is_exchanged_once_while_it_lasts(stub):
    stub.queue = [task(n) for n in range(6)]
    annotator(stub, {n: ImageTruth(10, 10) for n in range(6)}).label(6)
    assert stub.refreshes == 1


def test_a_legacy_token_is_sent_as_such(stub):
    stub.queue = [task(9)]
    assert annotator(stub, {9: ImageTruth(10, 10)}, token="legacy").label_next() == 9
    assert stub.refreshes == 0


@pytest.mark.parametrize("token", ["nonsense", "a.b.c"])
def test_a_refused_token_is_not_shown(stub, token):
    with pytest.raises(LabelStudioAuthError) as caught:
        annotator(stub, {}, token=token).next_task()
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((500, b"<html>boom</html>"), LabelStudioUnavailable),
        ((400, {"detail": "bad"}), LabelStudioError),
        ((404, {"detail": "No Project matches"}), LabelStudioError),
        ((200, b"<html>login</html>"), LabelStudioError),
    ],
)
def test_other_answers_are_told_apart(stub, answer, error):
    stub.broken["/api/dm/actions"] = answer
    with pytest.raises(error):
        annotator(stub, {}).next_task()


def test_nobody_there():
    with pytest.raises(LabelStudioUnavailable, match="check that it runs"):
        LabelStudioSession("http://127.0.0.1:9", "legacy", timeout_s=2).get("/api/version")
