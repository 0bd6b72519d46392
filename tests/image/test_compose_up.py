"""docker-compose.yml with profile cpu, from the README's words to the second round, and after down and up again."""

import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import requests

from ppal_backend.datasets.ground_truth import read_user_coco
from ppal_backend.demo.annotator import ScriptedAnnotator
from ppal_backend.demo.run import label_config_of
from ppal_backend.rig.label_studio_server import personal_token
from ppal_backend.rig.session import LabelStudioSession
from ppal_backend.synthetic.scenes import generate
from tests.image.buildah import IMAGE, ROOT
from tests.image.conftest import CACHE
from tests.image.docker import Engine, build_stand_ins, compose_command, what_is_missing
from tests.servers import free_port, wait_for

pytestmark = pytest.mark.image
SERVICES = ("label-studio", "postgres", "redis", "ppal", "worker")
PASSWORDS = ("POSTGRES_PASSWORD", "PPAL_DB_PASSWORD", "REDIS_PASSWORD", "BASIC_AUTH_PASS")
PERSON = ("anna@example.com", "label-studio-1")
IMAGES, EACH = 60, 12


@pytest.fixture(scope="module")
def engine(buildah, tmp_path_factory):
    if reason := what_is_missing():
        pytest.skip(reason)
    stand_ins = build_stand_ins(buildah, tmp_path_factory.mktemp("stand-ins"))
    engine = Engine(CACHE / "docker", Path(tempfile.mkdtemp(prefix="ppal-dk-", dir="/var/tmp")))
    engine.start()
    try:
        for name, image in {**stand_ins, "ppal-backend:cpu": IMAGE}.items():
            engine.take(buildah, image, name)
        yield engine
    finally:
        engine.stop()


class Project:
    """A checkout's files for Compose, and its commands."""

    def __init__(self, engine, folder):
        self.engine, self.folder = engine, folder
        (folder / "scripts").mkdir(parents=True)
        text = (ROOT / "docker-compose.yml").read_text()
        if compose_command() == ["docker-compose"]:  # 1.29 does not read a number of GPUs from a variable
            text = text.replace('count: "${PPAL_GPUS:-1}"', "count: 1")
        (folder / "docker-compose.yml").write_text(text)
        shutil.copy(ROOT / "scripts/postgres-init.sh", folder / "scripts")
        shutil.copy(ROOT / ".env.example", folder / ".env")

    def set(self, **values):
        """Fill in lines of .env."""
        text = (self.folder / ".env").read_text()
        for name, value in values.items():
            text, count = re.subn(rf"^{name}=.*$", f"{name}={value}", text, flags=re.M)
            assert count == 1, name
        (self.folder / ".env").write_text(text)

    def value(self, name):
        return re.search(rf"^{name}=(.*)$", (self.folder / ".env").read_text(), re.M)[1]

    def __call__(self, *words):
        return self.engine.run([*compose_command(), *words], cwd=self.folder)

    def ppal(self, *words):
        return self("exec", "-T", "ppal", "ppal", *words)

    def versions(self, project):
        """A project's versions, the oldest first."""
        return json.loads(self.ppal("versions", str(project), "--json"))

    def state(self, service):
        """What Docker knows of a service's container."""
        return json.loads(self.engine("inspect", self("ps", "-a", "-q", service) or self("ps", "-q", service)))[0][
            "State"
        ]


def sign_up(url):
    """Make the first account as its page does."""
    with requests.Session() as http:
        http.get(f"{url}/user/signup/", timeout=60)
        data = {"email": PERSON[0], "password": PERSON[1], "csrfmiddlewaretoken": http.cookies["csrftoken"]}
        answer = http.post(f"{url}/user/signup/", data=data, headers={"Referer": url}, timeout=60)
        assert answer.ok and "/user/" not in answer.url, answer.url


def upload(session, truth):
    """A project with the images; its id."""
    made = session.post("/api/projects/", json={"title": "photos", "label_config": label_config_of(truth.labels)})["id"]
    files = {f"f{i}": (path.name, path.read_bytes()) for i, path in enumerate(truth.paths().values())}
    session.post(f"/api/projects/{made}/import", files=files)
    return made


@pytest.fixture
def project(engine, tmp_path, told):
    """Compose's files as the README says, with passwords; all that it made is gone afterwards."""
    project = Project(engine, tmp_path / "ppal")
    project.set(**{name: os.urandom(12).hex() for name in PASSWORDS}, START_TRAINING_EACH_N_UPDATES=EACH)
    project.set(LABEL_STUDIO_PORT=free_port(), PPAL_PORT=free_port())
    try:
        yield project
    finally:  # a fixture is not told whether its test failed
        lines = project("logs", "--tail=400", "--no-color").splitlines()
        told("\n".join([line[:300] for line in lines if "GET /health" not in line][-300:]))
        project("down", "-v", "-t", "5")


def test_connect_label_train_and_come_back(project, tmp_path, told):
    def timed(what, condition, seconds):
        started = time.monotonic()
        wait_for(condition, what, seconds, every_s=5)
        told(f"{what}: {time.monotonic() - started:.0f} s")

    def up(*services):
        project("up", "-d", *services)
        for service in services or SERVICES:
            healthy = lambda service=service: project.state(service)["Health"]["Status"] == "healthy"  # noqa: E731
            timed(f"{service} is healthy", healthy, 900)

    up("label-studio")
    url = f"http://localhost:{project.value('LABEL_STUDIO_PORT')}"
    sign_up(url)
    token = personal_token(url, *PERSON)
    project.set(LABEL_STUDIO_API_KEY=token)
    up()
    truth = read_user_coco(generate(tmp_path / "data", IMAGES, 0))
    session = LabelStudioSession(url, token)
    number = upload(session, truth)
    said = project.ppal("connect", "http://label-studio.local:8080", "--project", str(number))
    assert "http://ppal.local:9090" in said
    timed("the first order", lambda: len(project.versions(number)) == 1, 300)
    by_name = {path.name: boxes for path, boxes in truth.truths_by_path().items()}
    annotator = ScriptedAnnotator(url, token, number, by_name)
    for count in (2, 3):
        assert len(annotator.label(EACH)) == EACH
        timed(f"version {count}", lambda count=count: len(project.versions(number)) == count, 900)
    before = project.versions(number)
    assert [row["active"] for row in before] == [False, False, True]
    assert project.ppal("doctor")
    tasks = session.get("/api/tasks", params={"project": number, "fields": "all", "page_size": 100})["tasks"]
    newest, waiting = before[-1]["version"], [row for row in tasks if not row["total_annotations"]]
    assert waiting and all(newest in row["predictions_model_versions"] for row in waiting)
    assert session.get(f"/api/projects/{number}/")["model_version"] == newest

    started = time.monotonic()
    project("stop")
    told(f"stopped in {time.monotonic() - started:.0f} s")
    codes = {service: project.state(service)["ExitCode"] for service in SERVICES}
    assert {service: codes[service] for service in ("ppal", "worker", "redis", "postgres")} == dict.fromkeys(
        ("ppal", "worker", "redis", "postgres"), 0
    )
    project("down")
    up()
    assert project.versions(number) == before
    assert session.get(f"/api/projects/{number}/")["num_tasks_with_annotations"] == 2 * EACH
    assert project.ppal("doctor")
    assert len(annotator.label(EACH)) == EACH
    timed("version 4", lambda: len(project.versions(number)) == 4, 900)
