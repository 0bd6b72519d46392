"""``ppal connect``: what it sets, that it sets it once, and what it refuses."""

import httpx
import pytest
from pydantic import SecretStr

from ppal_backend.doctor.connecting import connect_project
from ppal_backend.errors import LabelConfigError, LabelStudioAuthError, LabelStudioError, SettingsError
from ppal_backend.label_studio.transport import NotFound
from ppal_backend.service.auth import webhook_token
from tests.doctor.conftest import BACKEND, LabelStudio
from tests.label_studio.fake import PAT, jwt

GUARDED = {"basic_auth_user": "ls", "basic_auth_pass": SecretStr("a-long-password")}


@pytest.fixture
def fresh():
    server = LabelStudio()
    server.project["sampling"] = "Sequential sampling"
    return server


@pytest.fixture
def connect(settings, service, fresh):
    def run(url=BACKEND, project_id=1, extra_params="", api_key=PAT, **changes):
        chosen = settings.model_copy(update=changes)
        steps = connect_project(fresh.client(api_key, tries=1), chosen, project_id, url, extra_params)
        return {step.what: step.done for step in steps}

    return run


def test_sets_everything_and_then_nothing(connect, fresh, settings):
    assert connect(**GUARDED) == {
        "label studio": "kept", "labeling config": "kept", "connection": "made", "webhook": "changed",
        "sampling": "changed",
    }  # fmt: skip
    (row,) = fresh.connections
    assert (row["url"], row["auth_method"], row["basic_auth_user"]) == (BACKEND, "BASIC_AUTH", "ls")
    assert row["basic_auth_pass"] == "a-long-password"
    (hook,) = fresh.hooks
    token = webhook_token(settings.model_copy(update=GUARDED), 1)
    assert hook["headers"] == {"Authorization": f"Bearer {token}"}
    assert fresh.project["sampling"] == "Uncertainty sampling"
    writes = len(fresh.paths("POST") + fresh.paths("PATCH"))
    assert set(connect(**GUARDED).values()) == {"kept"}
    refreshes = len([p for p in fresh.paths("POST") if "refresh" in p])
    assert len(fresh.paths("POST") + fresh.paths("PATCH")) - writes == refreshes - 1 == 1  # a token, nothing else
    assert (len(fresh.connections), len(fresh.hooks)) == (1, 1)


def test_the_connection_serves_the_editors_auto_annotation(connect, fresh):
    connect()
    assert fresh.connections[0]["is_interactive"] is True
    fresh.connections[0]["is_interactive"] = False  # as Label Studio's own dialog leaves it
    assert connect()["connection"] == "changed"
    assert fresh.connections[0]["is_interactive"] is True
    assert connect()["connection"] == "kept"


def test_without_credentials(connect, fresh):
    assert connect()["webhook"] == "kept"
    assert fresh.connections[0]["auth_method"] == "NONE"
    assert fresh.hooks[0]["headers"] == {}


def test_a_webhook_that_label_studio_did_not_make_is_made(connect, fresh):
    fresh.connect(hook=False)
    assert connect()["webhook"] == "made"
    assert [hook["url"] for hook in fresh.hooks] == [f"{BACKEND}/webhook"]


def test_a_connection_without_credentials_is_mended(connect, fresh):
    fresh.connect()
    assert connect(**GUARDED)["connection"] == "changed"
    (row,) = fresh.connections
    assert (row["basic_auth_user"], row["project"]) == ("ls", 1)  # without the project Label Studio answers 500


def test_extra_parameters_are_passed_on_and_kept(connect, fresh):
    connect(extra_params='{"budget": 20}')
    assert fresh.connections[0]["extra_params"] == '{"budget": 20}'
    assert connect()["connection"] == "kept"
    assert connect(extra_params='{"budget": 30}')["connection"] == "changed"
    assert fresh.connections[0]["extra_params"] == '{"budget": 30}'


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ppal.local:9090", "address such as"),
        ("http://ppal:9090", "no dot"),
        ("http://ls:password@ppal.local:9090", "without credentials"),
    ],
)
def test_addresses_that_would_not_work(connect, fresh, url, words):
    with pytest.raises(SettingsError, match=words) as caught:
        connect(url)
    assert "password" not in str(caught.value)
    assert fresh.connections == []


def test_no_backend_there(connect, fresh, service):
    service.answer = httpx.ConnectTimeout("late")
    with pytest.raises(SettingsError, match=r"nothing answers at http://ppal\.local:9090/health"):
        connect()
    assert fresh.requests == []


def test_a_wrong_token(connect, fresh):
    with pytest.raises(LabelStudioAuthError, match="create a new one"):
        connect(api_key=jwt("refresh", tag="revoked"))
    assert fresh.connections == []


def test_an_unknown_project(connect, fresh):
    with pytest.raises(NotFound):
        connect(project_id=2)


def test_a_config_without_boxes(connect, fresh):
    fresh.project["label_config"] = '<View><Text name="t" value="$t"/></View>'
    with pytest.raises(LabelConfigError, match="RectangleLabels"):
        connect()
    assert fresh.connections == []


def test_a_blocked_network_names_both_switches(connect, fresh):
    detail = "URL resolves to a reserved network address (block: 127.0.0.0/8)"
    fresh.refusal = httpx.Response(403, json={"detail": detail})
    with pytest.raises(LabelStudioError, match="ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false") as caught:
        connect()
    assert not isinstance(caught.value, LabelStudioAuthError)  # the token is not to blame


def test_a_name_that_label_studio_cannot_resolve(connect, fresh):
    fresh.refusal = httpx.Response(500, text="Can't resolve hostname ppal.local")
    with pytest.raises(LabelStudioError, match="resolve and reach"):
        connect()


def test_a_backend_that_refuses_the_project(connect, fresh):
    fresh.setup_error = "400 Client Error: extra parameters: 'bugdet' is unknown"
    with pytest.raises(LabelStudioError, match="'bugdet' is unknown"):
        connect(extra_params='{"bugdet": 1}')


def test_a_backend_that_refuses_the_project_as_this_version_tells_it(connect, fresh):
    """Label Studio 1.23 answers 400 with the reason and makes no connection."""
    said = "Reason: 400 Client Error: extra parameters: 'bugdet' is unknown (known: detector). for url: http://x/setup"
    body = {"detail": "Validation error", "validation_errors": {"non_field_errors": [said]}}
    fresh.refusal = httpx.Response(400, json=body)
    with pytest.raises(LabelStudioError, match="'bugdet' is unknown") as caught:
        connect(extra_params='{"bugdet": 1}')
    assert "correct that and connect again" in str(caught.value) and "{" not in str(caught.value)


def test_a_connection_that_is_gone_again(connect, fresh):
    def forget(request, response):
        if (request.method, request.url.path) == ("POST", "/api/ml"):
            fresh.connections.clear()
        return response

    fresh.after = forget
    with pytest.raises(LabelStudioError, match=r"could not use .*no connection is there; correct that"):
        connect()


def test_a_webhook_that_label_studio_refuses(connect, fresh):
    fresh.connect(hook=False)
    fresh.fault = lambda r: (
        httpx.Response(400, json={"url": ["Enter a valid URL."]})
        if (r.method, r.url.path) == ("POST", "/api/webhooks/")
        else None
    )
    with pytest.raises(LabelStudioError, match="Enter a valid URL"):
        connect()


def test_a_webhook_that_does_not_keep_its_header(connect, fresh):
    def forget(request, response):
        for hook in fresh.hooks:
            hook["headers"] = {}
        return response

    fresh.after = forget
    with pytest.raises(LabelStudioError, match="no credentials"):
        connect(**GUARDED)
