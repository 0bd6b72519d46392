"""The zoo's detector as published, told in a project's labels; and its head as the start of a training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from ppal_backend.detector.config import build_config, find_entry
from ppal_backend.detector.infer.exporting_model import export_model
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.infer.relabelling import Relabelling
from ppal_backend.detector.models import build_model
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.train.training import TrainRequest, TrainResult, evaluate, train
from ppal_backend.detector.weights import load_checkpoint
from ppal_backend.detector.weights.initial import InitialWeights, carry_classes, initialiser, save_as_is
from ppal_backend.detector.zoo import default_zoo_root
from ppal_backend.errors import CheckpointError, DetectorError, WeightsUnavailable
from ppal_backend.structures.detections import Detections
from tests.detector.conftest import ZOO
from tests.detector.shapes import CLASSES, write_set

SQUARE, DISC, BAR = CLASSES
ENTRY = ZOO.split("[explosive]")[0] + '\n[small.weights]\nkind = "detector"\npath = "small.pth"\nlicence = "MIT"\n'


@pytest.fixture(scope="module")
def published(zoo_root: Path, trained: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo whose entry has the trained detector as its weights, as plain tensors with a list of classes beside."""
    root = tmp_path_factory.mktemp("published")
    (root / "small.py").write_text((zoo_root / "small.py").read_text())
    torch.save({"state_dict": load_checkpoint(trained.checkpoint)["state_dict"]}, root / "small.pth")
    (root / "zoo.toml").write_text(ENTRY + f"classes = {list(CLASSES)}\n".replace("'", '"'))
    return root


def rows(root: Path, checkpoint: Path, labels: tuple[str, ...], folder: Path) -> list[Detections]:
    images = sorted(folder.glob("*.png"))
    inference = PoolInference("small", checkpoint, labels, "cpu", root)
    return list(inference.run([PoolImage(int(path.stem), path) for path in images]))


def test_boxes_are_the_published_ones_of_the_known_classes(
    published: Path, zoo_root: Path, trained: TrainResult, test_json: Path, tmp_path: Path
) -> None:
    labels = ("thing", "Disc", "unheard of")
    save_as_is("small", labels, {"Disc": (DISC,), "thing": (SQUARE,)}, tmp_path / "as_is.pth", published)
    told = rows(published, tmp_path / "as_is.pth", labels, test_json.parent)
    plain = rows(zoo_root, trained.checkpoint, CLASSES, test_json.parent)
    assert sum(len(one) for one in told) > 5 and {one.image_id for one in told} == {one.image_id for one in plain}
    for ours, theirs in zip(told, plain, strict=True):
        wanted = theirs.filter(theirs.class_indices != CLASSES.index(BAR))
        assert np.array_equal(ours.boxes_xyxy, wanted.boxes_xyxy) and np.array_equal(ours.scores, wanted.scores)
        assert np.array_equal(ours.embeddings, wanted.embeddings)
        names = [labels[i] for i in ours.class_indices]
        assert names == [("thing", "Disc")[i] for i in wanted.class_indices]
        assert ours.class_probs.shape == (len(ours), 3)
        assert np.allclose(ours.class_probs[:, 1], wanted.class_probs[:, CLASSES.index(DISC)])
        assert not ours.class_probs[:, 2].any(), "nothing is known of that label"


def test_several_classes_of_one_label_leave_one_box_an_object(
    published: Path, zoo_root: Path, trained: TrainResult, test_json: Path, tmp_path: Path
) -> None:
    save_as_is("small", ("thing",), {"thing": CLASSES}, tmp_path / "as_is.pth", published)
    merged = rows(published, tmp_path / "as_is.pth", ("thing",), test_json.parent)
    plain = rows(zoo_root, trained.checkpoint, CLASSES, test_json.parent)
    for found, theirs in zip(merged, plain, strict=True):
        assert set(found.class_indices.tolist()) <= {0}
        x1, y1, x2, y2 = found.boxes_xyxy.T
        wide = np.clip(np.minimum(x2[:, None], x2) - np.maximum(x1[:, None], x1), 0, None)
        high = np.clip(np.minimum(y2[:, None], y2) - np.maximum(y1[:, None], y1), 0, None)
        area = (x2 - x1) * (y2 - y1)
        overlap = wide * high / (area[:, None] + area - wide * high)
        assert (overlap[~np.eye(len(found), dtype=bool)] <= 0.5 + 1e-4).all(), "the detector's own threshold is 0.5"
        surest = found.class_probs[:, 0]
        assert (surest >= found.scores - 1e-6).all() and np.isclose(surest, found.scores).mean() > 0.5
        for box in found.boxes_xyxy[surest > found.scores + 1e-6]:  # the detector suppressed its surer class
            same = (theirs.boxes_xyxy == box).all(1)
            assert same.any() and theirs.scores[same].max() < surest[(found.boxes_xyxy == box).all(1)].max() - 1e-6


def test_labels_that_share_a_class_get_its_boxes_once_under_the_first(
    published: Path, test_json: Path, tmp_path: Path
) -> None:
    known = {"ball": (DISC,), "coin": (DISC,)}
    save_as_is("small", ("coin", "ball"), known, tmp_path / "as_is.pth", published)
    found = rows(published, tmp_path / "as_is.pth", ("coin", "ball"), test_json.parent)
    assert {int(i) for one in found for i in one.class_indices} == {1}, "the first in the mapping, not in the config"


def test_evaluation_reads_it_as_any_version(published: Path, tmp_path: Path) -> None:
    labels = (DISC, "unheard of", SQUARE)
    save_as_is("small", labels, {DISC: (DISC,), SQUARE: (SQUARE,)}, tmp_path / "as_is.pth", published)
    (tmp_path / "set").mkdir()
    truth = write_set(tmp_path / "set", 8, seed=1, classes=(SQUARE, DISC, "unheard of"))
    metrics = evaluate("small", tmp_path / "as_is.pth", labels, truth, "cpu", zoo_root=published)
    assert metrics.per_class[SQUARE] > 0.05 and metrics.per_class["unheard of"] == 0


def test_probabilities_of_a_softmax_stay_a_distribution() -> None:
    given = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])  # three classes and background
    found = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 9, 9], [20, 20, 30, 30]]),
        scores=torch.tensor([0.3, 0.7]),
        labels=torch.tensor([2, 0]),
        ppal_probs=given,
    )
    told = Relabelling.of(("a", "b", "c"), ("x", "y"), {"y": ("b", "c")}).apply(found)
    assert told.labels.tolist() == [1] and told.bboxes.tolist() == [[0, 0, 9, 9]]
    assert torch.allclose(told.ppal_probs, torch.tensor([[0.0, 0.5, 0.5]]))
    Detections(1, told.bboxes, told.scores, told.labels, torch.zeros(1, 0), told.ppal_probs, softmax=True)


def test_an_image_without_boxes_stays_one() -> None:
    empty = InstanceData(bboxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.long))
    assert len(Relabelling.of(("a", "b"), ("x",), {"x": ("a", "b")}).apply(empty)) == 0


def zoo_with(published: Path, root: Path, change: Any) -> Path:
    for name in ("small.py", "small.pth", "zoo.toml"):
        (root / name).write_bytes((published / name).read_bytes())
    change(root)
    return root


def test_missing_weights_are_told(published: Path, tmp_path: Path) -> None:
    root = zoo_with(published, tmp_path, lambda root: (root / "small.pth").unlink())
    with pytest.raises(WeightsUnavailable, match="missing"):
        save_as_is("small", ("x",), {"x": (DISC,)}, tmp_path / "as_is.pth", root)
    assert not (tmp_path / "as_is.pth").exists()


def test_weights_without_a_class_list_are_told(published: Path, tmp_path: Path) -> None:
    root = zoo_with(published, tmp_path, lambda root: (root / "zoo.toml").write_text(ENTRY))
    with pytest.raises(CheckpointError, match=r"know green disc, got 0 other classes; correct weights\.classes"):
        save_as_is("small", ("x",), {"x": (DISC,)}, tmp_path / "as_is.pth", root)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no checkpoint at all", "cannot be read"),
        (None, "tensors missing or of another shape"),
    ],
)
def test_weights_that_are_not_this_detectors_are_told(
    published: Path, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    def change(root: Path) -> None:
        if content is not None:
            (root / "small.pth").write_bytes(content)
        else:
            stored = torch.load(root / "small.pth")["state_dict"]
            torch.save({"state_dict": dict(list(stored.items())[:-2])}, root / "small.pth")

    root = zoo_with(published, tmp_path, change)
    with pytest.raises(CheckpointError, match=reason):
        save_as_is("small", ("x",), {"x": (DISC,)}, tmp_path / "as_is.pth", root)


def test_weights_without_counters_of_batch_norms_are_whole(published: Path, tmp_path: Path) -> None:
    """Weights that were converted from other software have none, and torch does without."""

    def change(root: Path) -> None:
        stored = torch.load(root / "small.pth")["state_dict"]
        kept = {name: value for name, value in stored.items() if not name.endswith("num_batches_tracked")}
        assert len(kept) < len(stored)
        torch.save({"state_dict": kept}, root / "small.pth")

    root = zoo_with(published, tmp_path, change)
    save_as_is("small", ("x",), {"x": (DISC,)}, tmp_path / "as_is.pth", root)
    whole = load_checkpoint(published / "small.pth")["state_dict"]
    assert load_checkpoint(tmp_path / "as_is.pth")["state_dict"].keys() == whole.keys()


def test_a_class_list_of_another_length_is_told(published: Path, tmp_path: Path) -> None:
    longer = ENTRY + f"classes = {[*CLASSES, 'more']}\n".replace("'", '"')
    root = zoo_with(published, tmp_path, lambda root: (root / "zoo.toml").write_text(longer))
    with pytest.raises(CheckpointError, match=r"with 4 classes.*another shape"):
        save_as_is("small", ("x",), {"x": (DISC,)}, tmp_path / "as_is.pth", root)


def test_the_checkpoints_own_class_list_comes_before_the_zoos(published: Path, test_json: Path, tmp_path: Path) -> None:
    def change(root: Path) -> None:
        stored = torch.load(root / "small.pth")["state_dict"]
        torch.save({"state_dict": stored, "meta": {"dataset_meta": {"classes": ("a", "b", "c")}}}, root / "small.pth")

    root = zoo_with(published, tmp_path, change)
    with pytest.raises(CheckpointError, match="green disc"):
        save_as_is("small", ("x",), {"x": (DISC,)}, tmp_path / "as_is.pth", root)
    save_as_is("small", ("x",), {"x": ("b",)}, tmp_path / "as_is.pth", root)
    assert any(len(found) for found in rows(root, tmp_path / "as_is.pth", ("x",), test_json.parent))


def test_it_is_not_exported_as_a_detector_of_the_labels(published: Path, tmp_path: Path) -> None:
    save_as_is("small", ("x",), {"x": (DISC,)}, tmp_path / "as_is.pth", published)
    with pytest.raises(DetectorError, match="expected a trained version"):
        export_model("small", tmp_path / "as_is.pth", ("x",), tmp_path / "out.pt", "torchscript", published)


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("bbox_head.conv_cls.bias", (3, 2, 3), [0.5, -1]),
        ("bbox_head.retina_cls.bias", (6, 4, 6), [0.5, -1, 3.5, -1]),
        ("roi_head.bbox_head.fc_cls.bias", (4, 3, 4), [0.5, -1, 3]),
        ("roi_head.bbox_head.fc_reg.bias", (12, 8, 12), [2, 3, 4, 5, -1, -1, -1, -1]),
    ],
)
def test_a_label_of_several_classes_starts_from_the_mean_of_their_rows(
    name: str, rows: tuple[int, int, int], expected: list[float]
) -> None:
    source, fresh = torch.arange(float(rows[0])), torch.full((rows[1],), -1.0)
    wider = {name: torch.Size([rows[2]])}
    sources = {"pet": ("cat", "dog"), "gone": ("cow",)}
    old, new = ("cat", "dog", "cow"), ("pet", "fish")
    assert carry_classes({name: source}, old, new, {name: fresh}, wider, sources)[name].tolist() == expected


def test_a_training_starts_from_the_rows_of_known_classes(published: Path, tmp_path: Path) -> None:
    entry, labels = find_entry("small", published), ("coin", "ball", "unheard of")
    assert entry.weights is not None and entry.weights.path is not None
    known = {"coin": (DISC,), "ball": (DISC, SQUARE), "renamed since": (BAR,)}
    with isolated("test-start"):
        config = build_config(entry, labels)
        plain, model = build_model(config), build_model(config)
        before = plain.state_dict()["bbox_head.retina_cls.bias"].clone()
        initialiser(InitialWeights(entry.weights.path, "detector", CLASSES), config, labels)(plain)
        initialiser(InitialWeights(entry.weights.path, "detector", CLASSES, known), config, labels)(model)
    given = load_checkpoint(entry.weights.path)["state_dict"]["bbox_head.retina_cls.weight"]
    started = model.state_dict()["bbox_head.retina_cls.weight"]
    assert torch.equal(started[0::3], given[1::3]), "every anchor's row of the class"
    assert torch.allclose(started[1::3], (given[1::3] + given[0::3]) / 2)
    fresh = plain.state_dict()["bbox_head.retina_cls.bias"]
    assert torch.equal(fresh, before), "nothing is known without a mapping"


def test_a_training_takes_the_mapping_from_its_request(published: Path, train_json: Path, tmp_path: Path) -> None:
    """Two steps do not unlearn it: the head still scores the class, one that starts fresh does not."""
    best = {}
    for name, known in (("known", {label: (label,) for label in CLASSES}), ("fresh", {})):
        request = TrainRequest(
            "small", CLASSES[::-1], train_json, None, tmp_path / name, 3, "cpu", max_iterations=2, difficulty=False,
            zoo_root=published, known=known,
        )  # fmt: skip
        best[name] = evaluate("small", train(request).checkpoint, CLASSES[::-1], train_json, "cpu", zoo_root=published)
    assert best["known"].map > 0.05 > best["fresh"].map


def test_a_start_from_the_published_detector_itself_goes_over_by_class(published: Path, tmp_path: Path) -> None:
    """``init_weights: last`` may meet its checkpoint: its rows are the weights' classes, not the project's labels."""
    labels = ("coin", "unheard of")
    save_as_is("small", labels, {"coin": (DISC,)}, tmp_path / "as_is.pth", published)
    with isolated("test-start"):
        config = build_config(find_entry("small", published), labels)
        model = build_model(config)
        initialiser(InitialWeights(tmp_path / "as_is.pth", "detector", (), {"coin": (DISC,)}), config, labels)(model)
    given = load_checkpoint(tmp_path / "as_is.pth")["state_dict"]["bbox_head.retina_cls.weight"]
    assert torch.equal(model.state_dict()["bbox_head.retina_cls.weight"][0::2], given[1::3])


def test_with_a_side_of_tiles_it_looks_through_tiles(published: Path, test_json: Path, tmp_path: Path) -> None:
    known = {"thing": (DISC, SQUARE, BAR)}
    save_as_is("small", ("thing",), known, tmp_path / "whole.pth", published)
    save_as_is("small", ("thing",), known, tmp_path / "tiles.pth", published, tile=64)
    assert PoolInference("small", tmp_path / "tiles.pth", ("thing",), "cpu", published).loaded.tile == 64
    whole, tiles = (
        rows(published, tmp_path / f"{name}.pth", ("thing",), test_json.parent) for name in ("whole", "tiles")
    )
    assert [one.image_id for one in whole] == [one.image_id for one in tiles]
    assert all(not one.class_indices.any() and one.class_probs.shape == (len(one), 1) for one in tiles)
    assert any(len(one) != len(other) for one, other in zip(whole, tiles, strict=True))


@pytest.mark.parametrize("name", ["ssd_tiny", "faster_rcnn_tiny", "dino_tiny", "yolox_toy", "fcos_tiny"])
def test_every_family_tells_its_classes_in_labels(name: str, test_json: Path, tmp_path: Path) -> None:
    """Softmax, two stages, queries: what reaches a strategy is of the labels alone, a hundred of them here."""
    classes = ("a", "b", "c", "d")
    shutil.copytree(default_zoo_root(), tmp_path / "zoo")
    with isolated("test-family"):
        torch.manual_seed(1)
        model = build_model(build_config(find_entry(name), classes))
        with torch.no_grad():
            if hasattr(model, "level_embed"):
                model.level_embed.zero_()  # unset memory; init_weights would leave the others low scores
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        torch.save({"state_dict": model.state_dict()}, tmp_path / "zoo" / "own.pth")
    file = tmp_path / "zoo" / "zoo.toml"
    weights = (
        f'[{name}.weights]\nkind = "detector"\npath = "own.pth"\nlicence = "MIT"\nclasses = ["a", "b", "c", "d"]\n'
    )
    file.write_text(file.read_text() + weights)
    labels = tuple(f"label {number}" for number in range(100))
    known = {"label 7": ("a", "c"), "label 99": ("d",)}
    save_as_is(name, labels, known, tmp_path / "as_is.pth", tmp_path / "zoo")
    inference = PoolInference(name, tmp_path / "as_is.pth", labels, "cpu", tmp_path / "zoo")
    found = [
        *inference.run([PoolImage(101, test_json.parent / "101.png"), PoolImage(102, test_json.parent / "102.png")])
    ]
    indices = {int(i) for one in found for i in one.class_indices}
    assert indices and indices <= {7, 99}
    for one in found:
        assert one.class_probs.shape == (len(one), 100 + one.softmax)
        unknown = np.delete(one.class_probs, [7, 99, 100] if one.softmax else [7, 99], axis=1)
        assert not unknown.any()
