"""Ordering somebody's own pool: files in, files out, with checkpoints of ours and of others."""

import csv
import json

import numpy as np
import pytest
import torch

from ppal_backend.detector.infer.inference import PoolInference
from ppal_backend.detector.zoo import find_entry
from ppal_backend.engines.foreign import adopt_checkpoint
from ppal_backend.errors import CheckpointError, DatasetError, SettingsError, UnknownDetector
from ppal_backend.files import read_json
from ppal_backend.rounds.ports import Inferred
from ppal_backend.simulation.rank import RankOptions, rank
from tests.simulation.fakes import LABELS, FakeEngine, Killed, detections_of, features_of
from tests.simulation.folders import SIDES, picture


class Ranker(FakeEngine):
    """Infers without a weights file of its own."""

    def infer(self, spec, model, images, on_progress, should_stop):
        for entry in images:
            self._call("image")
            yield Inferred(detections_of(entry.image_id, 1, len(model.labels)), features_of(entry.image_id))


def pool_file(folder, count=20, first=1):
    images = []
    for image_id in range(first, first + count):
        picture(folder / "images" / f"{image_id}.jpg", image_id)
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": SIDES[0], "height": SIDES[1]})
    path = folder / "pool.json"
    path.write_text(json.dumps({"images": images}))
    return path


def our_checkpoint(path, difficulty=(0.2, 0.5, 0.9)):
    meta = {"detector": "retinanet_tiny", "classes": list(LABELS), "difficulty": list(difficulty)}
    torch.save({"state_dict": {"backbone.weight": torch.zeros(2)}, "meta": meta}, path)
    return path


def options(folder, **changes):
    basic = dict(data=pool_file(folder), checkpoint=our_checkpoint(folder / "final.pth"), budget=4, out=folder / "out")
    return RankOptions(**{**basic, **changes})


def test_the_order_is_written_with_its_reasons(tmp_path):
    path = rank(options(tmp_path), engine_of=lambda _: Ranker())
    rows = list(csv.DictReader(path.open()))
    content = read_json(tmp_path / "out" / "ranking.json")
    assert sorted(int(r["image_id"]) for r in rows) == list(range(1, 21))
    assert [r["chosen"] for r in rows] == ["1"] * 4 + ["0"] * 16
    assert rows[0]["file_name"] == str(tmp_path / "images" / f"{rows[0]['image_id']}.jpg")
    first = content["queue"][0]
    assert first["classes"][0]["label"] in LABELS and first["boxes"][0]["label"] in LABELS
    assert f"{first['classes'][0]['label']}:" in rows[0]["classes"]
    utilities = [float(r["utility"]) for r in rows[16:]]
    assert utilities == sorted(utilities, reverse=True)
    assert not (tmp_path / "out" / ".work").exists() and not (tmp_path / "out" / ".model").exists()


def test_strategies_and_their_options_count(tmp_path):
    chosen = {}
    for strategy in ("ppal", "entropy", "random", "ppal:delta=1.5"):
        made = options(tmp_path, strategy=strategy, out=tmp_path / strategy)
        rank(made, engine_of=lambda _: Ranker())
        queue = read_json(tmp_path / strategy / "ranking.json")["queue"]
        chosen[strategy] = [row["image_id"] for row in queue if row["chosen"]]
    assert len({tuple(ids) for ids in chosen.values()}) == 4
    with pytest.raises(SettingsError, match="expected a strategy of"):
        rank(options(tmp_path, strategy="magic"), engine_of=lambda _: Ranker())


def test_an_interrupted_call_goes_on_and_another_one_starts_afresh(tmp_path, monkeypatch):
    whole = rank(options(tmp_path, out=tmp_path / "whole"), engine_of=lambda _: Ranker()).read_text()
    engine = Ranker()

    def interrupt():
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr("ppal_backend.simulation.rank._write", lambda *_: (_ for _ in ()).throw(Killed()))
            rank(options(tmp_path), engine_of=lambda _: engine)

    interrupt()
    seen = engine.calls.count("image")
    assert rank(options(tmp_path), engine_of=lambda _: engine).read_text() == whole
    assert engine.calls.count("image") == seen == 20, "it looked at the images again"
    interrupt()
    other = rank(options(tmp_path, budget=2), engine_of=lambda _: Ranker())
    assert sum(row["chosen"] == "1" for row in csv.DictReader(other.open())) == 2


def test_labelled_images_leave_the_pool_and_are_looked_at(tmp_path):
    path = pool_file(tmp_path)
    images = json.loads(path.read_text())["images"][:5]
    boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20]}]
    labelled = {"images": [{**i, "id": 100 + i["id"]} for i in images], "annotations": [{**boxes[0], "image_id": 101}],
                "categories": [{"id": k, "name": label} for k, label in enumerate(LABELS, start=1)]}  # fmt: skip
    (tmp_path / "labelled.json").write_text(json.dumps(labelled))
    engine = Ranker()
    made = options(tmp_path, labelled=tmp_path / "labelled.json", strategy="coreset")
    out = rank(made, engine_of=lambda _: engine)
    assert len(list(csv.DictReader(out.open()))) == 15
    assert engine.calls.count("image") == 15 + 5


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"images": []}, "expected images, got an empty list"),
        ({}, "expected a list 'images'"),
        ({"images": [{"id": 1}]}, r"expected images\[0\].file_name to be str, got None"),
        ({"images": [{"id": 1, "file_name": "gone.jpg", "width": 9, "height": 9}]}, "1 missing.*gone.jpg"),
    ],
)
def test_pools_that_cannot_be_used_are_refused(tmp_path, content, told):
    made = options(tmp_path)
    made.data.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=told):
        rank(made, engine_of=lambda _: Ranker())


def test_strategies_that_change_the_detector_are_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"'learnloss' changes the detector and runs in simulations only"):
        rank(options(tmp_path, strategy="learnloss"), engine_of=lambda _: Ranker())


def test_what_describes_objects_counts_and_options_of_simulations_alone_are_refused(tmp_path):
    class Watching(Ranker):
        def infer(self, spec, *rest):
            assert (spec.embedding, spec.levels) == ("sampled", "scale"), "it was left out silently"
            return super().infer(spec, *rest)

    rank(options(tmp_path, strategy="ppal:embedding=sampled,levels=scale"), engine_of=lambda _: Watching())
    with pytest.raises(SettingsError, match=r"got absent, budget, start beside; leave them out"):
        rank(options(tmp_path, strategy="ppal:budget=2,start=typical,absent=drift"), engine_of=lambda _: Ranker())


def test_a_budget_of_nothing_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="budget of at least 1"):
        rank(options(tmp_path, budget=0), engine_of=lambda _: Ranker())


def test_our_checkpoints_say_what_they_are(tmp_path):
    model, zoo = adopt_checkpoint(our_checkpoint(tmp_path / "final.pth"), tmp_path / "work")
    assert (model.detector, model.labels, model.difficulty, zoo) == ("retinanet_tiny", LABELS, (0.2, 0.5, 0.9), None)
    assert model.checkpoint == str(tmp_path / "final.pth") and not (tmp_path / "work").exists()


def test_checkpoints_of_mmdetection_are_taken_with_their_classes(tmp_path):
    path = tmp_path / "epoch_12.pth"
    weights = {"module.backbone.weight": torch.arange(3.0)}
    torch.save({"state_dict": weights, "meta": {"dataset_meta": {"classes": ["a", "b"]}}}, path)
    model, _ = adopt_checkpoint(path, tmp_path / "work", detector="retinanet_tiny")
    assert model.labels == ("a", "b") and model.difficulty is None
    stored = torch.load(model.checkpoint, weights_only=True)
    facts = {"detector": "retinanet_tiny", "classes": ["a", "b"], "difficulty": None, "origin": str(path)}
    assert stored["meta"] == facts
    np.testing.assert_array_equal(stored["state_dict"]["backbone.weight"], [0, 1, 2])
    (tmp_path / "mine.py").write_text("model = dict(type='RetinaNet')\n")
    model, zoo = adopt_checkpoint(path, tmp_path / "work", config=tmp_path / "mine.py", classes=("x", "y"))
    assert model.labels == ("x", "y") and str(tmp_path / "mine.py") in (zoo / "zoo.toml").read_text()


def test_weights_that_do_not_fit_are_told_by_the_file_that_was_given(tmp_path):
    """And not by the copy that was made of it."""
    path = tmp_path / "epoch_12.pth"
    torch.save({"state_dict": {"backbone.weight": torch.ones(1)}}, path)
    model, _ = adopt_checkpoint(path, tmp_path / "work", detector="retinanet_tiny", classes=("x",))
    with pytest.raises(CheckpointError, match=rf"retinanet_tiny with 1 classes in {path}, got \d+ of"):
        PoolInference(model.detector, model.checkpoint, model.labels, "cpu")


def test_a_config_may_lie_at_any_path(tmp_path):
    path, config = tmp_path / "epoch.pth", tmp_path / 'my "net" 📷\x7f.py'
    torch.save({"state_dict": {"backbone.weight": torch.ones(1)}}, path)
    config.write_text("model = dict(type='RetinaNet')\n")
    model, zoo = adopt_checkpoint(path, tmp_path / "work", config=config, classes=("x",))
    assert find_entry(model.detector, zoo).config == config


class Trap:
    """Does something when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_whole_training_checkpoints_are_read_without_running_them(tmp_path):
    path = tmp_path / "epoch_12.pth"
    content = {
        "meta": {"dataset_meta": {"classes": ("a", "b")}, "seed": np.float64(3)},
        "state_dict": {"backbone.weight": torch.arange(4.0).reshape(2, 2).t(), "count": torch.tensor(7)},
        "message_hub": {"trap": Trap(tmp_path / "sprung"), "scores": np.arange(5), "when": {1, 2}},
        "optimizer": {"lr": [torch.nn.Parameter(torch.ones(2))]},
    }
    torch.save(content, path)
    model, _ = adopt_checkpoint(path, tmp_path / "work", detector="retinanet_tiny")
    assert not (tmp_path / "sprung").exists(), "unpickling ran code"
    stored = torch.load(model.checkpoint, weights_only=True)["state_dict"]
    np.testing.assert_array_equal(stored["backbone.weight"], [[0, 2], [1, 3]])
    assert model.labels == ("a", "b") and int(stored["count"]) == 7


def test_checkpoints_that_say_too_little_are_refused(tmp_path):
    path = tmp_path / "bare.pth"
    torch.save({"backbone.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"expected .*bare.pth to name its classes.*--classes"):
        adopt_checkpoint(path, tmp_path)
    with pytest.raises(UnknownDetector, match="pass --detector or --config"):
        adopt_checkpoint(path, tmp_path, classes=("a",))
    with pytest.raises(UnknownDetector, match="expected a detector of the zoo"):
        adopt_checkpoint(path, tmp_path, classes=("a",), detector="yolo99")
    with pytest.raises(UnknownDetector, match="expected an mmdetection config at"):
        adopt_checkpoint(path, tmp_path, classes=("a",), config=tmp_path / "none.py")
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        adopt_checkpoint(path, tmp_path)


def labelled_file(folder, name, labels, category):
    images = json.loads((folder / "pool.json").read_text())["images"][:5]
    rows = [
        {"id": n, "image_id": 100 + image["id"], "category_id": labels.index(category), "bbox": [5, 5, 20, 20]}
        for n, image in enumerate(images * 20, start=1)
    ]
    path = folder / name
    content = {
        "images": [{**image, "id": 100 + image["id"]} for image in images],
        "annotations": rows,
        "categories": [{"id": n, "name": label} for n, label in enumerate(labels)],
    }
    path.write_text(json.dumps(content))
    return path


def test_labelled_boxes_count_by_name_whatever_the_order_of_their_file(tmp_path):
    pool_file(tmp_path)
    orders = {}
    for name, labels in (("same", LABELS), ("turned", LABELS[::-1]), ("more", ("animals", *LABELS))):
        path = labelled_file(tmp_path, f"{name}.json", labels, "cat")
        made = options(tmp_path, labelled=path, strategy="dfreq", out=tmp_path / name)
        orders[name] = rank(made, engine_of=lambda _: Ranker()).read_text()
    assert orders["same"] == orders["turned"] == orders["more"]


def test_an_interrupted_call_starts_afresh_with_corrected_labels(tmp_path, monkeypatch):
    pool_file(tmp_path)
    path = labelled_file(tmp_path, "labelled.json", LABELS, "cat")
    made = options(tmp_path, labelled=path, strategy="gain")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("ppal_backend.simulation.rank._write", lambda *_: (_ for _ in ()).throw(Killed()))
        rank(made, engine_of=lambda _: Ranker())
    labelled_file(tmp_path, "labelled.json", LABELS, "dog")
    engine = Ranker()
    rank(made, engine_of=lambda _: engine)
    assert engine.calls.count("image") == 15
