"""Routes for operators, and errors that tell outsiders nothing."""

import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pynvml
import pytest
from pydantic import SecretStr

from ppal_backend.errors import LabelStudioAuthError, LabelStudioUnavailable, StateError, StoreUnavailable
from ppal_backend.service.app import create_app
from ppal_backend.service.metrics import GpuMemory, gpu_memory
from ppal_backend.service.runtime import EXTENSION
from ppal_backend.store import Heartbeat, Lease, SeenAnnotation
from ppal_backend.store.tables import now
from ppal_backend.worker.queue import JobQueue, open_queue
from tests.service.conftest import activate, annotation_payload, predict_payload, setup_payload, task


@pytest.mark.parametrize("path", ["/", "/health"])
def test_health_touches_nothing(client, app, path):
    app.extensions[EXTENSION] = None
    answer = client.get(path)
    assert (answer.status_code, answer.json) == (200, {"status": "UP", "model_class": "PPALBackend"})


def test_ready_while_database_worker_and_disk_are_well(client, store):
    Heartbeat(store.workers).beat()
    answer = client.get("/ready")
    assert (answer.status_code, answer.json) == (
        200,
        {"status": "READY", "checks": {"database": "ok", "worker": "ok", "disk": "ok"}},
    )


def not_ready(client, check):
    answer = client.get("/ready")
    assert (answer.status_code, answer.json["status"]) == (503, "NOT READY")
    assert [name for name, text in answer.json["checks"].items() if text != "ok"] == [check]
    return answer.json["checks"][check]


def test_not_ready_without_its_database(client, store, monkeypatch):
    Heartbeat(store.workers).beat()
    monkeypatch.setattr(store.database, "check", lambda: 1 / 0)
    assert not_ready(client, "database") == "the state database does not answer; see the backend's log"


def test_not_ready_with_a_damaged_database(client, store, monkeypatch):
    def damaged(*arguments):
        raise StateError("expected the state database to be whole")

    monkeypatch.setattr(store.database, "check", damaged)
    monkeypatch.setattr(store.workers, "age_s", damaged)
    answer = client.get("/ready")
    assert answer.status_code == 503 and "nobody knows" in answer.json["checks"]["worker"]


def test_not_ready_without_a_worker(client, store, monkeypatch):
    assert "start ppal worker" in not_ready(client, "worker")
    monkeypatch.setattr("ppal_backend.store.workers.BEAT_EVERY_S", 0.0)
    beat = Heartbeat(store.workers)
    for age_s in (45, -3600):  # long ago, and in the future after a clock was set back
        with monkeypatch.context() as patch:
            patch.setattr(store.database, "now", lambda session, age_s=age_s: now() - timedelta(seconds=age_s))
            beat.beat()
        assert "no worker has shown a sign of life" in not_ready(client, "worker")
    beat.beat()
    assert client.get("/ready").status_code == 200
    beat.end()
    assert "start ppal worker" in not_ready(client, "worker")


def test_not_ready_without_space(make_app, store):
    Heartbeat(store.workers).beat()
    assert "GiB are free" in not_ready(make_app(min_free_gib=2.0**40).test_client(), "disk")


def test_versions_newest_first(client, connected, store):
    assert client.get("/versions").json == {"versions": []}
    activate(store, version="ppal-7-r1")
    activate(store, version="ppal-7-r2")
    assert client.get("/versions").json == {"versions": ["ppal-7-r2", "ppal-7-r1"]}


def samples(client):
    answer = client.get("/metrics")
    assert answer.content_type.startswith("text/plain")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_count_what_happened(client, connected, store, images):
    activate(store)
    store.rounds.request(7, "train", "test")
    client.post("/webhook", json=annotation_payload())
    client.post("/webhook", json={"action": "SOMETHING_ELSE"})
    client.post("/webhook", json={"action": {"x": 1}})
    images.broken["/data/upload/7/6.jpg"] = LabelStudioUnavailable("down")
    images.broken["/data/upload/7/7.jpg"] = LabelStudioAuthError("401")
    client.post("/predict", json=predict_payload(task(5), task(6), task(7)))
    seen = samples(client)
    assert seen['ppal_rounds{state="pending"}'] == 1
    assert seen['ppal_rounds{state="running"}'] == 0
    assert seen['ppal_events{state="pending"}'] == 1
    assert seen["ppal_projects"] == 1
    assert seen['ppal_webhooks_total{action="ANNOTATION_CREATED"}'] == 1
    assert seen['ppal_webhooks_total{action="other"}'] == 2
    assert seen["ppal_predict_seconds_count"] == 1
    assert seen['ppal_predictions_total{outcome="predicted"}'] == 1
    assert seen['ppal_predictions_total{outcome="not_fetched"}'] == 2
    assert seen['ppal_label_studio_errors_total{kind="unavailable"}'] == 1
    assert seen['ppal_label_studio_errors_total{kind="auth"}'] == 1


def test_metrics_tell_of_projects_and_the_machine(make_app, connected, store, settings, monkeypatch):
    monkeypatch.setattr("ppal_backend.service.metrics.gpu_memory", lambda: [GpuMemory(0, 3, 10)])
    queue = JobQueue(settings.jobs_file)
    queue.sync(7)
    queue.sync(7)
    activate(store)
    first = store.rounds.request(7, "train", "test")
    store.rounds.claim(7, Lease.mine())
    store.rounds.finish(first.id, {"map": 0.5, "seconds": {"export": 1.5, "train": 60.0}})
    store.rounds.request(7, "train", "test")
    store.rounds.claim(7, Lease.mine())
    store.ledger.see(7, [SeenAnnotation(1, 2, True), SeenAnnotation(2, 3, True)])
    store.projects.set_problem(7, "webhook", "gone")
    Heartbeat(store.workers).beat()
    client = create_app(settings, store=store, jobs=queue).test_client()
    seen = samples(client)
    assert seen['ppal_map{project="7"}'] == 0.5
    assert seen['ppal_round_step_seconds{project="7",step="train"}'] == 60.0
    assert seen['ppal_round_step_seconds{project="7",step="export"}'] == 1.5
    assert 0 <= seen['ppal_round_running_seconds{project="7",step=""}'] < 60
    assert seen['ppal_new_annotations{project="7"}'] == 2
    assert seen['ppal_problems{project="7",topic="webhook"}'] == 1
    assert seen["ppal_jobs_pending"] == 2
    assert (seen["ppal_queue_up"], seen["ppal_database_up"]) == (1, 1)
    assert 0 <= seen["ppal_worker_heartbeat_age_seconds"] < 60
    assert seen["ppal_disk_free_bytes"] > 0
    assert seen['ppal_gpu_memory_used_bytes{gpu="0"}'] == 3
    assert seen['ppal_gpu_memory_total_bytes{gpu="0"}'] == 10


def test_metrics_without_the_queue_that_is_down(settings, store):
    queue = open_queue(settings.model_copy(update={"queue_url": SecretStr("redis://127.0.0.1:9/0")}))
    seen = samples(create_app(settings, store=store, jobs=queue).test_client())
    assert "ppal_jobs_pending" not in seen and "ppal_projects" in seen
    assert (seen["ppal_queue_up"], seen["ppal_database_up"]) == (0, 1)


@pytest.mark.parametrize("error", [StoreUnavailable("it is away"), StateError("it is damaged")])
def test_metrics_without_the_database_that_is_down(settings, store, monkeypatch, error):
    def down():
        raise error

    monkeypatch.setattr(store.rounds, "counts", down)
    seen = samples(create_app(settings, store=store, jobs=JobQueue(settings.jobs_file)).test_client())
    assert (seen["ppal_queue_up"], seen["ppal_database_up"]) == (1, 0)
    assert "ppal_projects" not in seen and seen["ppal_disk_free_bytes"] > 0


def test_gpu_memory_without_a_driver_and_with_one_that_hangs():
    class Nvml:
        def nvmlInit(self):
            pass

        def nvmlDeviceGetCount(self):
            return 1

        def nvmlDeviceGetHandleByIndex(self, index):
            return index

        def nvmlDeviceGetMemoryInfo(self, handle):
            return SimpleNamespace(used=5, total=9)

        def nvmlShutdown(self):
            pass

    assert gpu_memory(Nvml()) == [GpuMemory(0, 5, 9)]
    for name in ("nvmlInit", "nvmlDeviceGetMemoryInfo"):
        broken = Nvml()

        def fail(*_):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

        setattr(broken, name, fail)
        assert gpu_memory(broken) == []


def test_two_apps_count_apart(make_app):
    first, second = make_app().test_client(), make_app().test_client()
    first.post("/webhook", json={"action": "x"})
    assert 'ppal_webhooks_total{action="other"}' not in samples(second)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("get", "/nothing", 404), ("get", "/setup", 405), ("delete", "/predict", 405), ("post", "/health", 405)],
)
def test_http_errors_are_json(client, method, path, status):
    answer = getattr(client, method)(path)
    assert answer.status_code == status
    assert set(answer.json) == {"error"}
    assert ("Allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize("path", ["/setup", "/predict", "/webhook"])
def test_every_post_wants_json(client, path):
    answer = client.post(path, data={"a": "b"})
    assert (answer.status_code, set(answer.json)) == (415, {"error"})


def test_an_unexpected_error_shows_a_reference_and_no_more(client, jobs, monkeypatch, caplog):
    def explode(*args, **kwargs):
        raise RuntimeError("password=hunter2 at /srv/secret/path")

    monkeypatch.setattr("ppal_backend.service.backend.connect", explode)
    answer = client.post("/setup", json=setup_payload())
    assert answer.status_code == 500
    text = answer.json["error"]
    assert text.startswith("internal error; see the backend's log, reference ")
    assert "hunter2" not in answer.text and "Traceback" not in answer.text and "/srv" not in answer.text
    assert text.rsplit(" ", 1)[1] in caplog.text
    assert "hunter2" in caplog.text  # the operator can find it


@pytest.mark.parametrize(
    ("error", "status"),
    [(LabelStudioUnavailable("down"), 503), (LabelStudioAuthError("token"), 424), (StateError("unknown"), 404)],
)
def test_expected_errors_say_what_they_are(client, monkeypatch, error, status):
    monkeypatch.setattr("ppal_backend.service.backend.connect", lambda *a: (_ for _ in ()).throw(error))
    answer = client.post("/setup", json=setup_payload())
    assert (answer.status_code, answer.json) == (status, {"error": str(error)})


def test_neither_bodies_nor_headers_are_logged(client, connected, caplog):
    caplog.set_level("DEBUG")
    payload = annotation_payload(note="body-marker")
    client.post("/webhook", json=payload, headers={"Authorization": "Bearer header-marker"})
    client.post("/setup", json=setup_payload(access_token="token-marker"))
    client.post("/webhook", data=b'{"broken-marker', content_type="application/json")
    assert "marker" not in caplog.text


def test_the_service_loads_no_detector(settings):
    code = (
        "import sys; from ppal_backend.service.app import create_app; create_app();"
        "heavy = {'torch', 'mmdet', 'mmcv', 'mmengine', 'label_studio_sdk'} & set(sys.modules); print(sorted(heavy))"
    )
    environment = {"MODEL_DIR": str(settings.model_dir), "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_closing_ends_the_prediction_process_and_the_database(app, predictor, monkeypatch):
    closed = []
    monkeypatch.setattr(predictor, "close", lambda: closed.append(True))
    app.extensions[EXTENSION].close()
    assert closed == [True]


def test_closing_passes_on_what_waits(app, client, connected, jobs):
    client.post("/webhook", json=annotation_payload())
    app.extensions[EXTENSION].close()
    assert jobs._synced == [7]


@pytest.mark.parametrize(
    ("accept", "is_browser"),
    [("text/html,application/xhtml+xml,*/*;q=0.8", True), ("*/*", False), ("application/json", False), (None, False)],
)
def test_a_browser_is_sent_to_the_dashboard_and_label_studio_is_not(client, accept, is_browser):
    answer = client.get("/", headers={"Accept": accept} if accept else {})
    if is_browser:
        assert answer.status_code == 302 and answer.location == "/ui/"
    else:
        assert answer.status_code == 200 and answer.json["model_class"] == "PPALBackend"
