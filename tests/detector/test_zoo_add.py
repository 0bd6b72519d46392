"""An operator's own config and checkpoint: what is taken, what is refused, and what is left behind."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer

from ppal_backend.detector.config import build_config
from ppal_backend.detector.models import build_model
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.train.training import TrainRequest, train
from ppal_backend.detector.weights import classes_of, load_any, load_checkpoint
from ppal_backend.detector.weights.initial import save_as_is
from ppal_backend.detector.zoo import add as zoo_add
from ppal_backend.detector.zoo import find_entry, load_zoo
from ppal_backend.detector.zoo.add import add
from ppal_backend.errors import CheckpointError, DetectorError, UnsupportedHead
from tests.detector.shapes import CLASSES, write_set

BASE = """
model = dict(
    type="RetinaNet",
    data_preprocessor=dict(type="DetDataPreprocessor", pad_size_divisor=32),
    backbone=dict(type="ResNet", depth=18, base_channels=8, stem_channels=8, out_indices=(0, 1, 2, 3),
                  init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet18")),
    neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=16, start_level=1, num_outs=3),
    bbox_head=dict(type="RetinaHead", num_classes=7, in_channels=16, feat_channels=16, stacked_convs=1,
                   anchor_generator=dict(type="AnchorGenerator", octave_base_scale=4, scales_per_octave=1,
                                         ratios=[1.0], strides=[8, 16, 32])),
    train_cfg=dict(assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
                   sampler=dict(type="PseudoSampler"), allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(nms_pre=100, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=20),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.02, momentum=0.9))
"""
OWN = """
_base_ = ["base.py"]
train = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(64, 96), keep_ratio=True),
    dict(type="PackDetInputs"),
]
test = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(64, 96), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(batch_size=4, dataset=dict(type="RepeatDataset", dataset=dict(pipeline=train)))
test_dataloader = dict(dataset=dict(pipeline=test))
auto_scale_lr = dict(enable=False, base_batch_size=16)
"""
TOOD = """
model = dict(type="TOOD", bbox_head=dict(_delete_=True, type="TOODHead", num_classes=7, in_channels=16,
    feat_channels=16, stacked_convs=1, num_dcn=0, norm_cfg=dict(type="GN", num_groups=8),
    anchor_generator=dict(type="AnchorGenerator", ratios=[1.0], octave_base_scale=4, scales_per_octave=1,
                          strides=[8, 16, 32]),
    bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
    initial_loss_cls=dict(type="FocalLoss", use_sigmoid=True, activated=True, gamma=2.0, alpha=0.25),
    loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, activated=True, beta=2.0),
    loss_bbox=dict(type="GIoULoss")),
    train_cfg=dict(initial_epoch=4, initial_assigner=dict(type="ATSSAssigner", topk=9),
                   assigner=dict(_delete_=True, type="TaskAlignedAssigner", topk=13), alpha=1, beta=6))
"""
FREE_ANCHOR = 'model = dict(bbox_head=dict(type="FreeAnchorRetinaHead", loss_bbox=dict(type="SmoothL1Loss")))\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A complete mmdetection config that inherits from another file and names weights of its own."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "base.py").write_text(BASE)
    (tmp_path / "theirs" / "My-Net.v2.py").write_text(OWN)
    return tmp_path / "theirs" / "My-Net.v2.py"


@pytest.fixture
def own_zoo(tmp_path: Path) -> Path:
    return tmp_path / "zoo"


@pytest.fixture
def checkpoint(config: Path, tmp_path: Path) -> Path:
    """What a training of that config elsewhere, on five classes, would have left: its log is no plain weight."""
    entry = find_entry("retinanet_tiny")
    with isolated("test-zoo-add"):
        torch.manual_seed(11)  # not the seed of a training
        model = build_model(build_config(type(entry)(**{**vars(entry), "config": config}), tuple("abcde")))
        model.init_weights()
    path = tmp_path / "epoch_12.pth"
    hub = {"log_scalars": {"train/loss": HistoryBuffer([1.0], [1])}}
    torch.save({"state_dict": model.state_dict(), "meta": {"epoch": 12}, "message_hub": hub}, path)
    with pytest.raises(CheckpointError, match="more than plain weights"):
        load_checkpoint(path)
    return path


def test_an_own_detector_is_found_and_trains_from_its_own_weights(
    config: Path, checkpoint: Path, own_zoo: Path, tmp_path: Path
) -> None:
    added = add(config, checkpoint, own_zoo, device="cpu")
    assert (added.entry.name, added.entry.head_family) == ("my_net_v2", "anchor")
    assert added.entry.input_size == (96, 64)
    assert added.entry.schedule.batch_size == 4
    assert added.entry.schedule.lr == pytest.approx(0.02 * 4 / 16)
    assert added.report.steps == 2 and added.report.difficulty is not None
    for file in (*config.parent.iterdir(), checkpoint):
        file.unlink()  # the zoo holds copies
    assert list(load_zoo(own_zoo)) == [*load_zoo(), "my_net_v2"]
    images = write_set(tmp_path / "images", 4)
    request = TrainRequest(
        "my_net_v2", CLASSES, images, None, tmp_path / "work", device="cpu", max_iterations=1, zoo_root=own_zoo
    )
    trained = load_checkpoint(train(request).checkpoint)["state_dict"]
    start = load_checkpoint(own_zoo / "my_net_v2" / "weights.pth")["state_dict"]
    name = "backbone.layer2.0.conv1.weight"
    assert float((trained[name] - start[name]).abs().max()) < 0.01 < float(start[name].abs().max())
    assert trained["bbox_head.retina_cls.bias"].shape != start["bbox_head.retina_cls.bias"].shape
    assert added.tensors == len(start) - 2  # all but the layer that depends on the classes


LAZY = """
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.models import FPN, DetDataPreprocessor, ResNet, RetinaHead, RetinaNet
from mmdet.models.task_modules import AnchorGenerator, MaxIoUAssigner, PseudoSampler
from mmengine.model import PretrainedInit
from mmengine.optim import OptimWrapper
from torch.optim import SGD
model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor, pad_size_divisor=32),
    backbone=dict(type=ResNet, depth=18, base_channels=8, stem_channels=8, out_indices=(0, 1, 2, 3), frozen_stages=1,
                  init_cfg=dict(type=PretrainedInit, checkpoint="/no/such/file.pth")),
    neck=dict(type=FPN, in_channels=[8, 16, 32, 64], out_channels=16, start_level=1, num_outs=3),
    bbox_head=dict(type=RetinaHead, num_classes=7, in_channels=16, feat_channels=16, stacked_convs=1,
                   anchor_generator=dict(type=AnchorGenerator, octave_base_scale=4, scales_per_octave=1,
                                         ratios=[1.0], strides=[8, 16, 32])),
    train_cfg=dict(assigner=dict(type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
                   sampler=dict(type=PseudoSampler), allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(nms_pre=100, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=20),
)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.02, momentum=0.9))
train = [
    dict(type=LoadImageFromFile),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=Resize, scale=96, keep_ratio=True),
    dict(type=PackDetInputs),
]
test = [
    dict(type=LoadImageFromFile),
    dict(type=Resize, scale=96, keep_ratio=True),
    dict(type=PackDetInputs, meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train))
test_dataloader = dict(batch_size=1, dataset=dict(dataset=dict(pipeline=test)))
"""


def test_a_config_that_imports_its_classes_is_taken(own_zoo: Path, tmp_path: Path) -> None:
    """mmengine's newer style. Its class of weights to fetch has another name than it is registered by."""
    (tmp_path / "lazy.py").write_text(LAZY)
    added = add(tmp_path / "lazy.py", None, own_zoo, device="cpu")
    assert (added.entry.title, added.entry.input_size) == ("RetinaNet, ResNet18 (your own)", (96, 96))
    images = write_set(tmp_path / "images", 4, size=(400, 300))
    request = TrainRequest(
        "lazy", CLASSES, images, None, tmp_path / "work", device="cpu", max_iterations=1, zoo_root=own_zoo,
        init_weights="random", slices=64,
    )  # fmt: skip
    assert train(request).iterations == 1


def test_a_second_detector_joins_the_first(config: Path, own_zoo: Path) -> None:
    add(config, None, own_zoo, name="first", device="cpu")
    (own_zoo / "zoo.toml").write_text((own_zoo / "zoo.toml").read_text() + "# a remark\n")
    add(config, None, own_zoo, name="second", device="cpu")
    text = (own_zoo / "zoo.toml").read_text()
    assert [name for name in tomllib.loads(text) if name != "include_packaged"] == ["first", "second"]
    assert "# a remark" in text
    assert find_entry("second", own_zoo).weights is None


def test_a_pipeline_that_combines_images_before_it_reads_any_is_named(config: Path, own_zoo: Path) -> None:
    text = config.read_text().replace('train = [\n    dict(type="LoadImageFromFile"),', 'train = [dict(type="Mosaic"),')
    config.write_text(text)
    with pytest.raises(DetectorError, match="first step, Mosaic, combines several images; put its data set into"):
        add(config, None, own_zoo, device="cpu")
    assert not own_zoo.exists()


@pytest.mark.parametrize("name", ["retinanet_tiny", "retinanet_r50", "mine"])
def test_a_name_that_is_taken_is_refused(name: str, config: Path, own_zoo: Path) -> None:
    own_zoo.mkdir()
    (own_zoo / "zoo.toml").write_text(
        '[mine]\ntitle = "t"\npaper = ""\nconfig = "m.py"\nhead_family = "anchor"\ninput_size = [64, 64]\n'
        "schedule = { epochs = 1, min_iterations = 1, max_iterations = 1, batch_size = 1, lr = 0.1 }\n"
    )
    (own_zoo / "m.py").write_text("")
    with pytest.raises(DetectorError, match=f"'{name}', which the zoo has"):
        add(config, None, own_zoo, name=name, device="cpu")
    assert sorted(path.name for path in own_zoo.iterdir()) == ["m.py", "zoo.toml"]


@pytest.mark.parametrize("name", ["auto", "recipe", "include packaged"])
def test_a_name_that_means_something_else_in_the_file_is_refused(name: str, config: Path, own_zoo: Path) -> None:
    with pytest.raises(DetectorError, match="which means something else in the zoo's file; give another with --name"):
        add(config, None, own_zoo, name=name, device="cpu")
    assert not own_zoo.exists()


def test_a_name_must_be_one_that_projects_can_give(config: Path, own_zoo: Path) -> None:
    with pytest.raises(DetectorError, match="small letters"):
        add(config, None, own_zoo, name="///", device="cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("this is no Python", "cannot be read"),
        ("_base_ = ['absent.py']", r"cannot be read.*absent\.py"),
        ("model = undefined", "cannot be read"),
        ("train_pipeline = []", "expected a 'model'"),
        ("model = 3", "expected a 'model'"),
        (OWN.replace("scale=(64, 96)", "scale_factor=0.5"), "add a Resize"),
        (OWN + "optim_wrapper = dict(_delete_=True, type='OptimWrapper')", "optimizer.lr"),
        (OWN.replace("test_dataloader =", "other ="), "test_pipeline|test pipeline"),
        (OWN + "model = dict(neck=dict(type='NoSuchNeck'))", "NoSuchNeck"),
        (OWN + "import numpy as np\nmean = np.array([1.0, 2.0])", r"values as mmdetection.*My-Net\.v2\.py"),
        (OWN + "class Net: pass", r"values as mmdetection.*My-Net\.v2\.py.*Net"),
        (OWN + "optim_wrapper = None", "values as mmdetection"),
        (OWN.replace("batch_size=4", "batch_size=None"), "values as mmdetection"),
        (OWN.replace("base_batch_size=16", "base_batch_size=0"), "values as mmdetection"),
        (OWN.replace("(64, 96)", "(16, 24)"), "at least 32 px"),
        ("model = dict(type='FCOS')\ndata = dict(samples_per_gpu=2)", "one of mmdetection 2"),
        (OWN + "model = dict(bbox_head=dict(in_channels=24))", "neither trained nor run"),
    ],
)
def test_a_config_that_is_none_is_refused(text: str, message: str, config: Path, own_zoo: Path) -> None:
    config.write_text(text)
    with pytest.raises(DetectorError, match=message):
        add(config, None, own_zoo, device="cpu")
    assert not own_zoo.exists()


def test_names_that_toml_cannot_hold_as_they_are(
    config: Path, checkpoint: Path, own_zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's name in Latin-1, and classes with a control character."""
    monkeypatch.setattr(zoo_add, "check", lambda *_, **__: SimpleNamespace(device="cpu"))
    path = checkpoint.with_name(b"caf\xe9.pth".decode("utf-8", "surrogateescape"))
    classes = ("a\x7f", 'b"', "c\n", "d\\", "é日")
    torch.save({"state_dict": load_any(checkpoint)["state_dict"], "meta": {"CLASSES": classes}}, path)
    weights = add(config, path, own_zoo, device="cpu").entry.weights
    assert weights is not None and weights.classes == classes and weights.source.endswith("caf?.pth")


def test_a_file_of_another_kind_or_none_is_refused(config: Path, own_zoo: Path) -> None:
    for path in (config.with_name("absent.py"), config.with_suffix(".txt")):
        with pytest.raises(DetectorError, match="cannot be read"):
            add(path, None, own_zoo, device="cpu")


def test_heads_without_a_probe_need_a_word(config: Path, own_zoo: Path) -> None:
    config.write_text(OWN + FREE_ANCHOR)
    with pytest.raises(UnsupportedHead, match=r"FreeAnchorRetinaHead.*anchor \(RetinaNet.*RoI heads.*--no-difficulty"):
        add(config, None, own_zoo, device="cpu")
    assert not own_zoo.exists()
    added = add(config, None, own_zoo, difficulty=False, device="cpu")
    assert added.report.difficulty is None
    assert added.entry.head_family == "freeanchorretinahead"


def test_heads_that_cannot_be_traced_are_refused_whatever_is_said(
    config: Path, own_zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before any time is spent on training them."""
    monkeypatch.setattr(zoo_add, "check", None)
    config.write_text(OWN + TOOD)
    with pytest.raises(UnsupportedHead, match=r"no one-pass inference covers TOOD.*RetinaNet"):
        add(config, None, own_zoo, difficulty=False, device="cpu")


def test_weights_of_something_else_are_refused(config: Path, own_zoo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"state_dict": {"backbone.conv1.weight": torch.ones(1)}}, other)
    with pytest.raises(CheckpointError, match="same architecture"):
        add(config, other, own_zoo, device="cpu")
    other.write_bytes(b"no checkpoint at all")
    with pytest.raises(CheckpointError, match="cannot be read"):
        add(config, other, own_zoo, device="cpu")
    assert not own_zoo.exists()


def test_a_backbone_alone_is_taken_as_one(config: Path, checkpoint: Path, own_zoo: Path, tmp_path: Path) -> None:
    state = load_any(checkpoint)["state_dict"]
    alone = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    torch.save(alone, tmp_path / "backbone.pth")
    added = add(config, tmp_path / "backbone.pth", own_zoo, device="cpu")
    assert added.entry.weights is not None and added.entry.weights.kind == "backbone"
    assert added.tensors == len(alone)


@pytest.mark.parametrize(("listed", "kept"), [("abcde", ["a", "b", "c", "d", "e"]), ("abc", [])])
def test_a_list_of_classes_that_is_not_that_of_the_head_is_left_out_and_told(
    listed: str, kept: list[str], config: Path, checkpoint: Path, own_zoo: Path, tmp_path: Path
) -> None:
    content = load_any(checkpoint)
    meta = {"dataset_meta": {"classes": tuple(listed)}}
    torch.save({"state_dict": content["state_dict"], "meta": meta}, tmp_path / "listed.pth")
    added = add(config, tmp_path / "listed.pth", own_zoo, device="cpu")
    assert added.entry.weights is not None and list(added.entry.weights.classes) == kept
    assert ["list 3 classes" in remark for remark in added.remarks] == ([] if kept else [True])


WIDE_HEAD = "model = dict(bbox_head=dict(stacked_convs=40))\n"  # a backbone of less than half of the detector


@pytest.fixture
def imagenet(checkpoint: Path, tmp_path: Path) -> Path:
    """A classifier as mmpretrain publishes them: its backbone under the detector's names, and its head."""
    state = {k: v for k, v in load_any(checkpoint)["state_dict"].items() if k.startswith("backbone.")}
    classes = ["tench", "goldfish", "great white shark"]
    head = {"head.fc.weight": torch.ones(3, 64), "head.fc.bias": torch.zeros(3)}
    torch.save({"state_dict": {**state, **head}, "meta": {"dataset_meta": {"classes": classes}}}, tmp_path / "imagenet")
    return tmp_path / "imagenet"


@pytest.mark.parametrize("more", ["", WIDE_HEAD])
def test_a_backbone_of_a_published_classifier_is_taken_as_one(
    more: str, config: Path, imagenet: Path, own_zoo: Path, tmp_path: Path
) -> None:
    config.write_text(OWN + more)
    added = add(config, imagenet, own_zoo, device="cpu")
    assert added.entry.weights is not None
    assert (added.entry.weights.kind, added.entry.weights.classes) == ("backbone", ())
    stored = load_checkpoint(own_zoo / "my_net_v2" / "weights.pth")
    names = {name for name in load_any(imagenet)["state_dict"] if name.startswith("backbone.")}
    assert set(stored["state_dict"]) == names and added.tensors == len(names), "without the classifier's head"
    assert classes_of(stored) == (), "ImageNet's names are none of the detector's"


@pytest.mark.parametrize("more", ["", WIDE_HEAD])
def test_a_classifiers_checkpoint_starts_a_training_as_a_backbone(
    more: str, config: Path, imagenet: Path, own_zoo: Path, tmp_path: Path
) -> None:
    """As the initial weights of one project, without an entry in the zoo."""
    config.write_text(OWN + more)
    add(config, None, own_zoo, device="cpu")
    request = TrainRequest(
        "my_net_v2", CLASSES, write_set(tmp_path / "images", 4), None, tmp_path / "work", device="cpu",
        max_iterations=1, zoo_root=own_zoo, init_weights=imagenet, known={CLASSES[0]: ["tench"]},
    )  # fmt: skip
    trained, start = load_checkpoint(train(request).checkpoint), load_any(imagenet)["state_dict"]
    name = "backbone.layer2.0.conv1.weight"
    assert float((trained["state_dict"][name] - start[name]).abs().max()) < 0.01 < float(start[name].abs().max())


@pytest.fixture
def told_wrong(config: Path, imagenet: Path, own_zoo: Path) -> Path:
    """A zoo as an earlier version stored it: a classifier's checkpoint as a whole detector's, with ImageNet's names."""
    add(config, imagenet, own_zoo, device="cpu")
    content = load_any(imagenet)
    torch.save(content, own_zoo / "my_net_v2" / "weights.pth")
    table = (own_zoo / "zoo.toml").read_text()
    entry = find_entry("my_net_v2", own_zoo)
    assert entry.weights is not None
    table = table.replace('kind = "backbone"', f'kind = "detector"\nclasses = {list(classes_of(content))}')
    (own_zoo / "zoo.toml").write_text(table.replace(entry.weights.sha256, ""))
    return own_zoo


REMEDY = r'kind = "backbone" and remove classes under \[my_net_v2\.weights\] in zoo\.toml'


def test_a_backbone_that_is_stored_as_a_whole_detector_trains_as_one_and_is_told(
    told_wrong: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = TrainRequest(
        "my_net_v2", CLASSES, write_set(tmp_path / "images", 4), None, tmp_path / "work", device="cpu",
        max_iterations=1, zoo_root=told_wrong,
    )  # fmt: skip
    train(request)
    assert re.search(REMEDY, caplog.text)


def test_a_backbone_that_is_stored_as_a_whole_detector_predicts_nothing_as_it_is(
    told_wrong: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=REMEDY):
        save_as_is("my_net_v2", ("fish",), {"fish": ("goldfish",)}, tmp_path / "as_is.pth", told_wrong)


def test_a_student_and_its_teacher_are_added_with_their_ratio(own_zoo: Path, tmp_path: Path) -> None:
    """mmdetection's names of pipelines and samplers are understood."""
    parts = Config.fromfile(find_entry("soft_teacher_tiny").config).to_dict()
    parts["sup_pipeline"], parts["unsup_pipeline"] = parts.pop("train_pipeline"), parts.pop("unlabelled_pipeline")
    del parts["unlabelled_ratio"]
    parts["train_dataloader"] = {"batch_size": 9, "sampler": {"source_ratio": [1, 2]}}
    Config(parts).dump(str(tmp_path / "pair.py"))
    added = add(tmp_path / "pair.py", None, own_zoo, device="cpu")
    assert added.entry.schedule.batch_size == 3
    config = build_config(added.entry, CLASSES, train_images=4)
    assert (config.model.type, config.unlabelled_ratio) == ("SoftTeacher", 2)
    assert build_config(added.entry, CLASSES).model.type == "FasterRCNN"
    parts["train_dataloader"]["sampler"]["source_ratio"] = [2, 3]
    Config(parts).dump(str(tmp_path / "odd.py"))
    with pytest.raises(DetectorError, match=r"whole number.*\[2, 3\]"):
        add(tmp_path / "odd.py", None, own_zoo, device="cpu")
    del parts["unsup_pipeline"]
    Config(parts).dump(str(tmp_path / "half.py"))
    with pytest.raises(DetectorError, match="unsup_pipeline"):
        add(tmp_path / "half.py", None, own_zoo, device="cpu")
