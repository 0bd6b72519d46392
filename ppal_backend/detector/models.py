"""Building detectors and putting trained weights into them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmcv.transforms import Compose
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.layers.transformer import dino_layers
from mmdet.models.layers.transformer.utils import MLP
from mmdet.registry import MODELS
from mmengine.config import Config

from ppal_backend.detector.config import FAULTS, build_config
from ppal_backend.detector.data import build_pipeline
from ppal_backend.detector.infer.relabelling import Relabelling
from ppal_backend.detector.open_vocabulary import ENCODER, Prompts, is_open
from ppal_backend.detector.rivals import find_rival
from ppal_backend.detector.weights import FinalCheckpoint, complete_weights, load_final
from ppal_backend.detector.zoo import ZooEntry, find_entry
from ppal_backend.errors import DetectorError

_OTHER_WEIGHTS = (
    "choose the checkpoint of this detector and all its classes in order (--classes of ppal rank and export-model), or "
    "train it again"
)


class HalfPrecisionOverflow(Exception):
    """A head's results are nan in half precision; the batch has to be looked at in full precision."""


@functools.cache
def _dino_as_published() -> None:
    """Give DINO's decoder the encoding of boxes that its published weights learned with, once a process.

    mmdetection encodes a box by two channels for each of the decoder's. onedl-mmdetection 3.5.1 makes them four: DINO's
    published weights lack half of the layer that reads them, which would stay random, and Grounding DINO does not run.
    """
    decoder = dino_layers.DinoTransformerDecoder
    encode, prepare = dino_layers.coordinate_to_encoding, decoder._init_layers

    def init_layers(self: Any) -> None:
        prepare(self)
        self.ref_point_head = MLP(self.embed_dims * 2, self.embed_dims, self.embed_dims, 2)

    decoder._init_layers = init_layers
    dino_layers.coordinate_to_encoding = lambda boxes, num_feats=256: encode(boxes, num_feats // 2)


@dataclass(frozen=True)
class LoadedDetector:
    """A trained detector in evaluation mode, with its zoo entry and its checkpoint's facts."""

    model: Any
    entry: ZooEntry
    config: Config
    checkpoint: FinalCheckpoint
    device: torch.device
    pipeline: Compose
    relabelling: Relabelling | None = None  # of published weights that predict a project's labels

    @property
    def rival(self) -> str | None:
        """Name of the method that changed it (see :mod:`~ppal_backend.detector.rivals`); None for none."""
        return self.checkpoint.meta.get("rival")

    @property
    def tile(self) -> int | None:
        """Side in pixels of the tiles that its training learned from, and that it looks through; None for no tiles."""
        tile = self.checkpoint.meta.get("slices")
        return None if tile is None else int(tile)

    @property
    def most_detections(self) -> int | None:
        """Detections of an image that its configuration allows; None for any number."""
        limits = self.config.model.get("test_cfg") or {}
        limits = limits.get("rcnn") or limits
        most = limits.get("max_per_img") or (limits.get("nms") or {}).get("max_num")
        return int(most) if most and most > 0 else None


def build_model(config: Config, rival: str | None = None) -> Any:
    """Build the detector of a configuration; call it inside :func:`runtime.isolated`.

    Args:
        config: The configuration; a rival changes it.
        rival: Name of the method that changes the detector, in simulations; None for none.

    Raises:
        DetectorError: mmdetection rejects the configuration, or the rival does not fit the detector.
    """
    _dino_as_published()
    if is_open(config.model) and config.model.language_model.type != ENCODER:
        raise DetectorError(
            "expected the vocabulary of a text encoder, got none; give the detector's zoo entry a table 'vocabulary'"
        )
    changes = None if rival is None else find_rival(rival)
    if changes is not None:
        changes.change(config.model)
    try:
        model = MODELS.build(deepcopy(config.model))  # heads write into what they are built of
    except (OSError, *FAULTS) as error:
        raise DetectorError(f"mmdetection cannot build this detector: {error}") from error
    if not config.get("trained_backbone", True):
        for module in model.modules():
            if getattr(module, "norm_eval", False):  # as many backbones have it where their config says nothing
                module.norm_eval = False
    head = getattr(model, "bbox_head", None)
    if isinstance(head, BaseDenseHead) and not hasattr(head, "loss_cls"):
        head.loss_cls = None  # SSD's head has none, yet mmdet's prediction looks at it
    if changes is not None:
        changes.attach(model)
    for module in model.modules():
        if hasattr(module, "predict_by_feat"):
            module.register_forward_hook(_results_in_full)
    return model


def load_detector(
    detector: str, checkpoint: Path, classes: Sequence[str], device: torch.device, zoo_root: Path | None = None
) -> LoadedDetector:
    """Rebuild a trained detector; call it inside :func:`runtime.isolated`.

    Raises:
        UnknownDetector: The zoo has no such detector.
        CheckpointError: The checkpoint is damaged or belongs to another detector or other classes.
        DetectorError: The detector cannot be built.
    """
    entry = find_entry(detector, zoo_root)
    final = load_final(checkpoint, detector, classes)
    rows = final.meta.get("weights_classes")
    config = build_config(entry, classes if rows is None else rows, prompts=Prompts.from_meta(final.meta))
    model = build_model(config, final.meta.get("rival"))
    relabelling = None if rows is None else Relabelling.of(rows, classes, final.meta["known"])
    what = f"{detector} with {len(config.classes)} classes"
    file = Path(final.meta.get("origin", checkpoint))  # what a person named, where this is a copy
    model.load_state_dict(complete_weights(model, final.state_dict, what, file, _OTHER_WEIGHTS))
    pipeline = build_pipeline(config.test_pipeline)
    return LoadedDetector(model.to(device).eval(), entry, config, final, device, pipeline, relabelling)


def _results_in_full(head: torch.nn.Module, _args: Any, found: Any) -> Any:
    """Forward hook of every head: what it computes in half precision goes on in full, to losses and suppression.

    Coordinates of hundreds of pixels have steps of two in bfloat16, mmcv's focal loss ends in nan in float16 and knows
    no bfloat16, and its suppression takes a box and its score in one precision only.
    """
    if not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
        return found
    full: list[torch.Tensor] = []
    converted = _in_full(found, full)
    # What went through numbers beyond half precision ends as nan. Infinite ones mean nothing: Grounding DINO's logits
    # of words that are not there are, and FCOS' exponentials may be.
    if full and not head.training and bool(torch.stack([torch.isnan(item).any() for item in full]).any()):
        raise HalfPrecisionOverflow
    return converted


def _in_full(value: Any, found: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            value = value.float()
            found.append(value)
        return value
    return type(value)(_in_full(item, found) for item in value) if type(value) in (list, tuple) else value
