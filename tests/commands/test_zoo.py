import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ppal_backend.commands.zoo import zoo

runner = CliRunner()


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


def test_list_names_every_detector():
    listed = json.loads(runner.invoke(zoo, ["list", "--json"]).stdout)
    assert listed["dino_r50"]["coco_ap"] == 49.0
    text = runner.invoke(zoo, ["list"])
    assert text.exit_code == 0
    assert "from scratch" in next(line for line in text.stdout.splitlines() if "ssd_tiny" in line)


def test_show_knows_weights_and_schedule():
    shown = json.loads(runner.invoke(zoo, ["show", "retinanet_r50", "--json"]).stdout)
    assert (shown["name"], shown["schedule"]["epochs"]) == ("retinanet_r50_fpn", 26)
    assert "weights.licence" in runner.invoke(zoo, ["show", "fcos_r50"]).stdout


def test_an_unknown_name_is_one_line_and_exit_code_1():
    done = runner.invoke(zoo, ["show", "yolo9000"])
    assert done.exit_code == 1
    assert "yolo9000" in done.stderr and "Traceback" not in done.output


def test_fetch_without_a_network_says_address_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    done = runner.invoke(zoo, ["fetch", "atss_r50", "--to", str(tmp_path)])
    assert done.exit_code == 1
    said = done.stderr.replace("\n", "")
    assert "download.openmmlab.com" in said
    assert "atss_r50_fpn_1x_coco_20200209-985f7bd0.pth" in said
    assert list(tmp_path.iterdir()) == []


def test_fetch_of_shipped_weights_finds_them():
    done = runner.invoke(zoo, ["fetch", "retinanet_tiny"])
    assert done.exit_code == 0 and "initial.pth" in done.stdout


def test_check_reports_what_it_saw():
    done = runner.invoke(zoo, ["check", "ssd_tiny", "--device", "cpu", "--json"])
    report = json.loads(done.stdout)
    assert (report["detector"], report["steps"], report["embedding_shape"][1]) == ("ssd_tiny", 2, 0)
    assert len(report["difficulty"]) == 3
