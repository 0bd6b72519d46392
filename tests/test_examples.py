"""The examples run as they stand."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from ppal_backend.settings import load_settings
from ppal_backend.store import open_store
from tests.servers import free_port, wait_for

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *words, **variables):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([EXAMPLES / name, *map(str, words)], env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip


def test_the_list_names_every_example():
    told = set(re.findall(r"`(\w+\.sh)", (EXAMPLES / "README.md").read_text()))
    assert told == {path.name for path in EXAMPLES.glob("*.sh")}
    assert all(os.access(path, os.X_OK) for path in EXAMPLES.glob("*.sh"))


def test_start_training(tmp_path, monkeypatch):
    """Credentials come from the environment; without them the backend refuses and the script fails."""
    port = free_port()
    known = {"BASIC_AUTH_USER": "someone", "BASIC_AUTH_PASS": "a word of mine"}
    variables = {**known, "MODEL_DIR": str(tmp_path), "PPAL_HOST": "127.0.0.1", "PPAL_PORT": str(port)}
    store = open_store(load_settings(MODEL_DIR=tmp_path))
    store.projects.connect(7, "7.1", "<View/>", "", {})
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "ppal_backend.cli", "serve"]
        service = subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log)
    try:
        wait_for(lambda: requests.get(f"{url}/health", timeout=5).ok, "the service answers", 240)
        done = run("start_training.sh", url, 7, **known)
        assert done.returncode == 0, done.stdout + done.stderr
        assert '"status":"UP"' in done.stdout and '"stored"' in done.stdout
        assert [event.action for event in store.events.pending(7)] == ["START_TRAINING"]
        refused = run("start_training.sh", url, 7)
        assert refused.returncode != 0 and "the training was not asked for" in refused.stderr
        assert '"ignored"' in refused.stdout and "credentials are missing or wrong" in refused.stdout
        assert len(store.events.pending(7)) == 1
    finally:
        service.terminate()
        service.wait(60)
        store.close()


@pytest.mark.slow
def test_rank_offline(tmp_path):
    done = run("rank_offline.sh", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "out" / "ranking" / "ranking.csv").open()))
    assert len(rows) == 60 and [row["chosen"] for row in rows] == ["1"] * 10 + ["0"] * 50
    assert done.stdout.splitlines()[-11].startswith("rank,image_id,file_name,chosen")
    assert {Path(row["file_name"]).parent for row in rows} == {tmp_path / "out" / "pool" / "images"}


@pytest.mark.slow
def test_simulate_smoke(tmp_path):
    done = run("simulate_smoke.sh", tmp_path / "out", MAX_ITERATIONS="10")
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads((tmp_path / "out" / "answer.json").read_text())
    assert Path(answer["report"]).is_file()
    assert set(answer["summary"]["strategies"]) == {"random", "random:match=ppal", "ppal"}
    assert f"random: area under the learning curve {answer['summary']['aulc']['random']}" in done.stdout
