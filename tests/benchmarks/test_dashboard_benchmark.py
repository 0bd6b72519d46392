"""The dashboard's benchmark: its project looks like a real one, and every page is timed."""

import json
import subprocess
import sys

import pytest

from benchmarks.dashboard import Size, build, pages_of
from ppal_backend.service.app import create_app
from ppal_backend.settings import load_settings
from ppal_backend.store import open_store

SMALL = Size(tasks=96, rounds=4, budget=8)


@pytest.fixture
def client(tmp_path):
    settings = load_settings(MODEL_DIR=tmp_path, LABEL_STUDIO_API_KEY="x" * 40, min_free_gib=0)
    store = open_store(settings)
    build(settings, store, SMALL)
    yield create_app(settings, store).test_client()
    store.close()


def test_every_page_shows_what_was_built(client):
    texts = {page: client.get(f"/{page}").text for page in pages_of(SMALL)}
    assert texts["ui/projects/1/queue"].count('class="pick"') == 12
    assert "96" in texts["ui/projects/1/queue"] and "Map of the pool" in texts["ui/projects/1/queue"]
    assert texts["ui/projects/1/learning"].count("round 4: mAP") == 2
    assert "The dashed curve is a power law" in texts["ui/projects/1/learning"]
    points = json.loads(texts["ui/projects/1/rounds/4/map"])
    assert len(points["ids"]) == 96 + 9 and points["kinds"].count("l") == 9 and points["kinds"].count("s") > 0
    assert "120 of them" not in texts["ui/projects/1/quality"] and "Another label?" in texts["ui/projects/1/quality"]
    assert "class-19" in texts["ui/projects/1/classes"]
    assert texts["ui/projects/1/approve?at=0.5"].count("<article") == 12
    assert 'ppal_new_annotations{project="1"} 5.0' in texts["metrics"]


def test_the_map_of_a_large_pool_is_sampled_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("ppal_backend.rounds.pool_map.MOST_DRAWN", 50)
    settings = load_settings(MODEL_DIR=tmp_path, LABEL_STUDIO_API_KEY="x" * 40, min_free_gib=0)
    store = open_store(settings)
    build(settings, store, SMALL)
    client = create_app(settings, store).test_client()
    assert "Of 96 images of the pool 50 are drawn" in client.get("/ui/projects/1/queue").text
    points = client.get("/ui/projects/1/rounds/4/map").json
    assert len(points["ids"]) == 50 + 9 and len(points["classes"]) == len(points["ids"])
    store.close()


def test_it_times_every_page_without_torch():
    command = [sys.executable, "-m", "benchmarks.dashboard", "--json", "--quick"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert [p["page"] for p in report["pages"]] == pages_of(Size(2000, 5, 100))
    assert all(p["cold_ms"] > 0 and p["warm_ms"] > 0 and p["kib"] > 0.5 for p in report["pages"])
    assert report["torch_loaded"] is False
