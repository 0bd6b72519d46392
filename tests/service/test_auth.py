"""Who gets in: Basic everywhere but /health, and one token per project for its webhook."""

import base64

import pytest
from pydantic import SecretStr

from ppal_backend.errors import SettingsError
from ppal_backend.service.auth import Failures, webhook_token
from tests.service.conftest import annotation_payload, predict_payload, setup_payload, task

USER, PASSWORD = "label-studio", "pässword:with colon"
ON = {"basic_auth_user": USER, "basic_auth_pass": SecretStr(PASSWORD)}


def basic(user, password):
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def guarded(make_app):
    return make_app(**ON).test_client()


@pytest.fixture
def token(settings, guarded):
    for project in ("7.1795336563", "8.1"):
        guarded.post("/setup", json=setup_payload(project=project), headers=basic(USER, PASSWORD))
    return lambda project_id: webhook_token(settings.model_copy(update=ON), project_id)


def ignored(answer):
    """An event that does not prove where it comes from: an error would count against Label Studio's webhook."""
    return answer.status_code == 200 and answer.json == {
        "status": "ignored",
        "reason": "credentials are missing or wrong; run ppal connect",
    }


@pytest.mark.parametrize("path", ["/", "/versions", "/metrics", "/setup", "/predict", "/nothing"])
@pytest.mark.parametrize("method", ["get", "post"])
def test_nothing_but_health_is_open(guarded, store, path, method):
    answer = getattr(guarded, method)(path, **({"json": setup_payload()} if method == "post" else {}))
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert set(answer.json) == {"error"}
    assert store.projects.all() == []


def test_an_event_without_credentials_is_ignored_and_no_error(guarded, store, token):
    assert ignored(guarded.post("/webhook", json=annotation_payload()))
    assert guarded.get("/webhook").status_code == 401
    assert store.events.counts() == {}


def test_probes_learn_whether_it_is_ready_and_not_why(guarded, store):
    """Kubernetes has no credentials to send with a probe; whoever has none is told nothing of the machine."""
    answer = guarded.get("/ready")
    assert (answer.status_code, answer.json) == (503, {"status": "NOT READY"}), "no worker runs"
    store.workers.beat("somewhere:1:1.00")
    answer = guarded.get("/ready")
    assert (answer.status_code, answer.json) == (200, {"status": "READY"})
    assert set(guarded.get("/ready", headers=basic(USER, PASSWORD)).json["checks"]) == {"database", "worker", "disk"}
    assert guarded.get("/ready", headers=basic(USER, "wrong")).status_code == 401, "a mistake is told"
    assert guarded.post("/ready").status_code in (401, 405)


def test_health_is_open(guarded):
    assert guarded.get("/health").status_code == 200


def test_the_right_credentials_open_everything(guarded):
    headers = basic(USER, PASSWORD)
    assert guarded.post("/setup", json=setup_payload(), headers=headers).status_code == 200
    assert guarded.post("/predict", json=predict_payload(task(5)), headers=headers).status_code == 200
    assert guarded.post("/webhook", json=annotation_payload(), headers=headers).status_code == 201
    for path in ("/", "/versions", "/metrics"):
        assert guarded.get(path, headers=headers).status_code == 200
    assert guarded.get("/ready", headers=headers).json["checks"]["database"] == "ok"


WRONG = {
    "other password": basic(USER, "other"),
    "other user": basic("other", PASSWORD),
    "longer password": basic(USER, PASSWORD + "x"),
    "shorter password": basic(USER, PASSWORD[:-1]),
    "empty": basic("", ""),
    "no base64": {"Authorization": "Basic !!!"},
    "only the scheme": {"Authorization": "Basic"},
    "nothing": {"Authorization": ""},
    "digest": {"Authorization": 'Digest username="label-studio"'},
    "password as bearer": bearer("password"),
    "no ASCII": {"Authorization": "Basic \xe4\xf6\xfc"},
    "not UTF-8": {"Authorization": "Basic " + base64.b64encode(b"\xff\xfe:\xff").decode()},
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG.keys())
def test_wrong_credentials(guarded, headers):
    answer = guarded.get("/versions", headers=headers)
    assert answer.status_code == 401
    assert PASSWORD not in answer.text


def test_the_projects_token_opens_its_webhook(guarded, token, store):
    assert guarded.post("/webhook", json=annotation_payload(), headers=bearer(token(7))).status_code == 201
    assert len(store.events.pending(7)) == 1


def test_the_token_opens_no_other_projects_webhook(guarded, token, store):
    answer = guarded.post("/webhook", json=annotation_payload(project=8), headers=bearer(token(7)))
    assert (answer.status_code, answer.json["status"]) == (200, "ignored")
    assert "another project" in answer.json["reason"]
    assert store.events.counts() == {}


@pytest.mark.parametrize("path", ["/versions", "/metrics", "/", "/ready"])
def test_the_token_opens_nothing_else(guarded, token, path):
    assert guarded.get(path, headers=bearer(token(7))).status_code == 401


def test_tampered_tokens(guarded, token, store):
    good = token(7)
    signature = good.split(".")[1]
    tampered = ["", ".", "7.", f"8.{signature}", f"7.{signature[:-1]}", f"07.{signature}x", f"0.{signature}", "9" * 400]
    for text in [*tampered, f"7\N{SUPERSCRIPT TWO}.{signature}".encode().decode("latin-1")]:
        headers = {"Authorization": f"Bearer {text}"}
        answer = guarded.post(
            "/webhook", json=annotation_payload(), headers=headers, environ_base={"REMOTE_ADDR": text[:9]}
        )
        assert ignored(answer), text
    assert store.events.counts() == {}


def test_tokens_differ_by_project_and_password_and_hold_no_secret(settings):
    on = settings.model_copy(update=ON)
    other = settings.model_copy(update={**ON, "basic_auth_pass": SecretStr("another")})
    tokens = {webhook_token(on, 7), webhook_token(on, 8), webhook_token(other, 7)}
    assert len(tokens) == 3
    assert webhook_token(on, 7) == webhook_token(on, 7)
    assert PASSWORD not in webhook_token(on, 7)


def test_without_credentials_set_everything_is_open_and_there_is_no_token(client, settings):
    assert client.get("/versions").status_code == 200
    assert webhook_token(settings, 7) is None


@pytest.mark.parametrize("half", [{"basic_auth_user": USER}, {"basic_auth_pass": SecretStr(PASSWORD)}])
def test_half_the_credentials_are_refused_at_the_start(make_app, half):
    with pytest.raises(SettingsError, match="BASIC_AUTH_USER and BASIC_AUTH_PASS"):
        make_app(**half)


def test_guessing_is_slowed_down_per_address(guarded):
    here, there = {"REMOTE_ADDR": "10.0.0.1"}, {"REMOTE_ADDR": "10.0.0.2"}
    for n in range(10):
        assert guarded.get("/versions", headers=basic(USER, f"guess {n}"), environ_base=here).status_code == 401
    blocked = guarded.get("/versions", headers=basic(USER, PASSWORD), environ_base=here)
    assert blocked.status_code == 429
    assert 1 <= int(blocked.headers["Retry-After"]) <= 61
    assert guarded.get("/health", environ_base=here).status_code == 200
    assert guarded.get("/versions", headers=basic(USER, PASSWORD), environ_base=there).status_code == 200


def test_requests_without_credentials_block_nobody(guarded, token):
    """Label Studio's own webhook has none until the backend writes them into it."""
    for _ in range(30):
        assert ignored(guarded.post("/webhook", json=annotation_payload()))
    assert guarded.get("/versions", headers=basic(USER, PASSWORD)).status_code == 200


def test_a_webhook_with_a_token_of_yesterday_blocks_nobody(guarded, token):
    """It stands in Label Studio until the next poll; its Label Studio must still get in."""
    for _ in range(30):
        assert ignored(guarded.post("/webhook", json=annotation_payload(), headers=bearer("7.old")))
    assert guarded.get("/versions", headers=basic(USER, PASSWORD)).status_code == 200


def test_passwords_are_not_guessed_by_events_either(guarded, token, store):
    for n in range(10):
        assert ignored(guarded.post("/webhook", json=annotation_payload(), headers=basic(USER, f"guess {n}")))
    assert ignored(guarded.post("/webhook", json=annotation_payload(), headers=basic(USER, PASSWORD)))
    assert guarded.get("/versions", headers=basic(USER, PASSWORD)).status_code == 429
    assert store.events.counts() == {}
    assert guarded.post("/webhook", json=annotation_payload(), headers=bearer(token(7))).status_code == 201, "no guess"


def test_failures_are_forgotten_after_the_window():
    now = [0.0]
    failures = Failures(most=2, window_s=60.0, clock=lambda: now[0])
    failures.add("a")
    now[0] = 10.0
    failures.add("a")
    assert failures.blocked_for("a") == 50.0
    assert failures.blocked_for("b") == 0.0
    now[0] = 60.5
    assert failures.blocked_for("a") == 0.0


def test_failures_of_many_addresses_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("ppal_backend.service.auth.MOST_ADDRESSES", 3)
    failures = Failures(most=1, window_s=60.0, clock=lambda: 0.0)
    for address in "abcde":
        failures.add(address)
    assert [failures.blocked_for(a) > 0 for a in "abcde"] == [False, False, True, True, True]
