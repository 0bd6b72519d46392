"""``ppal doctor`` and ``ppal connect`` as commands: output, exit codes, no secret."""

import json

import pytest
from typer.testing import CliRunner

from ppal_backend.cli import app
from ppal_backend.doctor import failed, ok, warning
from ppal_backend.doctor.connecting import Step
from ppal_backend.errors import LabelStudioError

WELL = [ok("disk", "has room"), warning("token", "legacy token", "make another")]
ILL = [*WELL, failed("service", "nothing answers at [bold]http://x[/]", "start ppal up")]


@pytest.fixture
def ppal(monkeypatch, tmp_path):
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "0123456789abcdef")
    return lambda *arguments: CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(("findings", "code"), [(WELL, 0), (ILL, 1)])
def test_doctor(ppal, monkeypatch, findings, code):
    monkeypatch.setattr("ppal_backend.doctor.run.diagnose", lambda settings, store: iter(findings))
    done = ppal("doctor")
    assert done.exit_code == code
    assert "ok disk: has room" in done.output
    assert "warning token: legacy token\n   -> make another" in done.output
    assert ("failed service: nothing answers at [bold]http://x[/]" in done.output) == bool(code)
    done = ppal("doctor", "--json")
    assert done.exit_code == code
    assert [(f["check"], f["state"], f["advice"]) for f in json.loads(done.stdout)] == [
        (f.check, f.state, f.advice) for f in findings
    ]


def test_connect(ppal, monkeypatch):
    asked = []

    def connect(client, settings, project, address, extra_params):
        asked.append((client.url, settings.label_studio_url, project, address, extra_params))
        return [Step("webhook", "made", "http://b.local:9090/webhook")]

    monkeypatch.setattr("ppal_backend.doctor.connecting.connect_project", connect)
    monkeypatch.setenv("PPAL_PUBLIC_URL", "http://public.local:9090")
    done = ppal("connect", "http://ls.test:8080/", "--project", "7", "--backend", "http://b.local:9090")
    assert done.exit_code == 0 and "webhook: made http://b.local:9090/webhook" in done.output
    done = ppal("connect", "http://ls.test:8080", "--project", "7", "--extra-params", '{"budget": 5}', "--json")
    assert json.loads(done.stdout) == [{"what": "webhook", "done": "made", "detail": "http://b.local:9090/webhook"}]
    monkeypatch.delenv("PPAL_PUBLIC_URL")
    ppal("connect", "http://ls.test:8080", "--project", "7")
    url = "http://ls.test:8080"
    assert asked == [
        (url, url, 7, "http://b.local:9090", ""),
        (url, url, 7, "http://public.local:9090", '{"budget": 5}'),
        (url, url, 7, "http://localhost:9090", ""),
    ]


def test_connect_tells_an_error_in_one_line(ppal, monkeypatch):
    def connect(*_):
        raise LabelStudioError("it refused; mend that")

    monkeypatch.setattr("ppal_backend.doctor.connecting.connect_project", connect)
    done = ppal("connect", "http://ls.test:8080", "--project", "7")
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert "error: it refused; mend that" in done.stderr
