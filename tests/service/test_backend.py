"""PPALBackend on the installed label-studio-ml 1.0.9, and unchanged on a double of version 2's base and server."""

import base64
import importlib.metadata
import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pydantic import SecretStr

from ppal_backend.errors import LabelConfigError, SettingsError, StateError, StoreUnavailable
from ppal_backend.service import ml_base
from ppal_backend.service.auth import webhook_token
from ppal_backend.service.backend import PPALBackend, PPALModel
from ppal_backend.service.http_errors import RequestError
from ppal_backend.service.runtime import build_runtime
from tests.service.conftest import (
    CONFIG,
    OTHER_CONFIG,
    activate,
    annotation_payload,
    predict_payload,
    setup_payload,
    task,
)
from tests.service.label_studio_ml_2 import Version2Base, server_of

ROOT = Path(__file__).parents[2]
USER, PASSWORD = "label-studio", "a-long-password"
GUARDED = {"basic_auth_user": USER, "basic_auth_pass": SecretStr(PASSWORD)}


@pytest.fixture
def runtime(settings, store, jobs, predictor, images):
    runtime = build_runtime(settings, store, jobs, predictor, images=images)
    jobs.notifiers.append(runtime.notifier)
    return runtime


@pytest.fixture(params=["1.0.9", "2"])
def model_class(request, runtime, monkeypatch):
    """PPALBackend as a server builds it: from the environment, here with the runtime of the test."""
    monkeypatch.setattr("ppal_backend.service.backend.default_runtime", lambda: runtime)
    monkeypatch.setattr("ppal_backend.service.ml_base.default_runtime", lambda: runtime)
    if request.param == "1.0.9":
        return PPALBackend
    monkeypatch.setattr(Version2Base, "cache", {})

    class OnVersion2(PPALModel, ml_base.adapt(Version2Base)):
        pass

    return OnVersion2


@pytest.fixture
def server(model_class):
    """Version 2's own server."""
    return server_of(model_class).test_client()


SETUP = setup_payload(project="7.1795336563")


def test_the_installed_version_is_the_one_from_pypi():
    assert importlib.metadata.version("label-studio-ml") == "1.0.9"
    from label_studio_ml.model import LabelStudioMLBase

    assert issubclass(PPALBackend, LabelStudioMLBase)


def test_version_2_is_not_touched():
    assert ml_base.adapt(Version2Base) is Version2Base


def test_setup_connects_and_answers_the_version(server, store, jobs):
    assert server.post("/setup", json=SETUP).json == {"model_version": "ppal-untrained"}
    project = store.projects.get(7)
    assert (project.key, project.label_config) == ("7.1795336563", CONFIG)
    assert (project.url, project.hostname) == ("http://ls.example:8080", "http://localhost:8080")
    assert jobs.synced == [7]
    activate(store)
    assert server.post("/setup", json=SETUP).json == {"model_version": "ppal-7-r1"}
    assert jobs.synced == [7]


@pytest.mark.parametrize("params", ['{"budget": 20}', {"budget": 20}])
@pytest.mark.parametrize("cleared", [None, "", "{}"])
def test_extra_params(server, store, params, cleared):
    server.post("/setup", json={**SETUP, "extra_params": params})
    assert store.projects.get(7).options == {"budget": 20}
    server.post("/setup", json={**SETUP, "extra_params": cleared})
    assert store.projects.get(7).options == {}


def test_predict(server, store):
    server.post("/setup", json=SETUP)
    activate(store)
    entries = server.post("/predict", json=predict_payload(task(5), task(6))).json["results"]
    assert [entry["model_version"] for entry in entries] == ["ppal-7-r1", "ppal-7-r1"]
    assert [entry["result"][0]["value"]["rectanglelabels"] for entry in entries] == [["Dog"], ["Dog"]]


def test_fit_stores_the_event_and_trains_nothing(server, store, jobs):
    server.post("/setup", json=SETUP)
    jobs.synced.clear()
    answer = server.post("/webhook", json=annotation_payload(31, 5))
    assert (answer.status_code, answer.json["result"]["status"]) == (201, "stored")
    assert store.events.pending(7)[0].body["annotations"] == [{"id": 31, "task_id": 5, "usable": True}]
    assert jobs.synced == [7]


@pytest.mark.parametrize(("path", "body"), [("/webhook", annotation_payload()), ("/predict", predict_payload(task(5)))])
def test_only_setup_connects_a_project(server, store, jobs, path, body):
    answer = server.post(path, json=body)
    assert answer.status_code in (200, 201)
    assert store.projects.all() == [] and jobs.synced == []
    if path == "/webhook":
        assert answer.json["result"]["status"] == "ignored" and "Settings > Model" in answer.json["result"]["reason"]
    else:
        assert [entry["result"] for entry in answer.json["results"]] == [[]]


def test_two_projects(server, store):
    server.post("/setup", json=SETUP)
    server.post("/setup", json={**SETUP, "project": "8.1", "schema": OTHER_CONFIG})
    other = {**annotation_payload(project=8), "project": {"id": 8, "label_config": OTHER_CONFIG}}
    assert server.post("/webhook", json=other).status_code == 201
    assert (len(store.events.pending(7)), len(store.events.pending(8))) == (0, 1)
    assert (store.projects.get(7).label_config, store.projects.get(8).label_config) == (CONFIG, OTHER_CONFIG)


def test_a_project_connected_by_our_own_app_keeps_its_key_and_options(server, client, store):
    client.post("/setup", json={**SETUP, "extra_params": {"budget": 9}})
    store.events.add(7, "START_TRAINING", {})
    server.post("/setup", json={**SETUP, "extra_params": {"budget": 9}})
    assert (store.projects.get(7).key, store.projects.get(7).options) == ("7.1795336563", {"budget": 9})
    assert len(store.events.pending(7)) == 1


class TestErrors:
    """What our own app answers, version 2's server answers too; it would have made 500 and a traceback of them."""

    CASES = (
        ("/setup", {**SETUP, "extra_params": {"budget": 0}}),
        ("/setup", {**SETUP, "extra_params": '{"detector": "no_such_detector"}'}),
        ("/setup", {**SETUP, "schema": "<View/>"}),
        ("/setup", {**SETUP, "hostname": "ftp://ls"}),
        ("/predict", predict_payload(task(5), project="seven")),
        ("/predict", predict_payload(task(5), label_config="<View/>")),
    )

    @pytest.mark.parametrize(("path", "body"), CASES)
    def test_expected_ones_keep_their_status_and_text(self, server, client, store, path, body):
        if path == "/setup":
            ours = client.post(path, json=body)
            theirs = server.post(path, json=body)
            assert (theirs.status, theirs.json) == (ours.status, ours.json)
        else:
            theirs = server.post(path, json=body)
        assert theirs.status_code == 400 and set(theirs.json) == {"error"}
        assert "Traceback" not in theirs.text and "traceback" not in theirs.text

    def test_a_database_that_does_not_answer(self, server, store, monkeypatch):
        server.post("/setup", json=SETUP)

        def gone(*_, **__):
            raise StoreUnavailable("expected the state database to answer; it is tried again")

        monkeypatch.setattr(store.events, "add", gone)
        monkeypatch.setattr(store.versions, "active", gone)
        for path, body in (
            ("/setup", SETUP),
            ("/predict", predict_payload(task(5))),
            ("/webhook", annotation_payload()),
        ):
            answer = server.post(path, json=body)
            assert answer.status_code == 503 and set(answer.json) == {"error"}, path

    def test_outside_of_a_request_they_are_raised(self, model_class):
        with pytest.raises(RequestError):
            model_class(project_id="seven")


class TestBasicAuth:
    @pytest.fixture
    def guarded(self, model_class, runtime, settings, monkeypatch):
        """Version 2's server with its own check, as BASIC_AUTH_USER and BASIC_AUTH_PASS set it up."""
        chosen = settings.model_copy(update=GUARDED)
        monkeypatch.setattr("ppal_backend.service.ml_base.default_runtime", lambda: _With(runtime, chosen))
        app = server_of(model_class, (USER, PASSWORD))
        ml_base.prepare_server(app)
        return app.test_client()

    def test_with_the_right_credentials(self, guarded, store):
        headers = {"Authorization": "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}
        assert guarded.post("/setup", json=SETUP, headers=headers).status_code == 200
        assert guarded.post("/webhook", json=annotation_payload(), headers=headers).status_code == 201
        assert len(store.events.pending(7)) == 1

    def test_the_webhooks_token_is_taken(self, guarded, store, settings):
        store.projects.connect(7, "7.1", CONFIG, "http://ls.example:8080", {})
        token = webhook_token(settings.model_copy(update=GUARDED), 7)
        answer = guarded.post("/webhook", json=annotation_payload(), headers={"Authorization": f"Bearer {token}"})
        assert (answer.status_code, answer.json["result"]["status"]) == (201, "stored")
        other = annotation_payload(project=8)
        answer = guarded.post("/webhook", json=other, headers={"Authorization": f"Bearer {token}"})
        assert "another project" in answer.json["result"]["reason"]
        assert guarded.get("/health", headers={"Authorization": f"Bearer {token}"}).status_code != 200

    @pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer 7.forged"}, {"Authorization": "Basic eDp5"}])
    def test_an_event_that_proves_nothing_is_ignored_and_no_error(self, guarded, store, headers):
        store.projects.connect(7, "7.1", CONFIG, "http://ls.example:8080", {})
        answer = guarded.post("/webhook", json=annotation_payload(), headers=headers)
        assert (answer.status_code, answer.json["status"]) == (200, "ignored")
        assert store.events.counts() == {}
        assert guarded.post("/setup", json=SETUP, headers=headers).status_code in (401, 500)


class _With:
    """A runtime under other settings."""

    def __init__(self, runtime, settings):
        self._runtime, self.settings = runtime, settings

    def __getattr__(self, name):
        return getattr(self._runtime, name)


@pytest.mark.parametrize("config", ["<View/>", "no xml", '<!DOCTYPE v [<!ENTITY a "b">]><View>&a;</View>'])
def test_an_unusable_config_is_refused_before_the_base_class_sees_it(model_class, store, config, monkeypatch):
    seen = []
    monkeypatch.setattr(Version2Base, "use_label_config", lambda self, c: seen.append(c))
    with pytest.raises(LabelConfigError):
        model_class(project_id="7", label_config=config)
    assert seen == []
    assert store.projects.all() == []


def test_a_model_of_no_project(model_class):
    model = model_class()
    assert model.model_version == "ppal-untrained"
    assert model.predict([task(5)])[0]["result"] == []
    with pytest.raises(StateError, match="Settings > Model"):
        model.set_extra_params({"budget": 5})


def test_an_event_of_another_project(model_class, store):
    store.projects.connect(7, "7.1", CONFIG, "http://ls.example:8080", {})
    model = model_class(project_id="7", label_config=CONFIG)
    answer = model.fit("ANNOTATION_CREATED", annotation_payload(project=8))
    assert answer["status"] == "ignored" and "another project" in answer["reason"]
    assert store.events.counts() == {}


def test_values_are_kept(model_class, store):
    store.projects.connect(7, "7.1", CONFIG, "http://ls.example:8080", {})
    model = model_class(project_id="7", label_config=CONFIG)
    model.set("note", "x")
    assert (model.get("note"), model.has("note"), model.has("other"), model.get("other")) == ("x", True, False, None)
    assert (model.project_id, model.label_config) == ("7", CONFIG)
    model.set_extra_params('{"budget": 5}')
    assert json.loads(model.get("extra_params")) == {"budget": 5}
    assert store.projects.get(7).options == {"budget": 5}


def test_torch_stays_out_when_version_1_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delitem(sys.modules, "label_studio_ml.model", raising=False)
    with ml_base._without_torch_for(1), pytest.raises(ImportError):
        import torch  # noqa: F401
    assert "torch" not in sys.modules
    with ml_base._without_torch_for(2):
        assert "torch" not in sys.modules


@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        (
            "label_studio_ml.model",
            "got no module label_studio_ml.model: pip install --no-deps label-studio-ml==1.0.9; ",
        ),
        ("redis", "got no module redis: pip install redis, which label-studio-ml imports"),
    ],
)
def test_without_label_studio_ml_or_what_it_imports_the_command_is_named(monkeypatch, missing, advice):
    """Its own pins cannot be followed, so a plain pip install of the wheel does not bring it."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("label_studio_ml", "redis")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(SettingsError, match=re.escape(advice)):
        ml_base.load()


def test_what_label_studio_ml_imports_comes_with_the_wheel():
    rows = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    text = Path(importlib.util.find_spec("label_studio_ml").origin).with_name("model.py").read_text()
    owners = importlib.metadata.packages_distributions()
    imported = {owners[name][0] for name in re.findall(r"^(?:import|from) (\w+)", text, re.M) if name in owners}
    assert {"redis", "rq", "label-studio-tools"} <= imported <= {Requirement(row).name for row in rows}
