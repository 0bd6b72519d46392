"""Exported detectors compute what the detector itself does, in ONNX Runtime and in TorchScript."""

from __future__ import annotations

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from ppal_backend.detector.config import build_config
from ppal_backend.detector.data import build_pipeline
from ppal_backend.detector.heads import inference_family
from ppal_backend.detector.infer import exporting_model
from ppal_backend.detector.infer.exporting_model import FAMILIES, DenseOutputs, export_model
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.zoo import find_entry, load_zoo
from ppal_backend.errors import DetectorError, SettingsError, UnsupportedHead
from tests.detector.families import SIZE, batch, build
from tests.detector.shapes import CLASSES
from tests.detector.test_heads_inference import ready

DENSE = ("retinanet", "retinanet_decoded", "ssd", "fcos", "fcos_normed", "atss", "gfl", "ddod", "rtmdet", "yolox")


def find(boxes, scores, found):
    """Largest differences of each detection from the output that is closest to it."""
    for box, score, label in zip(found.ppal_boxes, found.scores, found.labels, strict=True):
        apart = (boxes - box).abs().max(1).values + 100 * (scores[:, label] - score).abs()
        yield float(apart.min())


@pytest.mark.parametrize("name", DENSE)
def test_what_the_detector_finds_is_among_the_outputs(name):
    model = ready(name)
    inference_family(model).trace_inference(model)
    height, width = SIZE
    data = {key: value[:1] for key, value in batch().items()}
    with torch.no_grad():
        (sample,) = model.test_step(data)
        image = model.data_preprocessor(data, False)["inputs"]
        outputs = DenseOutputs(model, image).eval()
        boxes, scores = outputs(image)
    assert len(sample.pred_instances.scores) >= 3 and sample.img_shape == SIZE
    limits = torch.tensor([width, height, width, height])
    clipped = boxes[0] if name == "yolox" else torch.minimum(boxes[0].clamp(min=0), limits)  # YOLOX clips none
    assert boxes.shape[:2] == scores.shape[:2] == (1, sum(outputs.levels)) and scores.shape[2] == 3
    assert max(find(clipped, scores[0], sample.pred_instances)) < 1e-3


@pytest.mark.parametrize("name", ["faster_rcnn", "dino", "paa", "tood"])
def test_heads_that_make_no_fixed_graph_are_refused(name):
    with pytest.raises(UnsupportedHead, match="expected a detector with a dense head"):
        DenseOutputs(build(name).eval(), torch.zeros(1, 3, 96, 128))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "1.png"
    cv2.imwrite(str(path), np.random.default_rng(4).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    return path


def prepared(path, described):
    """An image as the description beside the model says."""
    given = described["input"]
    picture = cv2.imread(str(path)).astype(np.float32)
    if given["channels"] == "RGB":
        picture = picture[:, :, ::-1]
    picture = (picture - np.float32(given["mean"])) / np.float32(given["std"])
    full = np.full(given["shape"], given["padding"]["value"], np.float32)
    full[0, :, : picture.shape[0], : picture.shape[1]] = picture.transpose(2, 0, 1)
    return full


def run(path, layout, image):
    if layout == "torchscript":
        return [output.numpy() for output in torch.jit.load(str(path))(torch.from_numpy(image))]
    import onnxruntime

    return onnxruntime.InferenceSession(str(path)).run(["boxes", "scores"], {"image": image})


@pytest.mark.parametrize("layout", ["onnx", "torchscript"])
def test_the_file_and_its_description_give_the_detectors_own_detections(layout, trained, zoo_root, image, tmp_path):
    done = export_model("small", trained.checkpoint, CLASSES, tmp_path / f"model.{layout}", layout, zoo_root)
    described = json.loads((tmp_path / f"model.{layout}.json").read_text())
    assert (described["classes"], described["format"], described["detector"]) == (list(CLASSES), layout, "small")
    assert sum(level["boxes"] for level in described["levels"]) == done.boxes
    assert done.input_shape == tuple(described["input"]["shape"])
    assert done.box_difference_px < 1e-2 and done.score_difference < 1e-4

    boxes, scores = run(done.file, layout, prepared(image, described))
    own = PoolInference("small", trained.checkpoint, CLASSES, "cpu", zoo_root)
    own.model.bbox_head.test_cfg.score_thr = 0.01
    (found,) = own.run([PoolImage(1, image)])
    assert len(found) >= 3
    boxes = boxes[0].clip(0, 64)
    for box, score, label in zip(found.boxes_xyxy, found.scores, found.class_indices, strict=True):
        apart = np.abs(boxes - box).max(1) + 100 * np.abs(scores[0, :, label] - score)
        assert apart.min() < 1e-2


@pytest.mark.parametrize(("name", "told"), [("ssd300_vgg16", "stretched"), ("retinanet_tiny", "ratio kept")])
def test_the_description_tells_what_becomes_of_other_proportions(name, told):
    entry = find_entry(name)
    with isolated(f"test-{name}"):
        pipeline = build_pipeline(build_config(entry, CLASSES).test_pipeline)
    assert exporting_model._place(SimpleNamespace(entry=entry, pipeline=pipeline)).startswith(told)


def test_a_file_that_computes_something_else_is_not_left(trained, zoo_root, tmp_path, monkeypatch):
    real = exporting_model._to_torchscript

    def wrong(model, image, path):
        run = real(model, image, path)
        return lambda picture: [part + 0.5 for part in run(picture)]

    monkeypatch.setattr(exporting_model, "_to_torchscript", wrong)
    with pytest.raises(DetectorError, match=r"got boxes 0\.5 px and scores 0\.5 apart; use the onnx format"):
        export_model("small", trained.checkpoint, CLASSES, tmp_path / "m.pt", "torchscript", zoo_root)
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_the_error_says_how_to_get_them(trained, zoo_root, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="got no onnx and no onnxruntime; install them with pip install"):
        export_model("small", trained.checkpoint, CLASSES, tmp_path / "m.onnx", "onnx", zoo_root)


def test_the_zoos_families_that_cannot_be_exported_are_the_others():
    assert {entry.head_family for entry in load_zoo().values()} - FAMILIES == {"roi", "detr", "grounding"}
