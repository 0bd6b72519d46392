"""The benchmark of similar images: what it writes is searched, and it loads no torch."""

import json
import subprocess
import sys

from benchmarks.similar import BOXES, FOUND, LEAST, SURE, write_pool
from ppal_backend.rounds.detections_store import StoredDetections
from ppal_backend.rounds.similar import most_similar, objects_of


def test_its_pool_is_as_it_says(tmp_path):
    write_pool(tmp_path, 40)
    stored = StoredDetections(tmp_path)
    assert len(stored) == 40 and {len(d) for d in stored} == {BOXES}
    assert {int((d.scores >= LEAST).sum()) for d in stored} == {SURE}
    looked_for = objects_of(tmp_path, [7], LEAST)
    assert len(looked_for.vectors) == SURE and len(most_similar(tmp_path, looked_for, LEAST, FOUND)) == FOUND


def test_it_times_every_search_without_torch():
    command = [sys.executable, "-m", "benchmarks.similar", "--json", "--quick"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert list(report["searches"]) == ["image", "box", "lasso of 20"] and report["images"] == 1000
    assert all(one["cpu_seconds"] > 0 and one["seconds"] > 0 for one in report["searches"].values())
    assert report["torch_loaded"] is False
