"""The detector on the pages, in ``ppal status`` and ``ppal settings``: which, why, and how to change it."""

import html
import json
import re
import urllib.error

import pytest

from ppal_backend.operations.detectors import NOT_YET
from ppal_backend.store import Heartbeat
from ppal_backend.structures.round import DetectorChoice
from tests.place import CONFIG
from tests.service.dashboard.conftest import ShownPlace
from tests.service.dashboard.test_banner import PAGES, banner_of
from tests.service.dashboard.test_buttons import press, token_of

REASON = "trains on a CPU; not yolox_tiny: there is no file /w/yolox_tiny.pth and its address cannot be reached"
TRIAL = DetectorChoice("retinanet_tiny", "trial", REASON, "cpu")
RULE = DetectorChoice(
    "yolox_nano", "rule", f"trains on a CPU; its weights are on disk; not yolox_tiny: {'x' * 9}", "cpu"
)


@pytest.fixture
def client(make_place, monkeypatch, tmp_path):
    """Of a project that names no detector; its place is ``client.place``."""
    monkeypatch.setenv("PPAL_DETECTOR", "auto")
    monkeypatch.setenv("PPAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PPAL_MIN_FREE_GIB", "0")
    place = make_place(ShownPlace)
    Heartbeat(place.store.workers).beat()
    client = place.app().test_client()
    client.place = place
    return client


def text_of(page):
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", page).split()))


def choose(client, choice):
    client.place.store.projects.set_choice(1, choice)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_and_status_say_that_the_detector_for_trying_out_is_not_for_photographs(client, page, run):
    assert banner_of(client.get(f"/ui/projects/1/{page}")) == ""
    choose(client, TRIAL)
    banner = banner_of(client.get(f"/ui/projects/1/{page}"))
    said = "retinanet_tiny was made for trying out; it will not work on photographs"
    assert f"The detector is not for photographs: {said} ({REASON})." in banner
    assert "Run ppal zoo fetch yolox_tiny --from FILE --to " in banner and "openmmlab.com" in banner
    assert "the next round then changes over by itself" in banner
    told = " ".join(run("status").stdout.split())
    assert f"warning The detector is not for photographs: {said} ({REASON})" in told
    assert "`ppal zoo fetch yolox_nano --from FILE --to " in told
    assert f"detector auto: retinanet_tiny ({REASON})" in told
    choose(client, RULE)
    assert banner_of(client.get(f"/ui/projects/1/{page}")) == ""


def test_the_projects_page_has_it_too(client):
    choose(client, TRIAL)
    assert "it will not work on photographs" in text_of(client.get("/ui/").text)


def test_the_choice_is_shown_with_its_reason(client, run):
    before = text_of(client.get("/ui/projects/1/settings").text)
    assert f"detector auto: not chosen yet environment (PPAL_DETECTOR) {NOT_YET}" in before
    assert f"Not chosen yet: {NOT_YET}." in before
    assert f"detector auto: {NOT_YET}" in " ".join(run("status").stdout.split())
    choose(client, RULE)
    page = text_of(client.get("/ui/projects/1/settings").text)
    assert f"detector auto: yolox_nano environment (PPAL_DETECTOR) {RULE.reason}" in page
    assert f"yolox_nano : {RULE.reason}." in page
    rows = {row["name"]: row for row in json.loads(run("settings", 1, "--json").stdout)["projects"]}
    assert (rows["detector"]["value"], rows["detector"]["text"]) == ("auto: yolox_nano", RULE.reason)
    (told,) = json.loads(run("status", "--json").stdout)
    assert told["detector"] == {"name": "yolox_nano", "named": False, "reason": RULE.reason, "advice": ""}


def test_a_named_detector_is_shown_as_named_and_has_no_form(client, run):
    client.place.store.projects.connect(1, "1.1", CONFIG, "http://ls.test:8080", {"detector": "retinanet_tiny"})
    choose(client, TRIAL)
    page = client.get("/ui/projects/1/settings")
    assert banner_of(page) == "", "whoever named it knows"
    assert "retinanet_tiny . It is named by the settings" in text_of(page.text)
    assert 'name="detector"' not in page.text
    assert "detector retinanet_tiny (named by the settings)" in " ".join(run("status").stdout.split())


def test_a_person_chooses_on_the_settings_page(client, run):
    page = client.get("/ui/projects/1/settings").text
    assert '<option value="auto">' in page and '<option value="yolox_tiny">' in page
    assert "The next training uses the detector that was chosen" in press(client, "detector", detector="fcos_tiny")
    assert client.place.store.projects.get(1).choice.detector == "fcos_tiny" and client.place.jobs.synced == [1]
    assert '<option value="fcos_tiny" selected>' in client.get("/ui/projects/1/settings").text
    assert "detector auto: fcos_tiny (somebody chose it on the Settings page)" in " ".join(run("status").stdout.split())
    press(client, "detector", detector="auto")
    assert client.place.store.projects.get(1).choice is None


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("yolox_tiny", "the initial weights of yolox_tiny cannot be had: there is no file"),
        ("yolox_nano", "the initial weights of yolox_nano cannot be had: there is no file"),
        ("yolo99", "expected a detector of the zoo"),
        ("", "expected a detector of the zoo"),
        ("../../x", "expected a detector of the zoo"),
    ],
)
def test_one_that_cannot_be_trained_is_refused_and_the_choice_stays(client, monkeypatch, name, wanted):
    def offline(*_arguments, **_options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    choose(client, RULE)
    answer = client.post("/ui/projects/1/detector", data={"token": token_of(client), "detector": name})
    assert answer.status_code == 400 and wanted in text_of(answer.text)
    assert client.place.store.projects.get(1).choice == RULE


def test_a_form_from_elsewhere_chooses_nothing(client):
    assert client.post("/ui/projects/1/detector", data={"token": "x", "detector": "fcos_tiny"}).status_code == 403
    assert client.place.store.projects.get(1).choice is None


def test_a_project_from_before_choices_keeps_its_detector_and_says_what_it_is(client):
    choose(client, DetectorChoice("retinanet_tiny", "upgrade", "it is that of the last training"))
    banner = banner_of(client.get("/ui/projects/1/"))
    assert "will not work on photographs" in banner and "Choose another on the project's Settings page" in banner
    choose(client, DetectorChoice("fcos_r50", "upgrade", "it is that of the last training"))
    assert banner_of(client.get("/ui/projects/1/")) == ""


def test_settings_that_cannot_be_used_do_not_take_status_along(client, run):
    client.place.store.projects.connect(1, "1.1", CONFIG, "http://ls.test:8080", {"detector": "NO NAME"})
    answer = run("status")
    assert answer.exit_code == 0 and "The project's settings cannot be used" in " ".join(answer.stdout.split())
    assert json.loads(run("status", "--json").stdout)[0]["detector"] is None
