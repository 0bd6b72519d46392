"""The trial of a detector, and through it every entry of the zoo: one of each family here, all of them when slow."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest

from ppal_backend.detector.train.training import TrainRequest, evaluate, train
from ppal_backend.detector.zoo import load_zoo
from ppal_backend.detector.zoo.check import CheckReport, check
from ppal_backend.errors import UnknownDetector
from tests.detector.families import BERT, VOCABULARY
from tests.detector.shapes import CLASSES as SHAPES
from tests.detector.shapes import write_set

ZOO = load_zoo()
QUICK = (
    *("retinanet_tiny", "fcos_tiny", "atss_tiny", "gfl_tiny", "ddod_tiny", "rtmdet_toy", "yolox_toy"),
    *("faster_rcnn_tiny", "soft_teacher_tiny", "ssd_tiny", "dino_tiny"),
)
EMBEDDING = {"ssd_tiny": 0, "dino_tiny": 64}  # the others have 48 channels

# The large entries of other builds than the tiny ones are tried too, shrunk.
PIPELINES = """
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(SIDE, SIDE), keep_ratio=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(SIDE, SIDE), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
"""
RESNET = "dict(depth=18, base_channels=8, stem_channels=8, frozen_stages=-1, norm_eval=False)"
NARROW = "embed_dims=32"
FFN = "ffn_cfg=dict(embed_dims=32, feedforward_channels=48)"
FFN256 = "ffn_cfg=dict(feedforward_channels=48)"
RESNET18 = 'type="ResNet", depth=18, base_channels=8, stem_channels=8, out_indices=(1, 2, 3)'
SHRUNK = {
    "rtmdet": (
        "rtmdet_tiny",
        """model = dict(backbone=dict(widen_factor=0.125), neck=dict(in_channels=[32, 64, 128], out_channels=32),
                        bbox_head=dict(in_channels=32, feat_channels=32))""",
    ),
    "yolox": (
        "yolox_s",
        """model = dict(backbone=dict(deepen_factor=0.167, widen_factor=0.125),
                        neck=dict(in_channels=[32, 64, 128], out_channels=32),
                        bbox_head=dict(in_channels=32, feat_channels=32, stacked_convs=1))""",
    ),
    "ddod": (
        "ddod_r50",
        f"""model = dict(backbone={RESNET}, neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
                         bbox_head=dict(in_channels=32, feat_channels=32, stacked_convs=1,
                                        norm_cfg=dict(type="GN", num_groups=8)))""",
    ),
    "detr": (
        "dino_r50",
        f"""model = dict(num_queries=30, backbone={RESNET}, neck=dict(in_channels=[16, 32, 64], out_channels=32),
                         encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=dict({NARROW}), {FFN})),
                         decoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=dict({NARROW}),
                                      cross_attn_cfg=dict({NARROW}), {FFN})),
                         positional_encoding=dict(num_feats=16), bbox_head=dict({NARROW}),
                         dn_cfg=dict(group_cfg=dict(num_dn_queries=10)), test_cfg=dict(max_per_img=25))""",
    ),
    "grounding": (  # mmdetection's encoding of places in a text has 256 channels
        "mm_grounding_dino_t",
        f"""model = dict(num_queries=30, backbone=dict(_delete_=True, {RESNET18}), neck=dict(in_channels=[16, 32, 64]),
                         encoder=dict(num_layers=1, layer_cfg=dict({FFN256}), text_layer_cfg=dict({FFN256}),
                                      fusion_layer_cfg=dict(embed_dim=32)),
                         decoder=dict(num_layers=2, layer_cfg=dict({FFN256})), language_model=dict(bert={BERT}),
                         dn_cfg=dict(group_cfg=dict(num_dn_queries=10)), test_cfg=dict(max_per_img=25))""",
    ),
}

READS = ("grounding",)  # families that read prompts

ENTRY = """
[{name}]
title = "small"
paper = "none"
config = "{name}.py"
head_family = "{name}"
input_size = [128, 128]
[{name}.schedule]
epochs = 1
min_iterations = 2
max_iterations = 2
batch_size = 2
lr = 0.0001
"""


def shrunk_zoo(folder: Path, family: str) -> Path:
    """A zoo of one entry: the shrunk detector of a family."""
    name, model = SHRUNK[family]
    (folder / "zoo.toml").write_text(ENTRY.format(name=family) + (words(folder, family) if family in READS else ""))
    side = 384 if family == "ddod" else 128  # its deformable convolution needs three cells on the last level
    pipelines = PIPELINES.replace("SIDE", str(side))
    (folder / f"{family}.py").write_text(f"_base_ = [{str(ZOO[name].config)!r}]\n{model}\n{pipelines}")
    return folder


def words(folder: Path, name: str) -> str:
    """A vocabulary of a few words, and the table with which an entry has it; skips where nothing could read it."""
    pytest.importorskip("transformers", reason="transformers is not installed (requirements-grounding.txt)")
    (folder / "words.txt").write_text(VOCABULARY)
    digest = hashlib.sha256(VOCABULARY.encode()).hexdigest()
    return f'[{name}.vocabulary]\npath = "words.txt"\nsha256 = "{digest}"\nlicence = "MIT"\n'


def sound(report: CheckReport) -> None:
    """What every trial must show."""
    assert report.steps == 2
    assert report.difficulty is not None and len(report.difficulty) == 3
    assert all(math.isfinite(value) and 0.0 <= value <= 1.0 for value in report.difficulty)
    assert min(report.difficulty) < 1.0  # what it is before any step, and stays for a class without positives
    assert len(report.detections) == 4 and sum(report.detections) == report.embedding_shape[0]
    assert report.probability_shape[0] == sum(report.detections) > 0
    assert min(report.train_seconds, report.infer_seconds, report.memory_mb) > 0


@pytest.mark.parametrize("name", QUICK)
def test_the_tiny_detector_of_a_family_trains_and_runs(name: str) -> None:
    report = check(name, "cpu")
    sound(report)
    assert report.embedding_shape[1] == EMBEDDING.get(name, 48)
    assert report.probability_shape[1] == (4 if ZOO[name].head_family in ("ssd", "roi") else 3)
    assert 500_000 < report.parameters < 1_500_000


@pytest.mark.parametrize("family", SHRUNK)
def test_the_shrunk_detector_of_a_family_trains_and_runs(family: str, tmp_path: Path) -> None:
    report = check(family, "cpu", shrunk_zoo(tmp_path, family))
    sound(report)
    assert (report.embedding_shape[1], report.probability_shape[1]) == (256 if family in READS else 32, 3)
    assert set(report.detections) == {25 if family in ("detr", "grounding") else 100}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in QUICK])
def test_every_entry_of_the_zoo_trains_and_runs(name: str, tmp_path: Path) -> None:
    root = None
    if ZOO[name].vocabulary is not None:  # the published one is not here
        (tmp_path / f"{name}.py").write_text(f"_base_ = [{str(ZOO[name].config)!r}]\n")
        (tmp_path / "zoo.toml").write_text(ENTRY.format(name=name).replace("128", "1024") + words(tmp_path, name))
        root = tmp_path
    sound(check(name, "cpu", root))


def test_every_family_of_the_zoo_is_tried_in_the_fast_tests() -> None:
    assert {entry.head_family for entry in ZOO.values()} == {ZOO[name].head_family for name in QUICK} | set(SHRUNK)


def test_an_unknown_detector_is_named() -> None:
    with pytest.raises(UnknownDetector, match="yolo9000"):
        check("yolo9000", "cpu")


def test_images_are_needed() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        check("retinanet_tiny", "cpu", images=0)


def test_ssd_is_evaluated_although_its_head_lacks_what_mmdetection_looks_at(tmp_path: Path) -> None:
    images = write_set(tmp_path / "images", 2, size=(128, 128))
    request = TrainRequest("ssd_tiny", SHAPES, images, None, tmp_path / "train", device="cpu", max_iterations=1)
    metrics = evaluate("ssd_tiny", train(request).checkpoint, SHAPES, images, "cpu")
    assert 0.0 <= metrics.map50 <= 1.0
