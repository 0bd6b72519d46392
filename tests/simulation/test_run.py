"""``ppal simulate`` from options to report, with the engine left out; and the time left that people are shown."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ppal_backend.detector.zoo import default_zoo_root, find_entry
from ppal_backend.detector.zoo.fingerprint import detector_fingerprint
from ppal_backend.errors import (
    DatasetError,
    DetectorError,
    RoundCancelled,
    SettingsError,
    StateError,
    UnknownDetector,
    WeightsUnavailable,
)
from ppal_backend.files import read_json
from ppal_backend.simulation.folder import locked, round_place
from ppal_backend.simulation.replay import random_start
from ppal_backend.simulation.run import (
    SimulationOptions,
    current_work,
    finished_rounds,
    prepare,
    simulate,
    steps_left,
    time_left,
)
from ppal_backend.simulation.schedule import tasks_of
from ppal_backend.simulation.variants import parse_variants
from tests.simulation.fakes import FakeEngine, benchmark, fake_engine, make_plan
from tests.simulation.folders import coco_layout, voc_devkit

SMALL = {"detector": "retinanet_tiny", "seeds": 2, "retrieval_images": 0, "rounds": 2}


class AnyClasses(FakeEngine):
    """Serves data sets of any classes, and evaluates whatever it is given."""

    def evaluate(self, spec, model, ann_json):
        self._call("evaluate")
        test = read_json(ann_json)
        assert test["images"], "the test set must not be empty"
        skill = read_json(Path(model.checkpoint))["skill"]
        return {"map": skill / 1000, "map50": skill / 500, "per_class": {model.labels[0]: 0.5}}


@pytest.fixture(autouse=True)
def few_plots(request, monkeypatch):
    """Plots are drawn for one preset only; test_report.py looks at them."""
    if "voc-retinanet" not in request.node.name:
        monkeypatch.setattr("ppal_backend.simulation.report.draw_all", lambda results, out: [])


def any_engine(plan):
    return AnyClasses()


@pytest.mark.parametrize(
    ("preset", "lay_out"),
    [
        ("voc-retinanet", lambda root: voc_devkit(root, trainval=20, test=5)),
        ("coco-retinanet", lambda root: coco_layout(root, train=60, val=8)),
        ("coco-fasterrcnn", lambda root: coco_layout(root, train=60, val=8)),
    ],
)
def test_the_papers_protocols_run_on_folders_laid_out_like_the_real_ones(tmp_path, preset, lay_out):
    lay_out(tmp_path / "data")
    plan = {"detector": "retinanet_tiny", "seeds": 1, "retrieval_images": 0, "start": 6, "budget": 3}
    options = SimulationOptions(tmp_path / "out", preset, {"data": tmp_path / "data"}, plan)
    report = simulate(options, engine_factory=any_engine)
    summary = read_json(report.parent / "summary.json")
    assert summary["complete"] and {"random", "entropy", "ppal"} <= set(summary["aulc"])
    assert summary["rounds"] == (6 if preset.startswith("voc") else 4)
    assert summary["title"] in report.read_text()


def test_shares_are_of_the_pool_and_the_command_line_wins(tmp_path):
    voc_devkit(tmp_path / "data", trainval=30, test=5)
    options = SimulationOptions(
        tmp_path / "out",
        "voc-retinanet",
        {"data": tmp_path / "data"},
        {**SMALL, "start": "10%", "budget": "5%", "strategies": "random,ppal:delta=2", "delta": None},
    )
    simulate(options, engine_factory=any_engine)
    plan = read_json(tmp_path / "out" / "simulation.json")
    assert (plan["start"], plan["budget"], plan["seeds"], plan["delta"]) == (6, 3, [0, 1], 4.0)
    assert len(round_place(tmp_path / "out", 1, "ppal_delta=2", 2).labelled()) == 12


def test_the_same_command_goes_on_and_another_protocol_is_refused(tmp_path):
    coco_layout(tmp_path / "data", train=30, val=5)
    plan = {**SMALL, "strategies": "random", "start": 5, "budget": 2}
    options = SimulationOptions(tmp_path / "out", "coco-retinanet", {"data": tmp_path / "data"}, plan)
    simulate(options, engine_factory=any_engine)
    before = (tmp_path / "out" / "seed-0" / "random" / "round-00" / "result.json").read_bytes()
    more = SimulationOptions(
        tmp_path / "out", "coco-retinanet", {"data": tmp_path / "data"}, {**plan, "strategies": "ppal", "seeds": 3}
    )
    simulate(more, engine_factory=any_engine)
    matched = SimulationOptions(
        tmp_path / "out", "coco-retinanet", {"data": tmp_path / "data"}, {**plan, "strategies": "random:match=ppal"}
    )
    prepare(matched, tmp_path / "out", Console(quiet=True))
    stored = read_json(tmp_path / "out" / "simulation.json")
    assert [v.get("match") for v in stored["variants"]] == ["ppal", None, None], "a folder's strategy is no strategy"
    assert [v["strategy"] for v in stored["variants"]] == ["random", "ppal", "random"] and stored["seeds"] == [0, 1, 2]
    assert (tmp_path / "out" / "seed-0" / "random" / "round-00" / "result.json").read_bytes() == before
    other = SimulationOptions(tmp_path / "out", "coco-retinanet", {"data": tmp_path / "data"}, {**plan, "budget": 4})
    with pytest.raises(StateError, match=r"another simulation .budget 2 there, 4 now."):
        simulate(other, engine_factory=any_engine)


@pytest.mark.parametrize(
    ("plan", "error", "told"),
    [
        ({"strategies": "magic"}, SettingsError, "expected a strategy of random, entropy"),
        ({"detector": "yolo99"}, UnknownDetector, "expected a detector of the zoo .*retinanet_tiny"),
        ({"start": 29, "budget": 2}, SettingsError, "expected a pool of at least 33 images .*--start, --budget"),
        ({"start": 1}, SettingsError, "expected a start of at least 2 images, got 1"),
        ({"budget": "lots"}, SettingsError, "expected budget as a number of images"),
        ({"colour": 1}, SettingsError, "expected settings among .*'colour'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path, plan, error, told):
    coco_layout(tmp_path / "data", train=30, val=5)
    options = SimulationOptions(
        tmp_path / "out", "coco-retinanet", {"data": tmp_path / "data"}, {**SMALL, "start": 5, "budget": 2, **plan}
    )
    with pytest.raises(error, match=told):
        simulate(options, engine_factory=any_engine)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]


def test_weights_that_cannot_be_had_are_told_before_any_part_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("PPAL_CACHE_DIR", str(tmp_path / "cache"))
    options = SimulationOptions(tmp_path / "out", "smoke", plan={**SMALL, "detector": "yolox_nano"})
    with pytest.raises(WeightsUnavailable, match=r"expected .*yolox_nano_coco\.pth.*ppal zoo fetch yolox_nano --from"):
        simulate(options)
    assert not list((tmp_path / "out").glob("seed-*"))


@pytest.mark.parametrize(("moved", "file"), [("train2017", "pool.json"), ("val2017", "test.json")])
def test_moved_images_are_found_where_they_are_now(tmp_path, moved, file):
    coco_layout(tmp_path, train=30, val=5)
    names = tmp_path / "annotations"
    data = {"data": names / "instances_train2017.json", "images": tmp_path / "train2017",
            "test": names / "instances_val2017.json", "test_images": tmp_path / "val2017"}  # fmt: skip
    plan, out = {**SMALL, "start": 5, "budget": 2}, tmp_path / "out"
    out.mkdir()
    prepare(SimulationOptions(out, data=data, plan=plan), out, Console(quiet=True))
    now = shutil.move(tmp_path / moved, tmp_path / "elsewhere")
    data["images" if moved == "train2017" else "test_images"] = now
    prepare(SimulationOptions(out, data=data, plan=plan), out, Console(quiet=True))
    assert all(Path(image["file_name"]).is_file() for image in read_json(out / "data" / file)["images"])


class Reading(AnyClasses):
    """Skips images that are not there, as the real one does."""

    def infer(self, spec, model, images, *rest):
        return super().infer(spec, model, [entry for entry in images if Path(entry.path).is_file()], *rest)


def test_a_strategy_that_comes_after_the_images_were_moved_sees_them(tmp_path):
    coco_layout(tmp_path / "data", train=30, val=5)
    plan = {**SMALL, "strategies": "random", "start": 5, "budget": 2, "rounds": 1, "seeds": 1}
    simulate(SimulationOptions(tmp_path / "out", "coco-retinanet", {"data": tmp_path / "data"}, plan),
             engine_factory=lambda _: Reading())  # fmt: skip
    now = shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    more = {**plan, "strategies": "entropy"}
    simulate(SimulationOptions(tmp_path / "out", "coco-retinanet", {"data": now}, more),
             engine_factory=lambda _: Reading())  # fmt: skip
    query = read_json(round_place(tmp_path / "out", 0, "entropy", 0).path / "query_set.json")
    assert len(query["image_ids"]) == 2, "no image of the pool could be read"


def test_a_training_that_was_cut_off_before_the_images_were_moved_begins_again(tmp_path):
    coco_layout(tmp_path / "data", train=30, val=5)
    plan = {**SMALL, "strategies": "random", "start": 5, "budget": 2, "rounds": 1, "seeds": 1}
    paths = []

    class Cut(AnyClasses):
        """Refuses what is there of another training, as the real one does."""

        def train(self, spec, labels, files, folder, *rest):
            folder.mkdir(exist_ok=True)
            begun, data = folder / "request.json", files.train.read_text()
            if begun.is_file() and begun.read_text() != data:
                raise DetectorError(f"{folder} holds another training")
            begun.write_text(data)
            if not paths:
                paths.append(folder)
                raise RoundCancelled("stopped")
            return super().train(spec, labels, files, folder, *rest)

    options = SimulationOptions(tmp_path / "out", "coco-retinanet", {"data": tmp_path / "data"}, plan)
    with pytest.raises(RoundCancelled):
        simulate(options, engine_factory=lambda _: Cut())
    now = shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    simulate(replace(options, data={"data": now}), engine_factory=lambda _: Cut())
    assert round_place(tmp_path / "out", 0, "random", 1).result() is not None


def test_a_detector_without_weights_is_told_before_any_part_begins(tmp_path):
    options = SimulationOptions(tmp_path / "out", "smoke", plan={**SMALL, "detector": "retinanet_swin_t"})
    with pytest.raises(WeightsUnavailable, match="--init-weights random"):
        simulate(options)
    assert not list((tmp_path / "out").glob("seed-*"))


def test_what_a_config_inherits_is_part_of_the_detectors_fingerprint(tmp_path):
    root = tmp_path / "zoo"
    shutil.copytree(default_zoo_root(), root)
    before = detector_fingerprint(find_entry("yolox_nano", root))
    assert before == detector_fingerprint(find_entry("yolox_nano", root))
    base = root / "yolox_tiny" / "config.py"
    text = base.read_text()
    base.write_text(text.replace("frozen_stages=4", "frozen_stages=0"))
    assert base.read_text() != text and detector_fingerprint(find_entry("yolox_nano", root)) != before


def test_an_image_that_cannot_be_read_ends_a_simulation(tmp_path):
    coco_layout(tmp_path / "data", train=30, val=5)
    plan = {**SMALL, "strategies": "random", "start": 5, "budget": 2, "rounds": 1, "seeds": 1}

    class Losing(Reading):
        def train(self, *args):
            for path in (tmp_path / "data" / "train2017").glob("*.jpg"):
                path.unlink()
            return super().train(*args)

    options = SimulationOptions(tmp_path / "out", "coco-retinanet", {"data": tmp_path / "data"}, plan)
    with pytest.raises(StateError, match="expected every image of the pool to be readable, got 25 that are not"):
        simulate(options, engine_factory=lambda _: Losing())
    assert not list((tmp_path / "out").rglob("result.json"))


@pytest.mark.parametrize("strategy", ["random", "random:start=typical"])
def test_a_simulation_goes_on_once_its_images_can_be_read_again(tmp_path, strategy):
    """It ended the same way every time, since it did not look at them again."""
    coco_layout(tmp_path / "data", train=30, val=5)
    images, copies = tmp_path / "data" / "train2017", tmp_path / "copies"
    shutil.copytree(images, copies)
    plan = {**SMALL, "strategies": strategy, "start": 5, "budget": 2, "rounds": 2, "seeds": 1}
    undisturbed, disturbed = (
        SimulationOptions(tmp_path / out, "coco-retinanet", {"data": tmp_path / "data"}, plan) for out in "ab"
    )
    simulate(undisturbed, engine_factory=lambda _: Reading())
    folder = parse_variants(strategy)[0].folder
    labelled = round_place(undisturbed.out, 0, folder, 2).labelled()
    gone = [images / f"{number:012d}.jpg" for number in range(1, 31) if number not in labelled][:3]

    class Losing(Reading):
        def __init__(self, nth):
            super().__init__()
            self.nth = nth

        def infer(self, *args):
            if self.calls.count("infer") == self.nth:
                for path in gone:
                    path.unlink()
            return super().infer(*args)

    for nth in (0, 1):
        engine = Losing(nth)
        with pytest.raises(StateError, match=r"readable, got 3 that are not .*give the same command again"):
            simulate(disturbed, engine_factory=lambda _, engine=engine: engine)
        shutil.copytree(copies, images, dirs_exist_ok=True)
    simulate(disturbed, engine_factory=lambda _: Reading())
    for number in range(3):
        mine, theirs = (round_place(options.out, 0, folder, number) for options in (disturbed, undisturbed))
        assert mine.labelled() == theirs.labelled() and mine.result()["picks"] == theirs.result()["picks"]


def test_a_damaged_picture_is_told_before_the_folder_is_taken(tmp_path):
    """It was told after the first training, and the folder could not be used again."""
    coco_layout(tmp_path / "data", train=30, val=5)
    path = tmp_path / "data" / "train2017" / f"{7:012d}.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    plan = {**SMALL, "strategies": "random", "start": 5, "budget": 2, "rounds": 1, "seeds": 1}
    options = SimulationOptions(tmp_path / "out", "coco-retinanet", {"data": tmp_path / "data"}, plan)
    with pytest.raises(DatasetError, match=r"expected 35 pictures, got 1 files that are damaged"):
        simulate(options, engine_factory=any_engine)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]
    path.write_bytes(whole)
    simulate(options, engine_factory=any_engine)


def test_a_start_without_any_box_is_told_with_its_seed(tmp_path):
    """Seed 2 failed hours later with "annotate more tasks"."""
    coco_layout(tmp_path / "data", train=30, val=5)
    names = tmp_path / "data" / "annotations" / "instances_train2017.json"
    rows = read_json(names)
    some = random_start(range(1, 31), 5, 0)[0]
    with_box = [seed for seed in range(6) if some in random_start(range(1, 31), 5, seed)]
    assert with_box == [0, *with_box[1:]] and len(with_box) < 6
    rows["annotations"] = [row for row in rows["annotations"] if row["image_id"] == some]
    names.write_text(json.dumps(rows))
    plan = {**SMALL, "strategies": "random", "start": 5, "budget": 2, "seeds": 6}
    options = SimulationOptions(tmp_path / "out", "coco-retinanet", {"data": tmp_path / "data"}, plan)
    without = sorted(set(range(6)) - set(with_box))
    with pytest.raises(SettingsError, match=rf"got none in those of seeds {without}".replace("[", r"\[")):
        simulate(options, engine_factory=any_engine)
    prepare(replace(options, plan={**plan, "seeds": with_box}), tmp_path / "out", Console(quiet=True))


def test_a_report_is_named_after_its_data_and_not_after_those_of_the_preset(tmp_path):
    """That of somebody's photographs of cars began with "aquarium: seven classes of sea animals"."""
    for name, title in (("aquarium", "aquarium: seven classes of sea animals.*"), ("cars", "cars, as preset aquarium")):
        folder, out = tmp_path / name, tmp_path / f"out-{name}"
        out.mkdir()
        coco_layout(folder, train=6, val=3)
        for split, file in (("train2017", "pool.json"), ("val2017", "test.json")):
            (folder / "annotations" / f"instances_{split}.json").rename(folder / file)
            shutil.copytree(folder / split, folder / "images", dirs_exist_ok=True)
        plan = {**SMALL, "strategies": "random", "start": 2, "budget": 1, "rounds": 1}
        prepared = prepare(SimulationOptions(out, "aquarium", {"data": folder}, plan), out, Console(quiet=True))
        assert re.fullmatch(title, prepared.title)


def test_missing_data_are_told(tmp_path):
    options = SimulationOptions(tmp_path / "out", "coco-retinanet", {"data": tmp_path / "nowhere"}, SMALL)
    with pytest.raises(DatasetError, match=r"expected a folder of images at .*nowhere/train2017"):
        simulate(options, engine_factory=any_engine)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    coco_layout(tmp_path / "data", train=30, val=5)
    options = SimulationOptions(
        tmp_path / "out", "coco-retinanet", {"data": tmp_path / "data"}, {**SMALL, "start": 5, "budget": 2}
    )
    with pytest.raises(StateError, match="expected an empty folder or an earlier simulation"):
        simulate(options, engine_factory=any_engine)


def test_two_simulations_in_one_folder_are_refused(tmp_path):
    with locked(tmp_path / "out" / ".lock", "x"), pytest.raises(StateError, match="another simulation is running in"):
        simulate(SimulationOptions(tmp_path / "out", "smoke"), engine_factory=fake_engine)


def test_progress_is_shown_and_counts_rounds(tmp_path):
    coco_layout(tmp_path / "data", train=30, val=5)
    console = Console(record=True, width=120, force_terminal=True)
    plan = {**SMALL, "strategies": "random", "start": 5, "budget": 2}
    options = SimulationOptions(tmp_path / "out", "coco-retinanet", {"data": tmp_path / "data"}, plan)
    simulate(options, console, any_engine)
    text = console.export_text()
    assert "6/6" in text and "done" in text and "pool of 30 images, start 5, + 2 a round" in text


def test_time_left_is_an_estimate_from_this_session():
    assert time_left(0, 10, 30.0) == "" and time_left(5, 0, 30.0) == "done"
    assert time_left(2, 10, 120.0) == "about 10 min left"
    assert time_left(1, 100, 360.0) == "about 10.0 h left"


def test_current_work_tells_step_and_share(tmp_path):
    plan = make_plan(benchmark())
    assert finished_rounds(tmp_path, plan) == 0 and current_work(tmp_path) == []
    folder = tmp_path / "seed-0" / "ppal"
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(
        '{"seed": 0, "what": "ppal", "round": 2, "step": "train", "done": 30, "total": 120}'
    )
    assert current_work(tmp_path) == ["seed 0 ppal r2 train 25%"]


def test_a_detector_that_changed_since_is_another_simulation(tmp_path, monkeypatch):
    coco_layout(tmp_path / "data", train=30, val=5)
    plan = {**SMALL, "strategies": "random", "start": 5, "budget": 2}
    options = SimulationOptions(tmp_path / "out", "coco-retinanet", {"data": tmp_path / "data"}, plan)
    simulate(options, engine_factory=any_engine)
    zoo = tmp_path / "zoo"
    shutil.copytree(default_zoo_root(), zoo)
    monkeypatch.setenv("PPAL_MODEL_ZOO", str(zoo))
    simulate(options, engine_factory=any_engine)
    with (zoo / "retinanet_tiny" / "config.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(StateError, match=r"another simulation .detector_sha256"):
        simulate(options, engine_factory=any_engine)


def test_the_steps_that_are_left_count_a_shared_first_model_once(tmp_path):
    plan = make_plan(benchmark(), "random,ppal,ppal:xi=0.2", seeds=(0, 1), max_iterations=100)
    entry = find_entry("retinanet_tiny")
    assert steps_left(tmp_path, plan, entry) == 2 * (2 * 100 + 3 * 3 * 100)
    place = round_place(tmp_path, 1, "random", 1)
    place.path.mkdir(parents=True)
    (place.path / "result.json").write_text("{}")
    assert steps_left(tmp_path, plan, entry) == 2 * (2 * 100 + 3 * 3 * 100) - 100


def test_tasks_of_one_strategy_and_all_seeds_come_before_the_next_strategy(tmp_path):
    plan = make_plan(benchmark(), "random,ppal", seeds=(0, 1))
    names = [task.variant for task in tasks_of(tmp_path, plan)]
    assert names == ["", "random", "", "random", "ppal", "ppal"]
