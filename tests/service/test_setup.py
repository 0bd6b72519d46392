"""/setup: what is kept, when work is enqueued, and what is refused with which words."""

import io
import json
import urllib.error

import pytest

from tests.service.conftest import CONFIG, OTHER_CONFIG, activate, setup_payload


def post(client, **changes):
    return client.post("/setup", json=setup_payload(**changes))


def test_connects_and_enqueues_once(client, store, jobs):
    answer = post(client)
    assert (answer.status_code, answer.json) == (200, {"model_version": "ppal-untrained"})
    project = store.projects.get(7)
    assert (project.key, project.label_config, project.options) == ("7.1795336563", CONFIG, {})
    assert project.url == "http://ls.example:8080"  # the operator's, not the payload's
    assert jobs.synced == [7]


def test_the_same_again_enqueues_nothing_and_writes_nothing(client, store, jobs, monkeypatch):
    post(client, extra_params='{"budget": "20"}')
    jobs.synced.clear()
    monkeypatch.setattr(store.projects, "connect", None)
    assert post(client, extra_params={"budget": 20}).status_code == 200
    assert post(client, extra_params='{"budget": "20"}').status_code == 200
    assert post(client, extra_params={"budget": 20}).status_code == 200
    assert jobs.synced == []


def test_the_same_again_is_not_even_checked_again(client, monkeypatch):
    """Label Studio calls this with each next task: it has to cost next to nothing."""
    post(client)
    monkeypatch.setattr("ppal_backend.service.backend.checked_options", None)
    assert post(client).status_code == 200


def test_answers_the_active_version(client, connected, store):
    activate(store)
    assert post(client).json == {"model_version": "ppal-7-r1"}


def test_a_changed_label_config_is_kept_and_enqueued(client, connected, store, jobs):
    wider = CONFIG.replace('<Label value="Dog"/>', '<Label value="Dog"/><Label value="Owl"/>')
    assert post(client, schema=wider).status_code == 200
    assert store.projects.get(7).label_config == wider
    assert jobs.synced == [7]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG.replace('<Label value="Dog"/>', '<Label value="Dog"/><Label value="Dog" background="red"/>'),
        CONFIG.replace("$image", "https://host.test/dir/$file"),
    ],
    ids=["a label twice", "a template"],
)
def test_what_label_studio_takes_connects(client, store, config):
    assert config != CONFIG
    assert post(client, schema=config).status_code == 200
    assert store.projects.get(7).label_config == config


@pytest.mark.parametrize("params", ['{"budget": 20, "strategy": "ppal"}', {"budget": 20, "strategy": "ppal"}])
def test_extra_params_as_text_or_object(client, store, params):
    assert post(client, extra_params=params).status_code == 200
    assert store.projects.get(7).options == {"budget": 20, "strategy": "ppal"}


@pytest.mark.parametrize("params", ["", "  ", None, {}, "{}"])
def test_no_extra_params(client, store, params):
    assert post(client, extra_params=params).status_code == 200
    assert store.projects.get(7).options == {}


def test_two_projects_do_not_meet(client, store, jobs):
    post(client, extra_params={"budget": 3})
    post(client, project="8.1795336599", schema=OTHER_CONFIG)
    activate(store, 7, "ppal-7-r1")
    assert store.projects.get(7).label_config == CONFIG
    assert store.projects.get(8).label_config == OTHER_CONFIG
    assert store.projects.get(8).options == {}
    assert jobs.synced == [7, 8]
    assert post(client, project="8.1795336599", schema=OTHER_CONFIG).json == {"model_version": "ppal-untrained"}


def test_another_project_with_the_same_id_starts_afresh(client, connected, store):
    store.events.add(7, "START_TRAINING", {})
    post(client, project="7.1999999999")
    assert store.projects.get(7).key == "7.1999999999"
    assert store.events.pending(7) == []


def test_a_project_named_without_its_creation_time_keeps_what_is_stored(client, connected, store):
    store.events.add(7, "START_TRAINING", {})
    assert post(client, project="7").status_code == 200
    assert store.projects.get(7).key == "7.1795336563"
    assert len(store.events.pending(7)) == 1


def test_a_queue_that_fails_does_not_fail_the_connection(client, store, jobs, caplog):
    jobs.error = OSError("disk full")
    assert post(client).status_code == 200
    assert store.projects.find(7) is not None
    assert jobs.synced == []
    assert "next poll" in caplog.text


REFUSED = {
    "no boxes": ({"schema": '<View><Image name="i" value="$i"/></View>'}, "RectangleLabels"),
    "no xml": ({"schema": "not xml"}, "XML"),
    "empty config": ({"schema": " "}, "schema"),
    "config is null": ({"schema": None}, "schema"),
    "entities": ({"schema": '<!DOCTYPE v [<!ENTITY a "b">]><View>&a;</View>'}, "entities"),
    "half a surrogate": ({"schema": "<View>\ud800</View>"}, "Unicode"),
    "huge config": ({"schema": "<View>" + " " * 3_000_000 + "</View>"}, "characters"),
    "unknown detector": ({"extra_params": {"detector": "yolo_from_the_web"}}, "retinanet_tiny"),
    "detector is a path": ({"extra_params": {"detector": "../../etc/passwd"}}, "detector"),
    "unknown strategy": ({"extra_params": {"strategy": "magic"}}, "ppal"),
    "strategy for simulations": (
        {"extra_params": {"strategy": "learnloss"}},
        "'learnloss' changes the detector and runs in simulations only",
    ),
    "unknown parameter": ({"extra_params": {"bugdet": 5}}, "known: .*budget"),
    "budget out of range": ({"extra_params": {"budget": 0}}, "budget"),
    "parameters are no json": ({"extra_params": "{budget: 5}"}, "extra parameters"),
    "parameters are a list": ({"extra_params": "[1]"}, "object"),
    "parameters are a number": ({"extra_params": 5}, "object"),
    "parameters with NaN": ({"extra_params": '{"delta": NaN}'}, "valid JSON"),
    "no project": ({"project": None}, "project"),
    "project is text": ({"project": "abc"}, "project"),
    "hostname is no url": ({"hostname": "ls"}, "hostname"),
    "hostname with a strange scheme": ({"hostname": "file:///etc"}, "hostname"),
    "hostname with a strange port": ({"hostname": "http://ls:99999999"}, "hostname"),
    "hostname with a password": ({"hostname": "http://me:pass@ls"}, "hostname"),
    "hostname is a list": ({"hostname": ["http://ls"]}, "hostname"),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_a_reason_and_nothing_kept(client, store, jobs, changes, words):
    answer = client.post("/setup", data=json.dumps(setup_payload(**changes)), content_type="application/json")
    assert 400 <= answer.status_code < 500
    assert_error(answer, words)
    assert store.projects.all() == []
    assert jobs.synced == []


def assert_error(answer, words):
    import re

    assert set(answer.json) == {"error"}
    assert re.search(words, answer.json["error"]), answer.json["error"]
    assert "Traceback" not in answer.text and "secret-key-1" not in answer.text


def test_a_refused_change_keeps_the_project_as_it_was(client, connected, store):
    assert post(client, schema="<View/>").status_code == 400
    assert store.projects.get(7).label_config == CONFIG


def test_without_an_api_key_it_says_what_to_set(make_app, store):
    from pydantic import SecretStr

    client = make_app(label_studio_api_key=SecretStr("")).test_client()
    answer = post(client)
    assert answer.status_code == 400
    assert_error(answer, "LABEL_STUDIO_API_KEY")
    assert store.projects.all() == []


def test_a_known_project_is_told_as_well_when_the_key_is_gone(make_app, connected):
    from pydantic import SecretStr

    answer = post(make_app(label_studio_api_key=SecretStr("")).test_client())
    assert answer.status_code == 400


class TestAddress:
    """The API key goes to this address: who may say where it is?"""

    def test_this_machine_may_be_named_by_anybody(self, make_app, store):
        client = make_app(label_studio_url="").test_client()
        for hostname in ("http://localhost:8080/", "http://127.0.0.1:8080", "http://[::1]:8080"):
            assert post(client, hostname=hostname).status_code == 200
            assert store.projects.get(7).url == hostname.rstrip("/")

    def test_another_machine_may_not(self, make_app, store):
        answer = post(make_app(label_studio_url="").test_client(), hostname="http://evil.example")
        assert answer.status_code == 400
        assert_error(answer, "LABEL_STUDIO_URL")
        assert store.projects.all() == []

    def test_a_name_that_only_looks_like_this_machine_may_not(self, make_app):
        client = make_app(label_studio_url="").test_client()
        for hostname in ("http://localhost.evil.example", "http://127.0.0.1.evil.example", "http://evil/localhost"):
            assert post(client, hostname=hostname).status_code == 400

    def test_no_address_at_all(self, make_app):
        answer = post(make_app(label_studio_url="").test_client(), hostname="")
        assert_error(answer, "LABEL_STUDIO_URL")

    def test_callers_who_know_the_password_may_name_another_machine(self, make_app, store):
        from pydantic import SecretStr

        app = make_app(label_studio_url="", basic_auth_user="ls", basic_auth_pass=SecretStr("pw"))
        payload = setup_payload(hostname="http://ls.internal:8080")
        answer = app.test_client().post("/setup", json=payload, auth=("ls", "pw"))
        assert answer.status_code == 200
        assert store.projects.get(7).url == "http://ls.internal:8080"


def test_the_status_line_tells_the_error_because_label_studio_shows_only_that(client):
    body = {"project": "1.5", "schema": "<View/>", "hostname": "", "access_token": "", "extra_params": None}
    answer = client.post("/setup", json=body)
    assert answer.status_code == 400
    assert answer.status.startswith("400 expected") and "RectangleLabels" in answer.status
    assert answer.get_json()["error"].startswith("expected")


def test_the_status_line_holds_no_tags_because_label_studio_shows_it_as_html(client):
    answer = post(client, extra_params={"detector": "<img src=x onerror=alert(1)>"})
    assert "got 'img src=x onerror=alert(1)'" in answer.status, answer.status
    assert "<img" in answer.get_json()["error"]


def test_the_status_line_holds_the_whole_list_of_detectors(client):
    answer = post(client, extra_params={"detector": "yolo99"})
    assert answer.status.startswith("400 expected a detector of the zoo") and "retinanet_tiny" in answer.status
    assert answer.status.endswith("got 'yolo99'; choose one."), "it was cut off"


def test_broken_extra_parameters_are_answered_with_an_example(client):
    answer = post(client, extra_params="budget: 50")
    assert answer.status == (
        '400 expected the extra parameters, such as {"budget": 50}, to be valid JSON (line 1 column 1).'
    )


def test_weights_that_cannot_be_had_are_told_in_the_dialog_and_not_after_the_images_were_fetched(
    client, store, jobs, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = []

    def offline(request, timeout):
        asked.append((request.get_method(), timeout))
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    answer = post(client, extra_params={"detector": "yolox_tiny"})
    assert answer.status.startswith("400 the initial weights of yolox_tiny cannot be had: there is no file ")
    assert "cannot be reached (no network); get https://download.openmmlab.com" in answer.status
    assert "run `ppal zoo fetch yolox_tiny --from FILE` where detectors train, or name another one." in answer.status
    assert store.projects.all() == [] and jobs.synced == []
    assert asked == [("HEAD", 1.5)], "Label Studio waits three seconds"
    assert post(client, extra_params={"detector": "yolox_nano"}).status_code == 400
    assert post(client, extra_params={"detector": "yolox_tiny", "init_weights": "random"}).status_code == 200
    assert len(asked) == 1


def test_labels_of_one_prompt_are_told_in_the_dialog_of_a_detector_that_reads_prompts(client, store, monkeypatch):
    monkeypatch.setattr("ppal_backend.operations.detectors.weights_problem", lambda *_: "")
    labels = '<Label value="crab_1" prompt="crab"/><Label value="Crab"/>'
    config = f'<View><Image name="i" value="$u"/><RectangleLabels name="l" toName="i">{labels}</RectangleLabels></View>'
    answer = post(client, schema=config, extra_params={"detector": "mm_grounding_dino_t"})
    assert answer.status.startswith(
        "400 expected a prompt of its own for every label, got 'Crab' for 'crab_1' and for "
    )
    assert store.projects.all() == []
    assert post(client, schema=config, extra_params={"detector": "retinanet_tiny"}).status_code == 200
    other = config.replace('"Crab"', '"Crab" prompt="big crab"')
    assert post(client, schema=other, extra_params={"detector": "mm_grounding_dino_t"}).status_code == 200


def test_weights_are_looked_for_when_a_detector_is_named_and_not_at_every_call(
    client, connected, monkeypatch, tmp_path
):
    """Label Studio calls /setup whenever somebody opens the model page or the next task."""
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: asked.append(request) or io.BytesIO())
    for _ in range(3):
        assert post(client, extra_params={"detector": "yolox_tiny", "budget": "60"}).status_code == 200
    assert post(client, extra_params={"detector": "yolox_tiny", "budget": 60}, schema=OTHER_CONFIG).status_code == 200
    assert len(asked) == 1


def test_a_project_that_names_no_detector_connects_without_any_weights_or_network(make_app, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("nobody has to wait for this"))
    assert post(make_app(detector="auto").test_client()).status_code == 200


def test_a_zoo_without_an_order_is_told(make_app, tmp_path):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "zoo.toml").write_text("")
    answer = post(make_app(detector="auto", zoo_dir=tmp_path / "zoo").test_client())
    assert answer.status_code == 400 and "give it a table [auto] of its own, or name a detector" in answer.status
