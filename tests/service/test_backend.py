"""PPALBackend on the installed label-studio-ml 1.0.9, and unchanged on a double of version 2's base and server."""

import importlib.metadata
import json

import pytest

from ppal_backend.errors import LabelConfigError, StateError
from ppal_backend.service import ml_base
from ppal_backend.service.backend import PPALBackend, PPALModel
from ppal_backend.service.problems import RequestError
from ppal_backend.service.runtime import build_runtime
from tests.service.conftest import CONFIG, OTHER_CONFIG, activate, annotation_payload, task


class Version2Base:
    """label-studio-ml 2's documented base class: a constructor by project, texts kept in a cache per project."""

    cache = {}  # noqa: RUF012

    def __init__(self, project_id=None, label_config=None):
        self.project_id = project_id or ""
        if label_config is not None:
            self.use_label_config(label_config)
        if not self.model_version:
            self.set("model_version", "0.0.1")
        self.setup()

    def setup(self):
        pass

    def use_label_config(self, label_config):
        self.set("label_config", label_config)

    def set_extra_params(self, extra_params):
        self.set("extra_params", extra_params)

    @property
    def extra_params(self):
        params = self.get("extra_params")
        return json.loads(params) if params else {}

    def get(self, key):
        return self.cache.get((self.project_id, key))

    def set(self, key, value):
        self.cache[self.project_id, key] = value

    def has(self, key):
        return (self.project_id, key) in self.cache

    @property
    def label_config(self):
        return self.get("label_config")

    @property
    def model_version(self):
        return self.get("model_version")

    def predict(self, tasks, context=None, **kwargs):
        raise NotImplementedError

    def fit(self, event, data, **additional_params):
        raise NotImplementedError


class Version2Server:
    """What label-studio-ml 2's own server does with a model class, without HTTP."""

    events = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATION_DELETED", "START_TRAINING")

    def __init__(self, model_class):
        self.model_class = model_class

    def setup(self, payload):
        model = self.model_class(project_id=payload["project"].split(".")[0], label_config=payload["schema"])
        if payload.get("extra_params"):
            model.set_extra_params(payload["extra_params"])
        return model.get("model_version")

    def predict(self, payload):
        params = dict(payload.get("params") or {})
        context = params.pop("context", {})
        project_id = payload["project"].split(".")[0]
        model = self.model_class(project_id=project_id, label_config=payload["label_config"])
        return model.predict(payload["tasks"], context=context, **params)

    def webhook(self, payload):
        data = dict(payload)
        event = data.pop("action")
        if event not in self.events:
            return None
        model = self.model_class(str(data["project"]["id"]), label_config=data["project"]["label_config"])
        return model.fit(event, data, job_id="1700000000")


@pytest.fixture
def runtime(settings, store, jobs, predictor, images):
    runtime = build_runtime(settings, store, jobs, predictor, images=images)
    jobs.notifiers.append(runtime.notifier)
    return runtime


@pytest.fixture(params=["1.0.9", "2"])
def model_class(request, runtime, monkeypatch):
    """PPALBackend as a server builds it: from the environment, here with the runtime of the test."""
    monkeypatch.setattr("ppal_backend.service.backend.default_runtime", lambda: runtime)
    if request.param == "1.0.9":
        return PPALBackend
    monkeypatch.setattr(Version2Base, "cache", {})

    class OnVersion2(PPALModel, ml_base.adapt(Version2Base)):
        pass

    return OnVersion2


@pytest.fixture
def server(model_class):
    return Version2Server(model_class)


SETUP = {"project": "7.1795336563", "schema": CONFIG, "hostname": "http://localhost:8080", "extra_params": None}


def test_the_installed_version_is_the_one_from_pypi():
    assert importlib.metadata.version("label-studio-ml") == "1.0.9"
    from label_studio_ml.model import LabelStudioMLBase

    assert issubclass(PPALBackend, LabelStudioMLBase)


def test_version_2_is_not_touched():
    assert ml_base.adapt(Version2Base) is Version2Base


def test_setup_connects_and_answers_the_version(server, store, jobs):
    assert server.setup(SETUP) == "ppal-untrained"
    assert store.projects.get(7).label_config == CONFIG
    assert store.projects.get(7).url == "http://ls.example:8080"
    assert jobs.synced == [7]
    activate(store)
    assert server.setup(SETUP) == "ppal-7-r1"
    assert jobs.synced == [7]


@pytest.mark.parametrize("params", ['{"budget": 20}', {"budget": 20}])
def test_extra_params(server, model_class, store, params):
    server.setup({**SETUP, "extra_params": params})
    assert store.projects.get(7).options == {"budget": 20}
    server.setup(SETUP)  # version 2 says nothing when there are none: what is set stays
    assert store.projects.get(7).options == {"budget": 20}


def test_predict(server, store):
    server.setup(SETUP)
    activate(store)
    payload = {"project": "7.1", "label_config": CONFIG, "tasks": [task(5), task(6)]}
    entries = server.predict({**payload, "params": {"login": None, "password": None, "context": None}})
    assert [entry["model_version"] for entry in entries] == ["ppal-7-r1", "ppal-7-r1"]
    assert [entry["result"][0]["value"]["rectanglelabels"] for entry in entries] == [["Dog"], ["Dog"]]


def test_fit_stores_the_event_and_trains_nothing(server, store, jobs):
    server.setup(SETUP)
    jobs.synced.clear()
    answer = server.webhook(annotation_payload(31, 5))
    assert answer["status"] == "stored"
    assert store.events.pending(7)[0].body["annotations"] == [{"id": 31, "task_id": 5, "usable": True}]
    assert jobs.synced == [7]


def test_two_projects(server, store):
    server.setup(SETUP)
    server.setup({**SETUP, "project": "8.1", "schema": OTHER_CONFIG})
    server.webhook({**annotation_payload(project=8), "project": {"id": 8, "label_config": OTHER_CONFIG}})
    assert (len(store.events.pending(7)), len(store.events.pending(8))) == (0, 1)
    assert (store.projects.get(7).label_config, store.projects.get(8).label_config) == (CONFIG, OTHER_CONFIG)


def test_a_project_connected_by_our_own_app_keeps_its_key_and_options(server, store):
    store.projects.connect(7, "7.1795336563", CONFIG, "http://ls.example:8080", {"budget": 9})
    store.events.add(7, "START_TRAINING", {})
    server.setup(SETUP)
    assert (store.projects.get(7).key, store.projects.get(7).options) == ("7.1795336563", {"budget": 9})
    assert len(store.events.pending(7)) == 1


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
    with pytest.raises(StateError, match="label_config"):
        model.set_extra_params({"budget": 5})


def test_a_project_id_that_is_none(model_class):
    with pytest.raises(RequestError):
        model_class(project_id="seven")


def test_an_event_of_another_project(model_class, store):
    model = model_class(project_id="7", label_config=CONFIG)
    with pytest.raises(RequestError, match="another project"):
        model.fit("ANNOTATION_CREATED", annotation_payload(project=8))
    assert store.events.counts() == {}


def test_values_are_kept(model_class):
    model = model_class(project_id="7", label_config=CONFIG)
    model.set("note", "x")
    assert (model.get("note"), model.has("note"), model.has("other"), model.get("other")) == ("x", True, False, None)
    assert (model.project_id, model.label_config) == ("7", CONFIG)
    model.set_extra_params('{"budget": 5}')
    assert json.loads(model.get("extra_params")) == {"budget": 5}


def test_torch_stays_out_when_version_1_is_imported(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delitem(sys.modules, "label_studio_ml.model", raising=False)
    with ml_base._without_torch_for(1), pytest.raises(ImportError):
        import torch  # noqa: F401
    assert "torch" not in sys.modules
    with ml_base._without_torch_for(2):
        assert "torch" not in sys.modules
