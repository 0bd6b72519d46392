"""``ppal connect`` and ``ppal doctor`` on a real Label Studio, with a backend that wants credentials."""

import json
import os
import subprocess
import sys

import pytest

from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.rig.backend import Backend
from ppal_backend.service.auth import webhook_token
from ppal_backend.settings import load_settings

pytestmark = pytest.mark.e2e

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="Cat"/><Label value="Dog"/></RectangleLabels></View>'
)
CREDENTIALS = {"BASIC_AUTH_USER": "label-studio", "BASIC_AUTH_PASS": "a-long-password"}


@pytest.fixture(scope="module")
def guarded(label_studio, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    # A poll would set right what a test breaks before the doctor sees it; so would a round.
    environment = CREDENTIALS | {"DEVICE": "cpu", "PPAL_POLL_INTERVAL_S": "3600"}
    with Backend(folder, label_studio.url, label_studio.token, environment) as running:
        yield running


@pytest.fixture
def ppal(guarded, label_studio):
    """Runs a command as the operator would, with the backend's settings; (exit code, JSON or text of stderr)."""

    def run(*arguments):
        environment = {
            **os.environ,
            **CREDENTIALS,
            "MODEL_DIR": str(guarded.model_dir),
            "LABEL_STUDIO_URL": label_studio.url,
            "LABEL_STUDIO_API_KEY": label_studio.token,
            "PPAL_PUBLIC_URL": guarded.url,
            "PPAL_PORT": str(guarded.port),
            "DEVICE": "cpu",
        }
        command = [sys.executable, "-m", "ppal_backend.cli", *arguments, "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout) if done.stdout.strip() else done.stderr

    return run


def by_check(findings):
    return {finding["check"]: finding for finding in findings}


def test_connect_then_doctor(ppal, guarded, label_studio):
    project_id = label_studio.create_project("doctor", CONFIG)
    code, steps = ppal("connect", label_studio.url, "--project", str(project_id), "--backend", guarded.url)
    assert code == 0, steps
    done = {step["what"]: step["done"] for step in steps}
    assert (done["connection"], done["webhook"], done["sampling"]) == ("made", "changed", "changed")

    client = LabelStudioClient(label_studio.url, label_studio.token)
    (hook,) = client.webhooks(project_id)
    settings = load_settings(**CREDENTIALS)
    assert hook["url"] == f"{guarded.url}/webhook"
    assert hook["headers"] == {"Authorization": f"Bearer {webhook_token(settings, project_id)}"}
    assert client.project(project_id)["sampling"] == "Uncertainty sampling"
    assert guarded.store.projects.find(project_id) is not None  # /setup came with the right credentials

    code, steps = ppal("connect", label_studio.url, "--project", str(project_id), "--backend", guarded.url)
    assert code == 0 and {step["done"] for step in steps} == {"kept"}
    assert len(client.webhooks(project_id)) == 1

    code, answer = ppal("pause", str(project_id))
    assert code == 0, answer
    task = label_studio.session.post(f"/api/projects/{project_id}/import", json=[{"data": {"image": "/data/x.jpg"}}])
    assert task["task_count"] == 1
    guarded.wait_until(lambda: guarded.store.events.counts().get("done", 0) >= 1, 60, "the webhook to be let in")

    code, findings = ppal("doctor")
    found = by_check(findings)
    for check in ("credentials", "database", "worker", "disk", "detector", "service", "label studio", "token", "clock"):
        assert found[check]["state"] == "ok", found[check]
    for check in ("connection", "webhook", "sampling"):
        assert found[f"project {project_id}: {check}"]["state"] == "ok", found[f"project {project_id}: {check}"]

    label_studio.session.request("PATCH", f"/api/webhooks/{hook['id']}", json={**hook, "headers": {}})
    code, findings = ppal("doctor")
    found = by_check(findings)
    assert code == 1
    assert "credentials" in found[f"project {project_id}: webhook"]["seen"]
    assert "ppal connect" in found[f"project {project_id}: webhook"]["advice"]


def test_connect_refuses_what_label_studio_would_refuse_silently(ppal, guarded, label_studio):
    project_id = label_studio.create_project("refused", "<View><Text name='t' value='$t'/></View>")
    code, told = ppal("connect", label_studio.url, "--project", str(project_id), "--backend", guarded.url)
    assert code == 1 and "RectangleLabels" in told["error"]
    code, told = ppal("connect", label_studio.url, "--project", str(project_id), "--backend", "http://ppal:9090")
    assert code == 1 and "no dot" in told["error"]
    code, told = ppal("connect", label_studio.url, "--project", "999999", "--backend", guarded.url)
    assert code == 1 and "404" in told["error"]
