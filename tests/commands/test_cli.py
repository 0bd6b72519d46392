"""The commands: errors are one line and exit code 1, JSON is JSON."""

import json

import pytest

from ppal_backend.settings import load_settings


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
