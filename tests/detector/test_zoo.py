from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from ppal_backend.detector.zoo import Schedule, Weights, find_entry, load_zoo
from ppal_backend.detector.zoo.known_classes import COCO_CLASSES
from ppal_backend.errors import DetectorError, UnknownDetector

NAMES = {
    *("retinanet_r50_fpn", "retinanet_r101", "retinanet_mobilenetv2", "retinanet_swin_t", "faster_rcnn_r50"),
    *("fcos_r50", "atss_r50", "ddod_r50", "ssd300_vgg16", "rtmdet_tiny", "rtmdet_s", "yolox_s", "dino_r50"),
    *("retinanet_tiny", "fcos_tiny", "atss_tiny", "faster_rcnn_tiny", "ssd_tiny"),
    *("soft_teacher_r50", "soft_teacher_tiny", "yolox_nano", "yolox_tiny"),
    *("gfl_tiny", "ddod_tiny", "rtmdet_toy", "yolox_toy", "dino_tiny"),
}
ENTRY = """
[one]
title = "One"
paper = "p"
config = "one.py"
head_family = "anchor"
input_size = [64, 64]
[one.schedule]
epochs = 10
min_iterations = 20
max_iterations = 100
batch_size = 4
lr = 0.1
"""


def test_the_packaged_zoo_is_complete() -> None:
    zoo = load_zoo()
    assert set(zoo) >= NAMES
    for name, entry in zoo.items():
        assert entry.name == name
        assert entry.config.is_file()
        if entry.weights is None:
            assert entry.from_scratch == name.endswith(("_tiny", "_toy")) or name == "retinanet_swin_t"
        else:
            assert entry.weights.licence and entry.weights.source and len(entry.weights.sha256) >= 8
            if entry.weights.kind == "detector" and entry.weights.url is not None:
                assert entry.weights.url.endswith(f"-{entry.weights.sha256}.pth") and entry.coco_ap is not None
        assert entry.paper and entry.title and entry.memory and entry.speed
    r50 = zoo["retinanet_r50_fpn"].weights
    assert r50 is not None and r50.kind == "backbone" and len(r50.sha256) == 64 and str(r50.url).startswith("https://")


def test_published_weights_and_quality_are_those_of_mmdetection() -> None:
    """Address and AP of every whole detector stand together in the files that mmdetection ships."""
    spec = importlib.util.find_spec("mmdet")
    assert spec is not None and spec.origin is not None
    published = {}
    for file in (Path(spec.origin).parent / ".mim" / "configs").glob("*/metafile.yml"):
        quality = None
        for line in file.read_text(encoding="utf-8").splitlines():
            key, _, value = line.strip().partition(": ")
            if key == "box AP":
                quality = float(value)
            elif key == "Weights":
                published[value.strip()] = quality
    checked = 0
    for entry in load_zoo().values():
        if entry.weights is not None and entry.weights.kind == "detector" and entry.weights.url is not None:
            assert published[entry.weights.url] == entry.coco_ap
            checked += 1
    assert checked >= 10


def test_an_alias_finds_the_same_detector() -> None:
    assert find_entry("retinanet_r50") == find_entry("retinanet_r50_fpn")
    assert "retinanet_r50" not in load_zoo()


def test_a_recipe_is_completed_by_the_entry(tmp_path: Path) -> None:
    recipe = "[recipe.short]\nepochs = 3\nmin_iterations = 7\nmax_iterations = 9\ndecay = 'step'\nlr = 5.0\n"
    own = ENTRY.split("[one.schedule]")[0] + "[one.schedule]\nrecipe = 'short'\nbatch_size = 4\nlr = 0.1\n"
    (tmp_path / "zoo.toml").write_text(recipe + own)
    (tmp_path / "one.py").write_text("")
    assert find_entry("one", tmp_path).schedule == Schedule(3, 7, 9, 4, 0.1, decay="step")
    (tmp_path / "zoo.toml").write_text(own)
    with pytest.raises(DetectorError, match=r"'one' is not valid.*'short'"):
        load_zoo(tmp_path)


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "zoo.toml").write_text(ENTRY)
    (tmp_path / "one.py").write_text("")
    assert find_entry("one", tmp_path).title == "One"
    with pytest.raises(UnknownDetector, match=r"one.*'yolo9000'"):
        find_entry("yolo9000", tmp_path)


def test_an_own_zoo_comes_on_top_of_the_packaged_one(tmp_path: Path) -> None:
    """With its recipes; an own zoo that does not ask for the packaged one stands alone."""
    own = ENTRY.replace("[one.schedule]\nepochs = 10", "[one.schedule]\nrecipe = 'ppal'")
    own = own.replace("min_iterations = 20\nmax_iterations = 100\n", "")
    (tmp_path / "one.py").write_text("")
    (tmp_path / "zoo.toml").write_text("include_packaged = true\n" + own)
    assert list(load_zoo(tmp_path)) == [*load_zoo(), "one"]
    assert find_entry("one", tmp_path).schedule.epochs == 26
    assert find_entry("retinanet_r50", tmp_path) == find_entry("retinanet_r50")
    (tmp_path / "zoo.toml").write_text(ENTRY)
    assert list(load_zoo(tmp_path)) == ["one"]


@pytest.mark.parametrize("name", ["atss_r50", "retinanet_r50"])
def test_an_own_detector_never_hides_a_packaged_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("")
    (tmp_path / "zoo.toml").write_text("include_packaged = true\n" + ENTRY.replace("[one", f"[{name}"))
    with pytest.raises(DetectorError, match=f"got {name}; rename"):
        load_zoo(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENTRY.replace('title = "One"\n', ""), "'one' lacks the key 'title'"),
        (ENTRY.replace("epochs = 10", "epochs = -1"), "'one' is not valid.*epochs"),
        (ENTRY.replace("one.py", "two.py"), "two.py does not exist"),
        (ENTRY.replace("lr = 0.1", "lr = 0.1\nlearning = 3"), "'one' is not valid.*learning"),
        ("[one", "valid TOML"),
        ("one = 3", "'one' is not valid.*table"),
        (ENTRY.split("[one.schedule]")[0] + "schedule = 3", "'one' is not valid.*schedule"),
        (ENTRY + "[one.inference]\nbatch_cpu = 'two'", "'one' is not valid"),
        (ENTRY.replace("[one.sch", "inference = 4\n[one.sch"), "'one' is not valid.*inference"),
        (ENTRY.replace("[one.sch", "weights = 'w.pth'\n[one.sch"), "'one' is not valid.*weights"),
        (ENTRY.replace("[one.sch", "aliases = 'uno'\n[one.sch"), "'one' is not valid.*aliases"),
        (ENTRY.replace('title = "One"', "title = 1"), "'one' is not valid.*title"),
        ("recipe = 5\n" + ENTRY, r"table \[recipe\]"),
        (ENTRY.replace("lr = 0.1", "lr = nan"), "'one' is not valid.*lr"),
        (ENTRY.replace("batch_size = 4", "batch_size = 4.5"), "'one' is not valid.*batch_size"),
        (ENTRY.replace("[64, 64]", "[64.5, 64]"), "'one' is not valid.*input_size"),
    ],
)
def test_a_broken_entry_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "zoo.toml").write_text(text)
    (tmp_path / "one.py").write_text("")
    with pytest.raises(DetectorError, match=message):
        load_zoo(tmp_path)


def test_a_file_in_another_encoding_says_so(tmp_path: Path) -> None:
    """As editors on Windows save it."""
    (tmp_path / "zoo.toml").write_bytes(ENTRY.replace("One", "Détecteur").encode("latin-1"))
    (tmp_path / "one.py").write_text("")
    with pytest.raises(DetectorError, match=r"zoo\.toml.*UTF-8"):
        load_zoo(tmp_path)
    (tmp_path / "zoo.toml").write_bytes(b"\xef\xbb\xbf" + ENTRY.encode())
    assert list(load_zoo(tmp_path)) == ["one"], "with a byte order mark"


def test_a_missing_zoo_is_named(tmp_path: Path) -> None:
    with pytest.raises(DetectorError, match=str(tmp_path)):
        load_zoo(tmp_path)


def test_iterations_scale_with_the_data_between_bounds() -> None:
    schedule = Schedule(epochs=26, min_iterations=300, max_iterations=1200, batch_size=16, lr=0.002)
    assert schedule.iterations(40) == 300
    assert schedule.iterations(400) == 650
    assert schedule.iterations(5000) == 1200
    assert schedule.iterations(5000, cap=50) == 50
    assert schedule.iterations(40, cap=500) == 300
    with pytest.raises(ValueError, match="images >= 1"):
        schedule.iterations(0)


def test_weights_have_one_origin() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Weights("detector", Path("a.pth"), "https://example.org/a.pth", "", "MIT")
    assert Weights("backbone", None, "https://example.org/x/b.pth", "", "MIT").file_name == "b.pth"
    with pytest.raises(ValueError, match="exactly one"):
        Weights("detector", None, "https://example.org/a.pth", "0" * 64, "MIT", file="a.pth")


def test_weights_without_an_address_have_a_plain_name_and_a_whole_digest() -> None:
    assert Weights("detector", None, None, "0" * 64, "MIT", file="a.pth").file_name == "a.pth"
    for file, digest in (("a.pth", "0" * 8), ("../a.pth", "0" * 64), ("", "0" * 64)):
        with pytest.raises(ValueError, match="bare file name"):
            Weights("detector", None, None, digest, "MIT", file=file)


def test_the_published_yolox_detectors_are_not_the_toys() -> None:
    zoo = load_zoo()
    nano, tiny = zoo["yolox_nano"], zoo["yolox_tiny"]
    assert nano.weights is not None and (nano.weights.file, nano.weights.url) == ("yolox_nano_coco.pth", None)
    assert tiny.weights is not None and tiny.coco_ap == 32.0
    for entry in (nano, tiny):
        assert entry.input_size == (416, 416) and entry.schedule.batch_size == 8
        assert [entry.schedule.iterations(images) for images in (8, 45, 440, 5000)] == [400, 506, 700, 5000]
    assert zoo["yolox_toy"].from_scratch and zoo["rtmdet_toy"].from_scratch


def test_listing_the_zoo_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ppal_backend.detector.zoo import load_zoo; load_zoo(); "
        "print(sorted({'torch', 'mmengine', 'mmdet', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_weights_of_whole_detectors_name_what_they_know() -> None:
    """All of the packaged ones but that for trying out were trained on COCO; backbones know no class."""
    for entry in load_zoo().values():
        if entry.weights is None:
            continue
        is_coco = "COCO" in entry.weights.source
        assert entry.weights.classes == (COCO_CLASSES if is_coco else ()), entry.name
        assert not is_coco or entry.weights.kind == "detector"


@pytest.mark.parametrize(
    ("classes", "read"),
    [('["a", "b"]', ("a", "b")), ('"coco"', COCO_CLASSES), ("[]", ()), ('"voc"', None), ("[1]", None), ("3", None)],
)
def test_classes_are_a_list_or_the_name_of_one(tmp_path: Path, classes: str, read: tuple[str, ...] | None) -> None:
    table = (
        f'[one.weights]\nkind = "detector"\nurl = "https://example.org/a.pth"\nlicence = "MIT"\nclasses = {classes}\n'
    )
    (tmp_path / "zoo.toml").write_text(ENTRY + "\n" + table)
    (tmp_path / "one.py").write_text("")
    if read is not None:
        weights = find_entry("one", tmp_path).weights
        assert weights is not None and weights.classes == read
        return
    with pytest.raises(DetectorError, match=r"'one' is not valid: expected classes .* or one of \['coco'\]"):
        load_zoo(tmp_path)
