"""A Label Studio of one's own: what goes wrong without one, and the real one end to end."""

import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from ppal_backend.datasets.ground_truth import read_user_coco
from ppal_backend.demo.annotator import ScriptedAnnotator
from ppal_backend.errors import LabelStudioAuthError, LabelStudioUnavailable
from ppal_backend.rig import label_studio_server
from ppal_backend.rig.label_studio_server import (
    LabelStudioServer,
    copy_template,
    free_port,
    installed_version,
    isolated_environment,
    personal_token,
    prepare_template,
    upload_names,
)
from ppal_backend.rig.session import LabelStudioSession
from ppal_backend.settings import load_settings
from ppal_backend.synthetic.scenes import generate

TEMPLATES = load_settings().cache_dir / "label-studio"
BINARY = Path(__file__).resolve().parents[2] / ".venv-label-studio" / "bin" / "label-studio"


def command(path, body):
    """An executable Python script that stands in for the label-studio command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return path


HEALTHY = """
import os, sys, subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def do_POST(self):
        body = b'{"token": "a.b.c"}'
        self.send_response(201); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
child = subprocess.Popen(["sleep", "600"])
open("child", "w").write(str(child.pid))
port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_missing_command_is_told(tmp_path):
    with pytest.raises(LabelStudioUnavailable, match="install Label Studio"):
        LabelStudioServer(tmp_path / "label-studio", tmp_path / "data").start()


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path):
    binary = command(tmp_path / "bin" / "label-studio", "import sys; sys.exit('database on fire')")
    with pytest.raises(LabelStudioUnavailable, match="database on fire"):
        LabelStudioServer(binary, tmp_path / "data").start()


def test_only_the_present_run_is_quoted(tmp_path):
    binary = command(tmp_path / "bin" / "label-studio", "import sys; sys.exit('first')")
    server = LabelStudioServer(binary, tmp_path / "data")
    with pytest.raises(LabelStudioUnavailable):
        server.start()
    command(binary, "import sys; sys.exit('second')")
    with pytest.raises(LabelStudioUnavailable, match="second") as caught:
        server.start()
    assert "first" not in str(caught.value)


def test_a_server_that_never_answers_is_ended(tmp_path):
    body = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    waits = []
    server = LabelStudioServer(
        command(tmp_path / "bin" / "label-studio", body), tmp_path / "data", start_timeout_s=1.5, on_wait=waits.append
    )
    with pytest.raises(LabelStudioUnavailable, match="within"):
        server.start()
    assert waits and not alive(int((tmp_path / "data" / "pid").read_text()))


def test_stopping_ends_the_children_too(tmp_path):
    server = LabelStudioServer(command(tmp_path / "bin" / "label-studio", HEALTHY), tmp_path / "data")
    with server:
        assert requests.get(f"{server.url}/health", timeout=5).status_code == 200 and server.token == "a.b.c"
        child = int((tmp_path / "data" / "child").read_text())
        assert alive(child)
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
    server.stop()


def test_a_stubborn_server_is_killed(tmp_path):
    body = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HEALTHY
    server = LabelStudioServer(command(tmp_path / "bin" / "label-studio", body), tmp_path / "data")
    server.start()
    child = int((tmp_path / "data" / "child").read_text())
    server.stop(grace_s=0.5)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) != 0
    assert not alive(child)


def test_a_port_that_somebody_took_is_left_for_another(tmp_path, monkeypatch):
    body = "import sys\nif sys.argv[-1] == '11': print('* Port 11 is in use.', flush=True)\n" + HEALTHY.replace(
        "port = int", "port = 0 if sys.argv[-1] == '11' else int"
    )
    ports = iter([11, free_port()])
    monkeypatch.setattr(label_studio_server, "free_port", lambda: next(ports))
    with LabelStudioServer(command(tmp_path / "bin" / "label-studio", body), tmp_path / "data") as server:
        assert not server.url.endswith(":11")


def test_a_wanted_port_in_use_is_an_error(tmp_path):
    body = "import time; print('* Port 11 is in use.', flush=True); time.sleep(600)"
    server = LabelStudioServer(command(tmp_path / "bin" / "label-studio", body), tmp_path / "data", port=11)
    with pytest.raises(LabelStudioUnavailable, match="choose another"):
        server.start()


def test_stray_settings_do_not_reach_it(tmp_path, monkeypatch):
    for name in ("DEBUG", "HOST", "PASSWORD", "LABEL_STUDIO_HOST", "SENTRY_DSN", "PYTHONPATH", "http_proxy"):
        monkeypatch.setenv(name, "stray")
    variables = isolated_environment(tmp_path)
    assert "stray" not in variables.values()
    assert variables["LABEL_STUDIO_COLLECT_ANALYTICS"] == "false" and variables["LABEL_STUDIO_SENTRY_DSN"] == ""


def test_upload_names_are_distinct_and_plain():
    long = "x" * 90
    names = upload_names([Path("a/1.jpg"), Path("b/1.jpg"), Path("my cät-1.JPG"), Path(f"{long}.png"), Path("é.png")])
    assert names == ["1.jpg", "1_000001.jpg", "my_c_t_1.jpg", "x" * 40 + ".png", "_.png"]


MIGRATE = """
import os, pathlib
runs = pathlib.Path(__file__).with_name("runs")
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
pathlib.Path(os.environ["LABEL_STUDIO_BASE_DATA_DIR"], "label_studio.sqlite3").write_text("migrated")
"""


def installed(folder, body, version="9.9.9"):
    binary = command(folder / "bin" / "label-studio", body)
    (folder / "lib" / "python3.11" / "site-packages" / f"label_studio-{version}.dist-info").mkdir(parents=True)
    (folder / "lib" / "python3.11" / "site-packages" / "label_studio_sdk-1.0.dist-info").mkdir()
    return binary


def test_the_template_is_made_once_and_copied(tmp_path):
    binary = installed(tmp_path / "venv", MIGRATE)
    assert installed_version(binary) == "9.9.9"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        copy_template(binary, tmp_path / "cache", tmp_path / name, os.environ)
        assert (tmp_path / name / "label_studio.sqlite3").read_text() == "migrated"
    assert (binary.parent / "runs").read_text() == "x"
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_used_database_is_not_overwritten(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "label_studio.sqlite3").write_text("annotations")
    copy_template(installed(tmp_path / "venv", MIGRATE), tmp_path / "cache", tmp_path / "data", os.environ)
    assert (tmp_path / "data" / "label_studio.sqlite3").read_text() == "annotations"


def test_a_failed_migration_leaves_no_template(tmp_path):
    binary = installed(tmp_path / "venv", "import sys; sys.exit('no space')")
    with pytest.raises(LabelStudioUnavailable, match="no space"):
        prepare_template(binary, tmp_path / "cache", os.environ)
    assert not list((tmp_path / "cache").glob("*.sqlite3"))


CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">{}</RectangleLabels></View>'
)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    out = tmp_path_factory.mktemp("images") / "demo"
    generate(out, 40, 5, size=64)
    return read_user_coco(out)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    data = tmp_path_factory.mktemp("label-studio") / "data"
    with LabelStudioServer(BINARY, data, template_cache=TEMPLATES) as running:
        yield running


@pytest.fixture
def project(server, truth):
    config = CONFIG.format("".join(f'<Label value="{label}"/>' for label in truth.labels))
    project_id = server.create_project("demo", config, sampling="Uncertainty sampling")
    tasks = server.import_images(project_id, list(truth.paths().values()))
    return project_id, tasks


@pytest.mark.e2e
def test_uploaded_images_are_the_files(server, project, truth):
    _, tasks = project
    assert sorted(tasks.values()) == sorted(truth.paths().values())
    access = server.session.post("/api/token/refresh/", json={"refresh": server.token})["access"]
    for task_id in sorted(tasks)[::13]:
        address = server.session.get(f"/api/tasks/{task_id}/")["data"]["image"]
        answer = requests.get(server.url + address, headers={"Authorization": f"Bearer {access}"}, timeout=30)
        assert answer.content == tasks[task_id].read_bytes()


@pytest.mark.e2e
def test_annotations_read_back_are_the_truth(server, project, truth):
    project_id, tasks = project
    known = truth.truths_by_path()
    worker = ScriptedAnnotator(server.url, server.token, project_id, {t: known[p] for t, p in tasks.items()})
    labelled = worker.label(15)
    assert len(set(labelled)) == 15
    exported = server.session.get(f"/api/projects/{project_id}/export", params={"exportType": "JSON"})
    assert sorted(task["id"] for task in exported) == sorted(labelled)
    for task in exported:
        expected = known[tasks[task["id"]]]
        (annotation,) = task["annotations"]
        assert not annotation["was_cancelled"]
        found = [
            (r["value"]["rectanglelabels"][0], *(r["value"][side] for side in ("x", "y", "width", "height")))
            for r in annotation["result"]
        ]
        assert [box[0] for box in found] == [box[0] for box in expected.boxes]
        for box, true in zip(found, expected.boxes, strict=True):
            assert [value * 0.64 for value in box[1:]] == pytest.approx(list(true[1:]), abs=1e-6)


@pytest.mark.e2e
def test_it_labels_in_the_order_of_published_scores(server, project, truth):
    project_id, tasks = project
    known = truth.truths_by_path()
    order = sorted(tasks, key=lambda task_id: (task_id * 7) % 41)
    items = [
        {"task": task_id, "result": [], "score": rank / len(order), "model_version": "v1"}
        for rank, task_id in enumerate(order)
    ]
    made = server.session.post(f"/api/projects/{project_id}/import/predictions", json=items)
    assert made["created"] == len(items)
    server.session.request("PATCH", f"/api/projects/{project_id}/", json={"model_version": "v1"})
    worker = ScriptedAnnotator(server.url, server.token, project_id, {t: known[p] for t, p in tasks.items()})
    assert worker.label(12) == order[:12]
    assert all(served.predictions[0]["model_version"] == "v1" for served in worker.served)


@pytest.mark.e2e
def test_a_backend_on_this_machine_may_be_connected(server, project):
    project_id, _ = project

    class Backend(BaseHTTPRequestHandler):
        def do_GET(self):
            body = b'{"status": "UP", "model_version": "v0"}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Backend) as backend:
        threading.Thread(target=backend.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{backend.server_port}"
        made = server.session.post("/api/ml", json={"project": project_id, "url": url, "title": "ppal"})
        backend.shutdown()
    assert made["url"] == url
    hooks = server.session.get("/api/webhooks", params={"project": project_id})
    assert [hook["url"] for hook in hooks] == [f"{url}/webhook"]


@pytest.mark.e2e
def test_a_restart_keeps_the_data_and_gives_a_new_token(server, tmp_path):
    data = tmp_path / "data"
    with LabelStudioServer(BINARY, data, template_cache=TEMPLATES) as first:
        project_id = first.create_project("kept", CONFIG.format('<Label value="x"/>'))
        old = first.token
        process = first._process.pid
    assert not alive(process)
    with LabelStudioServer(BINARY, data) as second:
        assert second.session.get(f"/api/projects/{project_id}/")["title"] == "kept"
        assert second.token != old
        with pytest.raises(LabelStudioAuthError):
            LabelStudioSession(second.url, old).get("/api/projects/")
        with pytest.raises(LabelStudioAuthError):
            personal_token(second.url, second.username, "another-one")


@pytest.mark.e2e
def test_it_says_nothing_to_the_outside(server):
    settings = server.session.get("/api/version")
    assert settings["release"]
    environment = Path(f"/proc/{server._process.pid}/environ").read_bytes().decode().split("\0")
    assert "LABEL_STUDIO_COLLECT_ANALYTICS=false" in environment
    page = requests.get(f"{server.url}/user/login/", timeout=30).text
    assert "sentry.io" not in page
    assert server._process.poll() is None
