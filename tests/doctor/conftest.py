"""A whole installation in memory: state, Label Studio with a connected project, and a service that answers."""

import time
from email.utils import formatdate

import httpx
import pytest

from ppal_backend.detector.environment import Environment
from ppal_backend.doctor.run import diagnose
from ppal_backend.label_studio.client import WEBHOOK_ACTIONS
from ppal_backend.settings import Settings
from ppal_backend.store import Heartbeat, ModelVersion
from tests.label_studio.fake import PAT, FakeLabelStudio

BACKEND = "http://ppal.local:9090"
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="Cat"/></RectangleLabels></View>'
)


class LabelStudio(FakeLabelStudio):
    """With model connections and a clock. ``refusal`` is the answer to a new connection, ``setup_error`` what the
    backend is said to have answered."""

    def __init__(self):
        super().__init__(tasks=2)
        self.project |= {"label_config": CONFIG, "sampling": "Uncertainty sampling", "model_version": "ppal-1-r1"}
        self.connections = []
        self.clock_s = 0.0
        self.date = None
        self.release = "1.23.2"
        self.refusal = None
        self.setup_error = ""

    def connect(self, url=BACKEND, hook=True, **changes):
        row = {"id": len(self.connections) + 1, "url": url, "title": "PPAL", "state": "CO", "error_message": None,
               "auth_method": "NONE", "basic_auth_user": None, "extra_params": None, **changes}  # fmt: skip
        self.connections.append(row)
        if hook:
            self.hooks.append({"id": 1, "organization": 1, "project": 1, "url": url + "/webhook", "headers": {},
                               "actions": list(WEBHOOK_ACTIONS), "send_payload": True, "is_active": True,
                               "send_for_all_actions": False})  # fmt: skip

    def __call__(self, request):
        response = super().__call__(request)
        told = formatdate(time.time() + self.clock_s, usegmt=True) if self.date is None else self.date
        response.headers["Date"] = told
        return response

    def _answer(self, request):
        if request.url.path == "/api/version":
            return httpx.Response(200, json={"release": self.release})
        if request.url.path.startswith("/api/ml"):
            return self._connections(request)
        return super()._answer(request)

    def _connections(self, request):
        import json

        if request.method == "GET":
            return httpx.Response(200, json=self.connections)
        if self.refusal is not None:
            return self.refusal
        body = json.loads(request.content)
        state = {"state": "ER", "error_message": self.setup_error} if self.setup_error else {"state": "CO"}
        if request.method == "POST":
            self.connect(body["url"], hook="." in body["url"], **{k: v for k, v in body.items() if k != "url"}, **state)
            return httpx.Response(201, json=self.connections[-1])
        row = self.connections[int(request.url.path.rsplit("/", 1)[-1]) - 1]
        row.update(body | state)
        return httpx.Response(200, json=row)


@pytest.fixture
def settings(tmp_path):
    return Settings(
        LABEL_STUDIO_API_KEY=PAT,
        LABEL_STUDIO_URL="http://ls.test:8080",
        MODEL_DIR=tmp_path / "state",
        DEVICE="cpu",
        BASIC_AUTH_USER="",
        public_url=BACKEND,
    )


@pytest.fixture
def label_studio():
    server = LabelStudio()
    server.connect()
    return server


@pytest.fixture
def store(store, settings):
    store.projects.connect(1, "1.5", CONFIG, settings.label_studio_url, {})
    store.versions.activate(ModelVersion(1, "ppal-1-r1", 1, "retinanet_tiny", "x.pth", ("Cat",), None, {"map": 0.5}))
    Heartbeat(store.workers).beat()
    return store


@pytest.fixture
def service(monkeypatch):
    """What answers at the backend's address; change ``answer`` for something else."""

    class Service:
        answer = httpx.Response(200, json={"status": "UP", "model_class": "PPALBackend"})

        def get(self, url, timeout):
            self.asked = url
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    service = Service()
    monkeypatch.setattr("ppal_backend.doctor.installation.service.__defaults__", (service.get,))
    return service


@pytest.fixture
def examine(settings, store, label_studio, service, monkeypatch):
    """Findings by check; ``changes`` are settings."""
    monkeypatch.setattr(
        "ppal_backend.detector.environment.check_environment", lambda device: Environment("2", "cpu", "CPU")
    )
    monkeypatch.setattr("ppal_backend.doctor.installation.address.__defaults__", (lambda host, port: ["10.0.0.5"],))

    def run(api_key=PAT, **changes):
        chosen = settings.model_copy(update=changes)
        found = list(diagnose(chosen, store, lambda s, url: label_studio.client(api_key, tries=1)))
        assert len({finding.check for finding in found}) == len(found)
        for finding in found:
            assert finding.seen and bool(finding.advice) == (finding.state != "ok"), finding
        return {finding.check: finding for finding in found}

    return run
