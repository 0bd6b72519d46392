"""``ppal export`` of what was annotated in a real Label Studio, against the ground truth that was answered with."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ppal_backend.cli import app
from ppal_backend.demo.run import label_config_of
from ppal_backend.settings import load_settings
from ppal_backend.store import open_store

pytestmark = pytest.mark.e2e


def test_annotations_come_out_as_they_were_drawn(label_studio, make_project, truth, tmp_path, monkeypatch):
    project, annotator = make_project("export")
    done = annotator.label(4)
    for name, value in {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "data"))
    store = open_store(load_settings())
    store.projects.connect(project, f"{project}.1", label_config_of(truth.labels), label_studio.url, {})
    store.close()
    result = CliRunner().invoke(app, ["export", str(project), "--out", str(tmp_path / "out"), "--images", "--json"])
    assert result.exit_code == 0, result.stderr
    read = json.loads((tmp_path / "out" / "annotations.json").read_text(encoding="utf-8"))
    assert sorted(image["id"] for image in read["images"]) == sorted(done)
    labels = {category["id"]: category["name"] for category in read["categories"]}
    by_name = {Path(path).name: answer for path, answer in truth.truths_by_path().items()}
    for image in read["images"]:
        answer = by_name[image["file_name"]]
        original = next(path for path in truth.paths().values() if path.name == image["file_name"])
        assert (tmp_path / "out" / "images" / image["file_name"]).read_bytes() == original.read_bytes()
        found = [(labels[a["category_id"]], *a["bbox"]) for a in read["annotations"] if a["image_id"] == image["id"]]
        assert len(found) == len(answer.boxes) and (image["width"], image["height"]) == (answer.width, answer.height)
        for got, want in zip(sorted(found), sorted(answer.boxes), strict=True):
            assert got[0] == want[0] and got[1:] == pytest.approx(want[1:], abs=0.02)
    assert any(by_name[image["file_name"]].boxes for image in read["images"])
