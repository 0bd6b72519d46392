"""mmdetection's own configurations, shrunk until a test can afford them, one for every covered family of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mmdet
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import Config
from mmengine.structures import InstanceData

from ppal_backend.detector.config import set_class_count, strip_pretrained, unfreeze
from ppal_backend.detector.models import build_model
from ppal_backend.detector.open_vocabulary import Prompts, set_prompts
from ppal_backend.detector.runtime import isolated

CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
CLASSES = 3
SIZE = (96, 128)  # height, width
WIDTHS = [8, 16, 32, 64]

FILES = {
    "retinanet": "_base_/models/retinanet_r50_fpn.py",
    "retinanet_decoded": "_base_/models/retinanet_r50_fpn.py",
    "ssd": "",
    "fcos": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "fcos_normed": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "atss": "atss/atss_r50_fpn_1x_coco.py",
    "gfl": "gfl/gfl_r50_fpn_1x_coco.py",
    "ddod": "ddod/ddod_r50_fpn_1x_coco.py",
    "rtmdet": "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "yolox": "yolox/yolox_tiny_8xb8-300e_coco.py",
    "detr": "detr/detr_r50_8xb2-150e_coco.py",
    "deformable_detr": "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "dino": "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "grounding": "mm_grounding_dino/grounding_dino_swin-t_finetune_8xb4_20e_cat.py",
    "faster_rcnn": "_base_/models/faster-rcnn_r50_fpn.py",
    "faster_rcnn_agnostic": "_base_/models/faster-rcnn_r50_fpn.py",
    "cascade_rcnn": "_base_/models/cascade-rcnn_r50_fpn.py",
}
TWO_STAGE = ("faster_rcnn", "faster_rcnn_agnostic", "cascade_rcnn")
DETR_LIKE = ("detr", "deformable_detr", "dino", "grounding")
REFUSED = {
    "paa": "paa/paa_r50_fpn_1x_coco.py",
    "free_anchor": "free_anchor/freeanchor_r50_fpn_1x_coco.py",
    "tood": "tood/tood_r50_fpn_1x_coco.py",
}
PROMPTS = ("crab", "small red crab", "boats")
WORDS = ((1,), (3, 4, 5), (7, 8))  # places of their tokens in "[CLS] crab . small red crab . boat ##s . [SEP]"
TOKENS = 11
VOCABULARY = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n.\n?\ncrab\nsmall\nred\ngreen\nblue\nsquare\ndisc\nbar\nboat\n##s\n"
BERT = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
BACKBONE: dict[str, Any] = {
    "type": "ResNet",
    "depth": 18,
    "base_channels": 8,
    "stem_channels": 8,
    "num_stages": 4,
    "out_indices": (0, 1, 2, 3),
    "style": "pytorch",
}


def build(name: str, seed: int = 0) -> Any:
    """A detector of the family with random weights, in training mode."""
    model = ssd() if name == "ssd" else shrunk(name)
    torch.manual_seed(seed)
    with isolated("test-family"):
        built = build_model(Config({"model": model}))
        built.init_weights()
    return built.train()


def shrunk(name: str) -> dict[str, Any]:
    config = Config.fromfile(CONFIGS / {**FILES, **REFUSED}[name])
    model: dict[str, Any] = config.model.to_dict()
    strip_pretrained(model)
    unfreeze(model)
    if name == "grounding":
        return shrink_grounding(model)
    set_class_count(model, CLASSES)
    if name == "rtmdet":
        return shrink_rtmdet(model)
    if name == "yolox":
        return shrink_yolox(model)
    if name in DETR_LIKE:
        return shrink_detr(model)
    model["backbone"] = dict(BACKBONE)
    model["neck"].update(in_channels=WIDTHS, out_channels=32)
    if name in TWO_STAGE:
        shrink_two_stage(model, agnostic=name != "faster_rcnn")
        return model
    head = model["bbox_head"]
    head.update(in_channels=32, feat_channels=32, stacked_convs=1)
    if "fcos" in name:
        head.update(norm_cfg=None, norm_on_bbox=name == "fcos_normed")
        head["regress_ranges"] = ((-1, 16), (16, 32), (32, 64), (64, 128), (128, 1e8))
    if name in ("atss", "gfl", "ddod", "paa", "tood"):
        head["norm_cfg"] = {"type": "GN", "num_groups": 8, "requires_grad": True}
    if name == "ddod":
        head["use_dcn"] = False
    if name == "tood":
        head["num_dcn"] = 0
    if name == "retinanet_decoded":
        head.update(reg_decoded_bbox=True, loss_bbox={"type": "GIoULoss", "loss_weight": 1.0})
    if "octave_base_scale" in head.get("anchor_generator", {}):
        head["anchor_generator"]["octave_base_scale"] = 4
    return model


def shrink_rtmdet(model: dict[str, Any]) -> dict[str, Any]:
    for part in ("backbone", "neck", "bbox_head"):
        model[part]["norm_cfg"] = {"type": "BN"}
    model["data_preprocessor"].pop("batch_augments", None)
    model["data_preprocessor"].update(pad_size_divisor=32)
    model["backbone"].update(deepen_factor=0.167, widen_factor=0.125)
    model["neck"].update(in_channels=[32, 64, 128], out_channels=32, num_csp_blocks=1)
    model["bbox_head"].update(in_channels=32, feat_channels=32)
    return model


def shrink_yolox(model: dict[str, Any]) -> dict[str, Any]:
    model["data_preprocessor"].pop("batch_augments", None)  # it asks a Runner for the step
    model["backbone"].update(deepen_factor=0.167, widen_factor=0.125)
    model["neck"].update(in_channels=[32, 64, 128], out_channels=32)
    model["bbox_head"].update(in_channels=32, feat_channels=32, stacked_convs=1)
    return model


def shrink_detr(model: dict[str, Any], width: int = 32) -> dict[str, Any]:
    """Two encoder and three decoder layers, 30 queries."""

    def narrow(node: Any) -> None:
        if isinstance(node, dict):
            for key, value in {"embed_dims": width, "feedforward_channels": 48, "num_feats": width // 2}.items():
                if key in node:
                    node[key] = value
            for key in ("dropout", "ffn_drop"):
                if key in node:
                    node[key] = 0.0
            for value in node.values():
                narrow(value)

    wide = len(model["backbone"]["out_indices"])
    model["backbone"] = {**BACKBONE, "out_indices": (1, 2, 3)[-wide:]}
    model["neck"].update(in_channels=WIDTHS[-wide:], out_channels=width)
    model["num_queries"] = 30
    model["bbox_head"]["embed_dims"] = width
    for part in ("encoder", "decoder", "positional_encoding", "bbox_head"):
        narrow(model[part])
    model["encoder"]["num_layers"], model["decoder"]["num_layers"] = 2, 3
    if "dn_cfg" in model:
        model["dn_cfg"]["group_cfg"]["num_dn_queries"] = 10
    model["test_cfg"] = {"max_per_img": 25}
    return model


def shrink_grounding(model: dict[str, Any], vocabulary: str = VOCABULARY) -> dict[str, Any]:
    """As DINO, and a text encoder of two layers with a vocabulary of a few words."""
    pytest.importorskip("transformers", reason="transformers is not installed (requirements-grounding.txt)")
    shrink_detr(model, 256)  # mmdetection's encoding of places in a text has so many channels
    model["encoder"]["num_cp"] = 0
    model["encoder"]["fusion_layer_cfg"]["embed_dim"] = 32
    model["bbox_head"]["num_classes"] = 256
    model["language_model"]["bert"] = {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    set_prompts(model, [], Prompts(PROMPTS, vocabulary))
    return model


def shrink_two_stage(model: dict[str, Any], agnostic: bool) -> None:
    model["rpn_head"].update(in_channels=32, feat_channels=32)
    model["rpn_head"]["anchor_generator"]["scales"] = [4]
    roi = model["roi_head"]
    heads = roi["bbox_head"] if isinstance(roi["bbox_head"], list) else [roi["bbox_head"]]
    for head in heads:
        head.update(in_channels=32, fc_out_channels=16, reg_class_agnostic=agnostic)
    roi["bbox_roi_extractor"]["out_channels"] = 32
    roi["bbox_roi_extractor"]["finest_scale"] = 6
    model["train_cfg"]["rpn_proposal"]["max_per_img"] = 60
    model["test_cfg"]["rpn"]["max_per_img"] = 60


def ssd() -> dict[str, Any]:
    """SSD's head on maps of different widths, without a pyramid."""
    return {
        "type": "SingleStageDetector",
        "data_preprocessor": {"type": "DetDataPreprocessor", "pad_size_divisor": 32},
        "backbone": {**BACKBONE, "out_indices": (1, 2, 3)},
        "bbox_head": {
            "type": "SSDHead",
            "in_channels": (16, 32, 64),
            "num_classes": CLASSES,
            "anchor_generator": {
                "type": "SSDAnchorGenerator",
                "scale_major": False,
                "strides": [8, 16, 32],
                "ratios": [[2], [2, 3], [2]],
                "min_sizes": [16, 32, 64],
                "max_sizes": [32, 64, 96],
            },
            "bbox_coder": {
                "type": "DeltaXYWHBBoxCoder",
                "target_means": [0.0, 0.0, 0.0, 0.0],
                "target_stds": [0.1, 0.1, 0.2, 0.2],
            },
        },
        "train_cfg": {
            "assigner": {
                "type": "MaxIoUAssigner",
                "pos_iou_thr": 0.5,
                "neg_iou_thr": 0.5,
                "min_pos_iou": 0.0,
                "ignore_iof_thr": -1,
                "gt_max_assign_all": False,
            },
            "sampler": {"type": "PseudoSampler"},
            "smoothl1_beta": 1.0,
            "allowed_border": -1,
            "pos_weight": -1,
            "neg_pos_ratio": 3,
            "debug": False,
        },
        "test_cfg": {
            "nms_pre": 1000,
            "nms": {"type": "nms", "iou_threshold": 0.45},
            "min_bbox_size": 0,
            "score_thr": 0.02,
            "max_per_img": 100,
        },
    }


def batch(images: int = 3, seed: int = 0) -> dict[str, Any]:
    """Random images of two sizes with boxes of many sizes; the last image has none."""
    rng = np.random.default_rng(seed)
    inputs, samples = [], []
    for number in range(images):
        height, width = SIZE if number % 2 == 0 else (80, 112)
        count = 0 if number == images - 1 else 4
        low = rng.uniform(0, 0.6, (count, 2)) * (width, height)
        extent = rng.uniform(0.12, 0.6, (count, 2)) * (width, height)
        boxes = np.concatenate([low, np.minimum(low + extent, (width, height))], 1).astype(np.float32)
        sample = DetDataSample(
            metainfo={
                "img_id": number,
                "img_shape": (height, width),
                "ori_shape": (height * 2, width * 2),
                "scale_factor": (0.5, 0.5),
                "text": PROMPTS,  # for the one that reads them
                "custom_entities": True,
            }
        )
        sample.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.from_numpy(boxes).reshape(-1, 4)),
            labels=torch.from_numpy(rng.integers(0, CLASSES, count)),
        )
        inputs.append(torch.from_numpy(rng.integers(0, 255, (3, height, width)).astype(np.uint8)))
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}
