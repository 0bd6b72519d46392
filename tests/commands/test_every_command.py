"""What all commands have in common: help with examples that can be run, JSON for facts, exit codes."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ppal_backend.cli import app
from ppal_backend.commands import shared
from ppal_backend.errors import RoundCancelled, StateError
from ppal_backend.store import Lease, ModelVersion
from ppal_backend.store.database import SCHEMA_VERSION
from ppal_backend.structures.round import Progress

ROOT = typer.main.get_command(app)
NO_FACTS = {"up", "serve", "worker"}  # they run until they are stopped
WANTED = {"demo", "up", "serve", "worker", "connect", "status", "round", "rank", "simulate", "report", "zoo", "doctor",
          "rollback", "export", "backup", "restore", "migrate", "export-model", "settings"}  # fmt: skip
UNKNOWN_PROJECT = ["status 8", "round 8", "rollback 8 x", "versions 8", "export 8 --out x", "export-model 8 --out x",
                   "settings 8", "prune 8", "cancel 8", "pause 8"]  # fmt: skip


def leaves(group, prefix=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, (*prefix, name))
        else:
            yield " ".join((*prefix, name)), command


LEAVES = dict(leaves(ROOT))


@pytest.fixture
def store(store):
    store.projects.connect(7, "7.1", "<View/>", "http://ls", {"budget": 9})
    return store


def test_the_commands_are_there():
    assert set(ROOT.commands) >= WANTED
    assert "Exit codes: 0 it worked; 1 an error" in " ".join(CliRunner().invoke(app, ["--help"]).output.split())


@pytest.mark.parametrize("name", LEAVES)
def test_help_has_a_summary_an_example_that_can_be_run_and_tells_every_option(name, run, tmp_path):
    done = run(*name.split(), "--help")
    assert done.exit_code == 0
    command = LEAVES[name]
    examples = re.findall(r"Example: (ppal .+)", command.help)
    assert examples and all(line.startswith(f"ppal {name}") for line in examples), "an example is of this command"
    for line in examples:
        assert line.split("--")[0].strip() in done.output
        words = shlex.split(line)[1 + len(name.split()) :]
        command.make_context(name, words)  # raises where a word is unknown or a value cannot be one
    untold = [p.name for p in command.params if not getattr(p, "help", None) and p.name != "help"]
    assert not untold, "options without a word of help"


@pytest.mark.parametrize("name", sorted(LEAVES.keys() - NO_FACTS))
def test_what_prints_facts_prints_them_as_json_too(name):
    assert "--json" in {option for parameter in LEAVES[name].params for option in parameter.opts}


@pytest.mark.parametrize("name", sorted(NO_FACTS))
def test_what_runs_until_it_is_stopped_has_none(name):
    assert "--json" not in {option for parameter in LEAVES[name].params for option in parameter.opts}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("round 7 --rank", {"project": 7, "round": 1, "kind": "rank", "state": "pending"}),
        ("pause 7", {"project": 7, "paused": True, "changed": True}),
        ("resume 7", {"project": 7, "paused": False, "changed": False}),
        ("prune", {"dry_run": False, "rounds": [], "bytes": 0}),
        ("migrate", {"database": "SQLite", "schema": SCHEMA_VERSION}),
        ("zoo fetch retinanet_tiny", {"detector": "retinanet_tiny"}),
        ("demo-data set --images 2 --seed 3", {"images": 2, "seed": 3, "glyphs": "demo"}),
    ],
)
def test_an_answer_is_one_document(run, store, words, wanted):
    done = run(*words.split(), "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert {key: answer[key] for key in wanted} == wanted


def test_cancelling_tells_each_round(run, store):
    store.rounds.request(7, "train", "x")
    assert json.loads(run("cancel", 7, "--json").stdout) == {
        "project": 7,
        "rounds": [{"round": 1, "state": "cancelled"}],
    }


def test_a_backup_and_its_restore_tell_files_and_bytes(run, store, tmp_path, monkeypatch):
    made = json.loads(run("backup", "b.tar", "--json").stdout)
    size = (tmp_path / "b.tar").stat().st_size
    whole = {"file": "b.tar", "files": 1, "bytes": size, "with_database": True, "own_zoo": None, "left_out": []}
    assert made == whole
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "new"))
    restored = json.loads(run("restore", "b.tar", "--json").stdout)
    assert (restored["files"], restored["with_database"]) == (1, True)
    (tmp_path / "new/zoo").mkdir()
    (tmp_path / "new/zoo/zoo.toml").write_bytes(b"#" * 2**20)
    assert "your own detectors: 1 of them, 1.0 MiB" in run("backup", "c.tar").stdout
    monkeypatch.setenv("PPAL_MODEL_ZOO", str(tmp_path / "new"))
    shutil.move(tmp_path / "new/zoo/zoo.toml", tmp_path / "new/zoo.toml")
    told = run("backup", "d.tar")
    assert f"without your own detectors in {tmp_path / 'new'}" in " ".join(told.stderr.split())


@pytest.mark.parametrize("words", UNKNOWN_PROJECT)
def test_an_error_is_one_document_too_with_the_same_exit_code(run, words):
    plain, told = run(*words.split()), run(*words.split(), "--json")
    assert plain.exit_code == told.exit_code == 1
    answer = json.loads(told.stdout)
    assert (
        answer == {"error": answer["error"], "kind": "StateError"} and "project 8 is not connected" in answer["error"]
    )
    assert plain.stderr.splitlines()[-1] == f"error: {answer['error']}" and plain.stdout == ""


def test_wrong_usage_is_2_and_a_stop_is_130(run, monkeypatch):
    assert run("status", "seven").exit_code == run("fly").exit_code == run("status", "--fast").exit_code == 2

    def stopped(*_, **__):
        raise RoundCancelled("stopped; the same command goes on")

    monkeypatch.setattr("ppal_backend.simulation.run.simulate", stopped)
    assert run("simulate", "--out", "sim").exit_code == 130

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ppal_backend.simulation.run.simulate", interrupted)
    assert run("simulate", "--out", "sim").exit_code == 130
    page = (Path(__file__).parents[2] / "docs" / "development.md").read_text().replace("`", "")
    assert {int(c): m for c, m in re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE)} == shared.EXIT_CODES


def test_settings_tell_value_and_origin_and_no_secret(run, store, tmp_path, monkeypatch):
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "very-secret-token")
    monkeypatch.setenv("PPAL_QUEUE_URL", "redis://:hidden-word@localhost:6379/0")
    monkeypatch.setenv("SCORE_THRESHOLD", "0.7")
    (tmp_path / "ppal.toml").write_text("delta = 2.5\nport = 9191\n")
    done = run("settings", 7, "--json")
    assert "very-secret-token" not in done.output and "hidden-word" not in done.output
    found = json.loads(done.stdout)
    assert found["file"] == "ppal.toml"
    operator = {row["name"]: (row["value"], row["origin"]) for row in found["operator"]}
    assert operator["LABEL_STUDIO_API_KEY"] == ("••• (set)", "environment")
    assert operator["PPAL_PORT"] == ("9191", "ppal.toml") and operator["PPAL_HOST"] == ("0.0.0.0", "default")
    project = {row["name"]: (row["value"], row["origin"]) for row in found["projects"]}
    assert project["budget"] == ("9", "project's extra parameters")
    assert project["delta"] == ("2.5", "ppal.toml")
    assert project["score_threshold"] == ("0.7", "environment (SCORE_THRESHOLD or PPAL_SCORE_THRESHOLD)")
    without = {r["name"]: r["value"] for r in json.loads(run("settings", "--json").stdout)["projects"]}
    assert without["budget"] == "50", "without a project, what the operator says"
    assert "PPAL_PORT" in run("settings").stdout and "very-secret" not in run("settings").output


def test_a_model_is_exported_by_project_or_by_file(run, store, tmp_path, monkeypatch):
    from ppal_backend.detector.infer.exporting_model import Exported

    asked = []

    def export(detector, checkpoint, labels, out, layout, zoo_root):
        asked.append((detector, checkpoint, tuple(labels), out.name, layout))
        return Exported(out, out.with_name("m.json"), detector, (1, 3, 128, 160), 42, 0.001, 0.0001)

    monkeypatch.setattr("ppal_backend.detector.infer.exporting_model.export_model", export)
    assert "with a trained model, got none" in run("export-model", 7, "--out", "m").stderr
    store.versions.activate(ModelVersion(7, "ppal-r1-a", 1, "tiny", "projects/7/m.pth", ("a", "b"), None, {}))
    assert "expected the checkpoint of version ppal-r1-a at" in run("export-model", 7, "--out", "m").stderr
    checkpoint = tmp_path / "data" / "projects" / "7" / "m.pth"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"weights")
    done = run("export-model", 7, "--out", "m.onnx", "--json")
    assert json.loads(done.stdout) == {
        "file": "m.onnx", "description": "m.json", "detector": "tiny", "input_shape": [1, 3, 128, 160], "boxes": 42,
        "box_difference_px": 0.001, "score_difference": 0.0001,
    }  # fmt: skip
    shown = run("export-model", 7, "--format", "torchscript", "--out", "m.pt").stdout
    assert "m.pt: tiny, images of 160 × 128 px, 42 boxes before suppression; m.json describes it" in shown
    assert asked == [
        ("tiny", checkpoint, ("a", "b"), "m.onnx", "onnx"),
        ("tiny", checkpoint, ("a", "b"), "m.pt", "torchscript"),
    ]
    for words in (("export-model", "--out", "m"), ("export-model", 7, "--checkpoint", "x", "--out", "m")):
        assert "expected a project or --checkpoint, got both or neither" in run(*words).stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_answer_is_a_document_in_every_encoding(encoding, monkeypatch):
    """Names of files may hold bytes that are no UTF-8."""
    said = {"out": "caf\udce9", "labels": ["é", "日", "📷", "×"]}
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", terminal)
    shared.print_json(said)
    terminal.flush()
    assert json.loads(terminal.buffer.getvalue().decode(encoding)) == said


def test_text_that_a_terminal_cannot_show_costs_no_answer():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    words = [sys.executable, "-m", "ppal_backend", "zoo", "list"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "retinanet_tiny" in done.stdout and r"\xd7" in done.stdout


def test_progress_goes_aside_and_counts(capsys):
    with shared.progress_bar("backup") as told:
        told(Progress("writing", 1, 4))
    assert capsys.readouterr().out == ""
    with pytest.raises(typer.Exit), shared.errors_in_one_line(True):
        raise StateError("no [bold]")
    assert json.loads(capsys.readouterr().out) == {"error": "no [bold]", "kind": "StateError"}


@pytest.mark.parametrize("words", [("demo",), ("up", "--profile", "full")])
def test_what_needs_a_checkout_says_so_in_one_line(run, monkeypatch, words):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = run(*words)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: expected a checkout for ppal {' '.join(words)}, got an installed wheel")


def test_a_worker_of_this_machine_is_told_from_none_and_from_one_elsewhere(run, store):
    assert run("worker", "--alive").exit_code == 1
    store.workers.beat("elsewhere:12:1.00")
    none = run("worker", "--alive")
    assert none.exit_code == 1 and "expected a worker of this machine within 30 s, got none" in none.stderr
    store.workers.beat(str(Lease.mine()))
    assert run("worker", "--alive").exit_code == 0


def test_a_folder_of_somebody_else_is_told_with_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(shared.os, "geteuid", lambda: 10001)
    with pytest.raises(typer.Exit), shared.errors_in_one_line():
        raise PermissionError(13, "Permission denied", "/data/ppal.db")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: expected to use /data/ppal.db, got: Permission denied; choose another path")
    assert "chown -R 10001 it, on the host" in line
