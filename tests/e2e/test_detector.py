"""A project that names no detector, on a real Label Studio without any weights at hand: told, and changed over."""

import html
import os
import re
import subprocess
import sys

import pytest
import requests

from ppal_backend.errors import LabelStudioError
from ppal_backend.rig.backend import Backend
from tests.detector.test_real_weights import GIVEN
from tests.e2e.test_loop import ROUND_TIMEOUT_S, wait_for_version

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def bare(label_studio, tmp_path_factory):
    """A backend with an empty cache that chooses by itself; its zoo asks no address, which a test cannot rely on."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "zoo").mkdir()
    order = '[auto]\ncuda = ["yolox_nano"]\ncpu = ["yolox_nano"]\ntrial = "retinanet_tiny"\n'
    (folder / "zoo" / "zoo.toml").write_text("include_packaged = true\n" + order)
    environment = {
        "PPAL_DETECTOR": "auto",
        "PPAL_MODEL_ZOO": str(folder / "zoo"),
        "PPAL_CACHE": str(folder / "cache"),
        "PPAL_POLL_INTERVAL_S": "5",
        "DEVICE": "cpu",
    }
    with Backend(folder / "data", label_studio.url, label_studio.token, environment) as running:
        running.environment = {**os.environ, **environment, "MODEL_DIR": str(running.model_dir), "COLUMNS": "300"}
        yield running


def ppal(backend, *words):
    command = [sys.executable, "-m", "ppal_backend.cli", *map(str, words)]
    done = subprocess.run(command, env=backend.environment, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


def page(backend, project_id, name):
    text = requests.get(f"{backend.url}/ui/projects/{project_id}/{name}", timeout=60).text
    return html.unescape(" ".join(re.sub(r"<[^>]+>", "", text).split()))


def test_the_connect_dialog_tells_that_the_weights_of_a_named_detector_cannot_be_had(label_studio, bare, make_project):
    project_id, _ = make_project("no weights")
    with pytest.raises(LabelStudioError) as refused:
        bare.connect(label_studio.session, project_id, '{"detector": "yolox_nano"}')
    told = str(refused.value)
    assert "the initial weights of yolox_nano cannot be had: there is no file" in told
    assert "/cache/weights` where detectors train, or name another one" in told  # a middle is left out
    assert bare.store.projects.find(project_id) is None


@pytest.mark.shared
@pytest.mark.skipif(not GIVEN.is_file(), reason=f"needs the weights at {GIVEN}")
def test_without_weights_pages_say_so_and_the_command_they_name_changes_the_project_over(
    label_studio, bare, make_project
):
    project_id, _ = make_project("trial")
    bare.connect(label_studio.session, project_id)
    wait_for_version(label_studio, bare, project_id, "ppal-r0-")
    said = "retinanet_tiny was made for trying out; it will not work on photographs"
    for name in ("", "learning", "queue", "settings"):
        assert said in page(bare, project_id, name), name
    told = ppal(bare, "status", project_id)
    command = re.search(r"run `ppal (zoo fetch yolox_nano --from FILE --to \S+)` \(FILE: yolox_nano_coco.pth\)", told)
    assert said in told and command, told
    ppal(bare, *(str(GIVEN) if word == "FILE" else word for word in command[1].split()))
    ppal(bare, "round", project_id, "--rank")
    bare.wait_for_round(project_id, 1, ROUND_TIMEOUT_S)
    assert bare.store.projects.get(project_id).choice.detector == "yolox_nano"
    told = ppal(bare, "status", project_id)
    assert said not in told and "detector auto: yolox_nano (trains on a CPU; its weights are on disk)" in told
    assert "not work on photographs" not in page(bare, project_id, "")
