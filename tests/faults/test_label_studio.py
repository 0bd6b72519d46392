"""Label Studio down, slow, answering 500, refusing the token midway, dropping half of an import, telling twice."""

import json
import time

import httpx
import pytest

from ppal_backend.service.app import create_app
from ppal_backend.service.runtime import EXTENSION
from ppal_backend.worker.sync import Synchroniser
from tests.service.conftest import FakeImages, FakePredictor, RecordingJobs, annotation_payload

pytestmark = pytest.mark.faults

POOL = list(range(1000, 1030))


@pytest.fixture
def place(place):
    place.round("rank")
    place.before = (place.label_studio.served(), place.label_studio.project["model_version"])
    return place


def is_import(request):
    return request.url.path.endswith("/import/predictions")


def interrupted(place, words):
    """Ask for a training that meets the fault; its record, with the old queue still being served."""
    record = place.store.rounds.request(1, "train", "x")
    place.run()
    record = place.store.rounds.get(record.id)
    assert record.state == "running" and words in record.error, record.error
    assert (place.label_studio.served(), place.label_studio.project["model_version"]) == place.before
    assert not place.run(), "it waits before it tries again"
    return record


def goes_on(place, record, recovered=lambda seconds: None):
    """The fault is over: the round goes on and does nothing twice."""
    place.label_studio.fault = lambda request: None
    place.label_studio.after = lambda request, response: response
    place.store.rounds.release(record.id)  # the time to wait is over
    started = time.monotonic()
    place.run()
    recovered(time.monotonic() - started)
    assert place.store.rounds.get(record.id).state == "done"
    active = place.store.versions.active(1)
    assert place.label_studio.project["model_version"] == active.version and active.round_number == record.number
    assert sorted(place.label_studio.served()) == POOL
    assert place.label_studio.counts()[active.version] == 30, "predictions twice"
    calls = [c for c in place.world.calls if c in ("train", "evaluate")]
    assert calls == ["train", "evaluate"]


@pytest.mark.parametrize("fault", ["down", "slow", 500, 503])
def test_label_studio_away_while_publishing(place, fault, recovered):
    def away(request):
        if fault == "down":
            raise httpx.ConnectError("connection refused")
        if fault == "slow":
            raise httpx.ReadTimeout("timed out")
        return httpx.Response(fault, text="<html>oops</html>")

    place.label_studio.fault = lambda request: away(request) if place.store.rounds.running(1) else None
    words = {"down": "cannot reach", "slow": "did not answer in time"}.get(fault, f"answered {fault}")
    record = interrupted(place, words)
    goes_on(place, record, recovered)


@pytest.mark.parametrize("loss", ["500 after storing", "timeout after storing"])
def test_an_import_whose_answer_is_lost_is_read_back_and_not_sent_again(place, loss):
    def lost(request, response):
        if not is_import(request):
            return response
        if loss.startswith("timeout"):
            raise httpx.ReadTimeout("timed out")
        return httpx.Response(500)

    place.label_studio.after = lost
    record = place.round()
    assert record.state == "done" and sum(map(is_import, place.label_studio.requests)) == 2  # one in each round
    assert place.label_studio.counts()[record.metrics["version"]] == 30


def test_the_token_refused_midway(place, recovered):
    refused = httpx.Response(401, json={"detail": "Invalid token."})
    place.label_studio.fault = lambda request: refused if is_import(request) else None
    record = interrupted(place, "refused a legacy token")
    goes_on(place, record, recovered)


def test_half_of_an_import_dropped(place, recovered):
    place.label_studio.drop = lambda item: item["task"] % 2 == 0
    record = place.round()
    assert record.state == "failed" and "expected Label Studio to store 30 predictions, got 15" in record.error
    assert (place.label_studio.served(), place.label_studio.project["model_version"]) == place.before
    assert set(place.label_studio.counts()) == {place.before[1]}, "the half version was left there"
    place.label_studio.drop = lambda item: False
    started = time.monotonic()
    assert place.round().state == "done" and sorted(place.label_studio.served()) == POOL
    recovered(time.monotonic() - started)


def test_duplicate_and_late_deliveries_count_once(place):
    jobs = RecordingJobs()
    app = create_app(place.settings, place.store, jobs, FakePredictor(), images=FakeImages(place.settings.model_dir))
    jobs.notifiers.append(app.extensions[EXTENSION].notifier)
    client = app.test_client()
    synchronise = Synchroniser(place.store, place.settings, None, lambda project_id: None)
    for _ in range(3):
        for annotation_id in (1, 2, 3, 4):
            sent = annotation_payload(annotation_id, 1000 + annotation_id, project=1)
            assert client.post("/webhook", json=sent).status_code in (200, 201)
        synchronise(1)
    assert place.store.ledger.new_count(1) == 4, "five start a training"
    assert place.store.events.counts() == {"done": 12}
    assert not place.store.rounds.is_open(1)


def test_label_studio_down_loses_no_annotation(place):
    """The poll fails, the webhooks' events are applied all the same, and the poll goes on where it was."""
    from ppal_backend.errors import LabelStudioUnavailable
    from ppal_backend.store import SeenAnnotation
    from ppal_backend.worker.sync import ProjectState, TaskUpdate

    class Remote:
        down = True

        def check(self, project_id):
            return {}

        def state(self, project_id):
            if self.down:
                raise LabelStudioUnavailable("it is down")
            return ProjectState(10, 2, place.store.projects.get(1).label_config)

        def updates(self, project_id, since):
            return [TaskUpdate(1009, "2026-01-02", (SeenAnnotation(9, 1009),))]

    remote = Remote()
    synchronise = Synchroniser(place.store, place.settings, remote, lambda project_id: None)
    place.store.events.add(1, "ANNOTATION_CREATED", {"annotations": [{"id": 1, "task_id": 1001}]})
    synchronise(1)
    synchronise.poll(1)
    assert place.store.ledger.new_count(1) == 1 and place.store.projects.get(1).problems["poll"] == "it is down"
    remote.down = False
    synchronise.poll(1)
    assert place.store.ledger.new_count(1) == 2 and "poll" not in place.store.projects.get(1).problems
    assert json.dumps(place.store.projects.get(1).polled_until) == '"2026-01-02"'
