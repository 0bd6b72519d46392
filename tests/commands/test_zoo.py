import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ppal_backend.commands.zoo import zoo
from ppal_backend.detector.zoo import load_zoo
from ppal_backend.engines.local import LocalEngine
from ppal_backend.settings import load_settings
from ppal_backend.worker.round_process import _engine

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


def test_weights_are_kept_in_the_cache_folder_that_the_operator_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They were kept in the home folder of whoever ran: in a container's, where no other container found them."""

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_settings().weights_dir is None, "whoever trains has a default of his own"
    monkeypatch.setenv("PPAL_CACHE", str(tmp_path / "cache"))
    chosen = load_settings().weights_dir
    assert chosen == tmp_path / "cache" / "weights"
    said = runner.invoke(zoo, ["fetch", "atss_r50"]).stderr.replace("\n", "")
    assert f"--to {chosen}" in said and str(tmp_path / "home") not in said
    engine = _engine(load_settings())
    assert isinstance(engine, LocalEngine) and engine._weights_dir == chosen


def test_fetch_gets_the_vocabulary_beside_the_weights_and_takes_either_from_a_file(tmp_path, monkeypatch):
    files = {"net.pth": b"weights", "vocab.txt": b"[PAD]\n[UNK]\n"}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    tables = [
        f"[one.{part}]\nkind = 'detector'\nurl = 'http://weights.test/{name}'\nlicence = 'MIT'\n"
        f"sha256 = '{digests[name]}'\n"
        for part, name in (("weights", "net.pth"), ("vocabulary", "vocab.txt"))
    ]
    (tmp_path / "one.py").write_text("")
    (tmp_path / "zoo.toml").write_text(
        "[one]\ntitle = 'One'\npaper = 'p'\nconfig = 'one.py'\nhead_family = 'grounding'\ninput_size = [64, 64]\n"
        f"{tables[0]}{tables[1]}"
        "[one.schedule]\nepochs = 1\nmin_iterations = 1\nmax_iterations = 1\nbatch_size = 1\nlr = 0.1\n"
    )
    monkeypatch.setenv("PPAL_MODEL_ZOO", str(tmp_path))
    asked = []

    def offline(request, timeout):
        asked.append(request.full_url)
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    kept = tmp_path / "kept"
    for name, content in files.items():
        missing = runner.invoke(zoo, ["fetch", "one", "--to", str(kept)])
        assert missing.exit_code == 1 and asked[-1] == f"http://weights.test/{name}"
        (tmp_path / "given").write_bytes(content)
        assert runner.invoke(zoo, ["fetch", "one", "--from", str(tmp_path / "given"), "--to", str(kept)]).exit_code == 0
    assert {path.name for path in kept.iterdir()} == {"net.pth", f"vocabulary-{digests['vocab.txt'][:8]}.txt"}
    assert runner.invoke(zoo, ["fetch", "one", "--to", str(kept)]).exit_code == 0 and len(asked) == 2


def test_fetch_from_a_file_follows_the_advice_for_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Through an own zoo, since real weights do not come with the tests."""
    content = b"weights"
    own = tmp_path / "own"
    own.mkdir()
    (own / "one.py").write_text("")
    (own / "zoo.toml").write_text(
        "[one]\ntitle = 'One'\npaper = 'p'\nconfig = 'one.py'\nhead_family = 'anchor'\ninput_size = [64, 64]\n"
        "[one.weights]\nkind = 'detector'\nfile = 'net.pth'\nlicence = 'MIT'\nsource = 'a drawer'\n"
        f"sha256 = '{hashlib.sha256(content).hexdigest()}'\n"
        "[one.schedule]\nepochs = 1\nmin_iterations = 1\nmax_iterations = 1\nbatch_size = 1\nlr = 0.1\n"
    )
    monkeypatch.setenv("PPAL_MODEL_ZOO", str(own))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    missing = runner.invoke(zoo, ["fetch", "one"])
    assert missing.exit_code == 1 and "ppal zoo fetch one --from FILE" in missing.stderr.replace("\n", " ")
    given = tmp_path / "given.pth"
    given.write_bytes(b"something else")
    wrong = runner.invoke(zoo, ["fetch", "one", "--from", str(given), "--json"])
    assert wrong.exit_code == 1 and "sha256" in wrong.output and "Traceback" not in wrong.output
    given.write_bytes(content)
    done = runner.invoke(zoo, ["fetch", "one", "--from", str(given), "--json"])
    place = tmp_path / "home" / ".cache" / "ppal" / "weights" / "net.pth"
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"detector": "one", "weights": str(place)}
    assert place.read_bytes() == content
    assert runner.invoke(zoo, ["fetch", "one"]).exit_code == 0
    assert [path.name for path in place.parent.iterdir()] == ["net.pth"]


def test_check_reports_what_it_saw():
    done = runner.invoke(zoo, ["check", "ssd_tiny", "--device", "cpu", "--json"])
    report = json.loads(done.stdout)
    assert (report["detector"], report["steps"], report["embedding_shape"][1]) == ("ssd_tiny", 2, 0)
    assert len(report["difficulty"]) == 3


def test_the_zoo_in_force_is_the_operators_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    monkeypatch.delenv("PPAL_MODEL_ZOO", raising=False)
    settings = load_settings()
    assert (settings.model_zoo, settings.own_zoo) == (None, tmp_path / "zoo")
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "zoo.toml").touch()
    assert settings.model_zoo == tmp_path / "zoo"  # found without a restart
    monkeypatch.setenv("PPAL_MODEL_ZOO", str(tmp_path / "elsewhere"))
    assert load_settings().model_zoo == load_settings().own_zoo == tmp_path / "elsewhere"


def test_check_without_difficulty_says_none():
    done = runner.invoke(zoo, ["check", "ssd_tiny", "--device", "cpu", "--no-difficulty", "--json"])
    assert json.loads(done.stdout)["difficulty"] is None


def test_an_own_detector_is_added_listed_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Through the settings alone: no folder is named, and the file it came from may go."""
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("PPAL_MODEL_ZOO", raising=False)
    config = tmp_path / "own ssd.py"
    config.write_text(f"_base_ = [{str(load_zoo()['ssd_tiny'].config)!r}]\n")
    done = runner.invoke(zoo, ["add", str(config), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert f"its schedule is in {tmp_path / 'data' / 'zoo' / 'zoo.toml'}" in done.stdout
    config.unlink()
    listed = json.loads(runner.invoke(zoo, ["list", "--json"]).stdout)
    assert list(listed)[-1] == "own_ssd" and "dino_r50" in listed
    shown = json.loads(runner.invoke(zoo, ["show", "own_ssd", "--json"]).stdout)
    assert (shown["head_family"], shown["input_size"]) == ("anchor", [160, 128])
    again = runner.invoke(zoo, ["add", str(listed["own_ssd"]["config"]), "--name", "own_ssd"])
    assert again.exit_code == 1 and "'own_ssd', which the zoo has" in again.stderr.replace("\n", " ")
