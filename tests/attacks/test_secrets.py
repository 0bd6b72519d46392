"""Where a secret could turn up: the process list, the database, logs, errors, pages."""

import base64
import logging
import os
import subprocess
import sys

import pytest
import requests
from pydantic import SecretStr

from ppal_backend.errors import LabelStudioError, SettingsError, StoreUnavailable
from ppal_backend.logs import configure_logging
from ppal_backend.rig.backend import Backend
from ppal_backend.service.auth import webhook_token
from ppal_backend.service.dashboard.origins import shown_value
from ppal_backend.settings import load_settings
from ppal_backend.store import open_store
from tests.label_studio.fake import LEGACY
from tests.service.conftest import annotation_payload, predict_payload, setup_payload, task

pytestmark = pytest.mark.attacks
PASSWORD = "correct-horse-battery"
SETUP_TOKEN = "legacy-token-of-the-project-creator"


@pytest.fixture
def guarded(make_app):
    app = make_app(
        label_studio_api_key=SecretStr(LEGACY), basic_auth_user="ls", basic_auth_pass=SecretStr(PASSWORD)
    )  # fmt: skip
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = "Basic " + base64.b64encode(f"ls:{PASSWORD}".encode()).decode()
    return client


def everything(client):
    """One of each request; their answers as text."""
    answers = [
        client.post("/setup", json=setup_payload(access_token=SETUP_TOKEN)),
        client.post("/setup", json=setup_payload(hostname=f"http://me:{PASSWORD}@ls.test")),
        client.post("/setup", json=setup_payload(extra_params={"api_key": LEGACY, "token": SETUP_TOKEN})),
        client.post("/predict", json=predict_payload(task(5), task(6))),
        client.post("/webhook", json=annotation_payload(note=SETUP_TOKEN)),
        client.post("/webhook", json=annotation_payload(), headers={"Authorization": f"Bearer 7.{PASSWORD}"}),
        *(client.get(path) for path in ("/", "/health", "/ready", "/versions", "/metrics", "/nothing")),
    ]
    return "\n".join(f"{answer.status}\n{answer.headers}\n{answer.text}" for answer in answers)


def test_in_no_answer_no_log_line_and_not_in_the_database(guarded, settings, store, capfd):
    configure_logging("DEBUG", secrets=())  # the redaction is the second line of defence, not the first
    shown = everything(guarded) + capfd.readouterr().err
    store.close()
    kept = b"".join(path.read_bytes() for path in settings.model_dir.rglob("*") if path.is_file())
    assert b"ANNOTATION_CREATED" in kept  # it is the right file
    for secret in (LEGACY, PASSWORD, SETUP_TOKEN):
        assert secret not in shown
        assert secret.encode() not in kept


def test_an_error_that_quotes_the_token_is_blanked_in_the_log(guarded, monkeypatch, capfd):
    def explode(*_):
        raise RuntimeError(f"Authorization: Token {LEGACY} for postgresql://ppal:{PASSWORD}@db/ppal")

    monkeypatch.setattr("ppal_backend.service.backend.connect", explode)
    configure_logging("INFO", secrets=(LEGACY, PASSWORD))
    answer = guarded.post("/setup", json=setup_payload())
    log = capfd.readouterr().err
    assert answer.status_code == 500 and "Traceback" in log and "RuntimeError" in log
    for text in (log, answer.text):
        assert LEGACY not in text and PASSWORD not in text


def test_label_studios_answer_that_quotes_the_token_is_blanked():
    from tests.label_studio.fake import FakeLabelStudio, httpx

    server = FakeLabelStudio()
    server.fault = lambda request: httpx.Response(400, json={"detail": f"bad {request.headers['authorization']}"})
    with pytest.raises(LabelStudioError) as caught:
        server.client().version()
    assert LEGACY not in str(caught.value)


def test_settings_do_not_show_them():
    code = "from ppal_backend.settings import load_settings; s = load_settings(); print(s, repr(s), s.model_dump())"
    environment = {**os.environ, "LABEL_STUDIO_API_KEY": LEGACY, "BASIC_AUTH_PASS": PASSWORD}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert LEGACY not in done.stdout and PASSWORD not in done.stdout


def test_a_refused_setting_does_not_show_the_others():
    code = "from ppal_backend.settings import load_settings; load_settings()"
    environment = {**os.environ, "LABEL_STUDIO_API_KEY": LEGACY, "BASIC_AUTH_PASS": PASSWORD, "PPAL_PORT": "no number"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "port" in done.stderr
    assert LEGACY not in done.stderr and PASSWORD not in done.stderr


@pytest.mark.parametrize("url", [f"postgresql://127.0.0.1:9/ppal?user=ppal&password={PASSWORD}",
                                 f"postgresql://ppal:{PASSWORD}/more@127.0.0.1:9/ppal"])  # fmt: skip
def test_not_of_a_database_that_does_not_answer_nor_on_the_settings_page(tmp_path, url, capfd):
    settings = load_settings(MODEL_DIR=tmp_path, database_url=url)
    shown = [str(shown_value(settings.database_url, settings))]
    with pytest.raises((StoreUnavailable, SettingsError)) as refused:
        open_store(settings)
    configure_logging("DEBUG", secrets=settings.secrets)
    logging.getLogger("ppal_backend.worker").error("%s and %s", url, refused.value)
    for text in (*shown, str(refused.value), capfd.readouterr().err):
        assert text and PASSWORD not in text


def test_in_no_command_line(tmp_path, settings):
    """Of the service, the worker and what started them."""
    environment = {"BASIC_AUTH_USER": "ls", "BASIC_AUTH_PASS": PASSWORD, "DEVICE": "cpu"}
    with Backend(tmp_path, "http://127.0.0.1:9", LEGACY, environment) as running:
        assert requests.get(f"{running.url}/versions", timeout=10).status_code == 401
        lines = [" ".join(process.cmdline()) for process in running.find()]
    assert any("gunicorn" in line for line in lines) and any("worker" in line for line in lines)
    on = settings.model_copy(update={"basic_auth_user": "ls", "basic_auth_pass": SecretStr(PASSWORD)})
    token = webhook_token(on, 7)
    for line in lines:
        assert LEGACY not in line and PASSWORD not in line and str(token) not in line
