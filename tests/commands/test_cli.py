"""The commands: errors are one line and exit code 1, JSON is JSON."""

import json
import threading
import time
from datetime import timedelta

import pytest

from ppal_backend.settings import load_settings
from ppal_backend.store import ModelVersion
from tests.label_studio.fake import LEGACY, PAT, FakeLabelStudio


def test_a_round_for_an_unknown_project_is_an_error_of_one_line(run):
    done = run("round", "7")
    assert done.exit_code == 1
    assert "project 7 is not connected" in done.stderr and "Traceback" not in done.output


def test_asking_for_a_round_leaves_one_for_the_worker(run, store):
    store.projects.connect(7, "7.1", "<View/>", "", {})
    assert run("round", "7").exit_code == 0
    assert run("round", "7", "--rank").exit_code == 0
    assert [(r.kind, r.state) for r in store.rounds.of_project(7)] == [("train", "pending")]


def test_status_as_json_tells_rounds_and_problems(run, store):
    store.projects.connect(7, "7.1", "<View/>", "", {})
    store.projects.set_problem(7, "poll", "Label Studio is down")
    store.rounds.request(7, "train", "x")
    (shown,) = json.loads(run("status", "--json").stdout)
    assert shown["project"] == 7 and shown["problems"] == {"poll": "Label Studio is down"}
    assert shown["rounds"][0]["state"] == "pending"
    assert "Label Studio is down" in run("status", "7").stdout


def test_a_setting_out_of_range_is_explained(run, monkeypatch):
    monkeypatch.setenv("PPAL_PORT", "99999999")
    done = run("status")
    assert done.exit_code == 1 and "port" in done.stderr.lower()


def test_a_secret_setting_is_not_repeated_in_an_error(monkeypatch, run):
    monkeypatch.setenv("LABEL_STUDIO_URL", "ftp://somewhere")
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "very-secret-token")
    done = run("status")
    assert done.exit_code == 1 and "very-secret-token" not in done.output
    assert "http://" in done.stderr


def test_every_command_has_help(run):
    for words in (["--help"], ["demo", "--help"], ["round", "--help"], ["zoo", "--help"]):
        assert run(*words).exit_code == 0


@pytest.mark.parametrize(("variable", "value"), [("PPAL_STRATEGY", "pppal"), ("PPAL_DETECTOR", "no_such_detector")])
@pytest.mark.parametrize("command", ["up", "serve", "worker"])
def test_defaults_that_no_project_could_use_are_refused_at_the_start(run, monkeypatch, command, variable, value):
    for name in ("launcher.up", "launcher.serve", "worker.worker.run_worker"):
        monkeypatch.setattr(f"ppal_backend.{name}", lambda *_, **__: pytest.fail("started all the same"))
    monkeypatch.setenv(variable, value)
    done = run(command)
    assert done.exit_code == 1 and variable in done.stderr and value in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["up", "worker"])
def test_gpus_reach_the_processes_that_run_rounds(run, monkeypatch, command):
    monkeypatch.setenv("PPAL_GPUS", "1")
    seen = []
    for name in ("launcher.up", "worker.worker.run_worker"):
        monkeypatch.setattr(f"ppal_backend.{name}", lambda *_, **__: seen.append(load_settings().gpus))
    assert run(command, "--gpus", "4").exit_code == 0 and run(command).exit_code == 0
    assert seen == [4, 4], "without the option the environment stands"


class TestEightyColumns:
    """Nothing is cut off, and what must be typed stands in one line."""

    @pytest.fixture(autouse=True)
    def narrow(self, run, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")

    def shown(self, done, columns=80):
        assert done.exit_code == 0, done.output
        assert "\u2026" not in done.stdout, "something is cut off"
        assert max(len(line) for line in done.stdout.splitlines() if "\u2502" in line) <= columns
        return done.stdout

    def test_versions(self, run, store):
        store.projects.connect(7, "7.1", "<View/>", "", {})
        name, detector = "ppal-p7-r12-1c9e5f", "faster_rcnn_r50_fpn_with_a_long_name"
        store.versions.activate(ModelVersion(7, name, 12, detector, "", ("a",), None, {"map": 0.25}))
        assert name in self.shown(run("versions", "7"))

    def test_versions_tell_the_time_on_the_readers_clock(self, run, store, monkeypatch):
        store.projects.connect(7, "7.1", "<View/>", "", {})
        store.versions.activate(ModelVersion(7, "ppal-r1-a", 1, "tiny", "", ("a",), None, {}))
        here = store.versions.active(7).created_at + timedelta(hours=9)
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        monkeypatch.setenv("COLUMNS", "120")
        time.tzset()
        try:
            assert f"{here:%Y-%m-%d %H:%M}" in self.shown(run("versions", "7"), 120)
        finally:
            monkeypatch.undo()
            time.tzset()

    def test_zoo_list(self, run):
        names = list(json.loads(run("zoo", "list", "--json").stdout))
        text = self.shown(run("zoo", "list"))
        assert len(names) > 10 and [name for name in names if f" {name} " not in text] == []
        assert len(text.splitlines()) < 5 * len(names), "titles are read in a few lines"
        words = {word for line in text.splitlines() for word in line.replace("\u2502", " ").split()}
        assert {"parameters)", "convolutions,", "unlabelled"} <= words, "no word is broken"
        assert "ppal zoo show NAME" in text and "rtmdet" not in words

    def test_settings(self, run):
        text = self.shown(run("settings"))
        for name in ("PPAL_TIMES_BY_ANNOTATOR", "LABEL_STUDIO_PUBLIC_URL", "LABEL_STUDIO_API_KEY", "MODEL_DIR"):
            assert name in text

    def test_status(self, run, store):
        store.projects.connect(7, "7.1", "<View/>", "", {})
        store.rounds.request(7, "train", "a very long reason " * 9)
        assert self.shown(run("status", "7")).count("reason") == 9


class TestUp:
    """What ``ppal up`` says before it starts anything."""

    @pytest.fixture
    def up(self, run, monkeypatch):
        class Direct(threading.Thread):
            def start(self):
                self.run()

        monkeypatch.setattr("ppal_backend.launcher.up", lambda: None)
        monkeypatch.setattr("ppal_backend.commands.running.threading.Thread", Direct)
        monkeypatch.setenv("LABEL_STUDIO_URL", "http://ls.test:8080")
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", "k")
        monkeypatch.setenv("PPAL_PUBLIC_URL", "http://ppal.local:9090")
        return lambda: run("up").stderr

    def test_it_tells_both_addresses_the_token_and_what_is_next(self, up, monkeypatch):
        server = FakeLabelStudio()
        monkeypatch.setattr("ppal_backend.label_studio.source.open_client", lambda *a, **o: server.client(PAT, tries=1))
        said = up()
        assert "dashboard: http://ppal.local:9090/ui/" in said
        assert "address to connect in Label Studio (Settings > Model): http://ppal.local:9090\n" in said
        assert "ok token: personal access token of a@example.com" in said and "next: connect a project" in said

    def test_a_refused_token_is_told_and_it_starts_all_the_same(self, up, monkeypatch):
        server = FakeLabelStudio()
        client = server.client(LEGACY[:-1] + "0", tries=1)
        monkeypatch.setattr("ppal_backend.label_studio.source.open_client", lambda *a, **o: client)
        said = up()
        assert "refused" in said and "next: correct that; the backend starts all the same" in said

    def test_a_missing_token_is_named(self, up, monkeypatch):
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", "")
        assert "expected LABEL_STUDIO_API_KEY in the backend's environment" in up()
