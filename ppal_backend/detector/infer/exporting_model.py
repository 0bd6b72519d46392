"""A trained detector as a file that runs without mmdetection: ONNX, or TorchScript.

The exported graph goes from one normalised image of a fixed size to every box the detector considers, with its score
for every class: ``boxes`` ``[1, n, 4]`` as x1, y1, x2, y2 in pixels of that image, and ``scores`` ``[1, n, C]`` in
[0, 1]. Threshold, suppression and clipping to the image are left to whoever runs it; ``FILE.json`` beside the file
says how the detector itself does them, and how an image is prepared.
"""

from __future__ import annotations

import importlib.util
import tempfile
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from ppal_backend.detector.heads.base import provider
from ppal_backend.detector.heads.dense import selects_by_level
from ppal_backend.detector.heads.yolox import YOLOXFamily
from ppal_backend.detector.infer.prediction import pseudo_collate
from ppal_backend.detector.models import LoadedDetector, load_detector
from ppal_backend.detector.runtime import isolated, quiet_stdout
from ppal_backend.detector.zoo import load_zoo
from ppal_backend.errors import DetectorError, SettingsError, UnsupportedHead
from ppal_backend.files import write_json

Format = Literal["onnx", "torchscript"]
FAMILIES = frozenset({"anchor", "ssd", "fcos", "atss", "gfl", "ddod", "rtmdet", "yolox"})
"""Head families of the zoo that can be exported."""

BOX_TOLERANCE_PX = 0.05
SCORE_TOLERANCE = 1e-3
_OPSET = 17
_ROUNDING = 0.05  # two scale factors that differ by less are one, in whole pixels
_NAMES = ("boxes", "scores")


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its outputs are from the detector's own on a random image.

    Args:
        file: The exported model.
        description: The JSON file beside it.
        detector: Name in the zoo.
        input_shape: ``(1, 3, height, width)`` of the image it takes.
        boxes: Boxes it gives for every image.
        box_difference_px: Largest difference of a side of a box.
        score_difference: Largest difference of a score.
    """

    file: Path
    description: Path
    detector: str
    input_shape: tuple[int, int, int, int]
    boxes: int
    box_difference_px: float
    score_difference: float

    def as_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {**asdict(self), "file": str(self.file), "description": str(self.description)}


class DenseOutputs(nn.Module):
    """All boxes and scores of a detector with a dense head, before threshold and suppression.

    The places that boxes are predicted from depend on the size of the image only, so they are part of the module.

    Args:
        detector: In evaluation mode.
        image: ``[1, 3, h, w]``, an image of the size to come.

    Raises:
        UnsupportedHead: Its head predicts in another way.
    """

    def __init__(self, detector: nn.Module, image: torch.Tensor) -> None:
        super().__init__()
        self._yolox = YOLOXFamily().covers_inference(detector)
        if not self._yolox and not selects_by_level(detector):
            raise UnsupportedHead(
                f"expected a detector with a dense head, got {type(detector).__name__}, whose proposals or queries "
                "make no fixed graph"
            )
        self.detector = detector
        self._integral = provider(self._head, "_predict_by_feat_single") == "GFLHead"
        with torch.no_grad():
            maps = self._head(detector.extract_feat(image))  # type: ignore[operator]
        sizes = [tuple(level.shape[-2:]) for level in maps[0]]
        options = {"with_stride": True} if self._yolox else {}
        priors = self._head.prior_generator.grid_priors(sizes, image.dtype, image.device, **options)
        if self._integral:
            priors = [self._head.anchor_center(level) for level in priors]
        self.levels = [len(level) for level in priors]
        self.register_buffer("priors", torch.cat(list(priors)))

    @property
    def _head(self) -> Any:
        return self.detector.bbox_head

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``boxes`` ``[1, n, 4]`` and ``scores`` ``[1, n, C]`` of a normalised image."""
        maps = self._head(self.detector.extract_feat(image))  # type: ignore[operator]
        logits = _rows(maps[0], self._head.cls_out_channels)
        scores = logits.sigmoid() if self._head.use_sigmoid_cls else logits.softmax(-1)[:, :-1]
        if len(maps) > 2:
            scores = scores * _rows(maps[2], 1).sigmoid()
        if self._yolox:
            boxes = self._head._bbox_decode(self.priors, _rows(maps[1], 4)[None])[0]
        else:
            boxes = self._head.bbox_coder.decode(self.priors, self._regressed(maps[1]))
        return boxes[None], scores[None]

    def _regressed(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        if not self._integral:
            return _rows(maps, self._head.bbox_coder.encode_size)
        strides = self._head.prior_generator.strides
        return torch.cat(
            [
                self._head.integral(level[0].permute(1, 2, 0)) * stride[0]
                for level, stride in zip(maps, strides, strict=True)
            ]
        )


def export_model(
    detector: str,
    checkpoint: Path,
    classes: Sequence[str],
    out: Path,
    layout: Format = "onnx",
    zoo_root: Path | None = None,
) -> Exported:
    """Write a trained detector as ONNX or TorchScript, with a description, and check that it computes the same.

    Args:
        detector: Name in the zoo.
        checkpoint: Final checkpoint of a training.
        classes: Labels in the order of the class indices.
        out: File to write; the description is written to ``out`` with ``.json`` appended.
        layout: ``onnx`` or ``torchscript``.
        zoo_root: Folder of the zoo; None for the packaged one.

    Raises:
        SettingsError: The packages for ONNX are not installed.
        UnknownDetector: The zoo has no such detector.
        CheckpointError: The checkpoint is damaged or belongs to something else.
        UnsupportedHead: The detector is no dense one; the text names those that are.
        DetectorError: The exported model computes something else.
    """
    if layout not in get_args(Format):
        raise ValueError(f"expected a format of {get_args(Format)}, got {layout!r}")
    if layout == "onnx":
        _need_onnx()
    with isolated(f"ppal-{uuid.uuid4().hex}"):
        loaded = load_detector(detector, Path(checkpoint), classes, torch.device("cpu"), zoo_root)
        if loaded.relabelling is not None:
            raise DetectorError(
                f"expected a trained version, got one of {detector} as the zoo has it, whose classes are not the "
                "project's labels; annotate tasks and train it first, or export the published checkpoint itself"
            )
        image = _blank_input(loaded)
        try:
            outputs = DenseOutputs(loaded.model, image).eval().requires_grad_(False)
        except UnsupportedHead as error:
            able = ", ".join(n for n, entry in load_zoo(zoo_root).items() if entry.head_family in FAMILIES)
            raise UnsupportedHead(f"{detector} cannot be exported: {error}; of the zoo these can be: {able}") from None
        box_px, score = _write(outputs, image, out, layout)
        beside = out.with_name(out.name + ".json")
        write_json(beside, _description(loaded, outputs, image, layout, classes))
    _, _, height, width = image.shape
    return Exported(out, beside, detector, (1, 3, height, width), sum(outputs.levels), box_px, score)


def _write(outputs: DenseOutputs, blank: torch.Tensor, out: Path, layout: Format) -> tuple[float, float]:
    """Write the file if what it computes for a random image is what the detector does; by how much they differ."""
    image = torch.randn(blank.shape, generator=torch.Generator().manual_seed(0))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder, torch.no_grad(), quiet_stdout():
        part = Path(folder) / out.name
        run = (_to_onnx if layout == "onnx" else _to_torchscript)(outputs, blank, part)
        box_px, score = _differences(outputs(image), run(image))
        if not (box_px <= BOX_TOLERANCE_PX and score <= SCORE_TOLERANCE):
            raise DetectorError(
                f"expected {layout} to compute what the detector does, got boxes {box_px:.3g} px and scores "
                f"{score:.3g} apart; use the {'torchscript' if layout == 'onnx' else 'onnx'} format"
            )
        part.replace(out)
    return box_px, score


def _rows(maps: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    """``[n, columns]`` of all levels of the only image, place by place."""
    return torch.cat([level[0].permute(1, 2, 0).reshape(-1, columns) for level in maps])


def _blank_input(loaded: LoadedDetector) -> torch.Tensor:
    """The network input for an image of the size that the detector is made for: resized, normalised, padded."""
    item = _prepared(loaded, *loaded.entry.input_size)
    batch = loaded.model.data_preprocessor(pseudo_collate([item]), False)
    return batch["inputs"]


def _prepared(loaded: LoadedDetector, width: int, height: int) -> Any:
    """A black image of this size after the detector's pipeline."""
    steps = [step for step in loaded.pipeline.transforms if "LoadImage" not in type(step).__name__]
    item: Any = {"img": np.zeros((height, width, 3), np.uint8), "img_id": 0, "img_path": "",
                 "img_shape": (height, width), "ori_shape": (height, width)}  # fmt: skip
    for step in steps:
        item = step(item)
    return item


def _place(loaded: LoadedDetector) -> str:
    """What becomes of an image of other proportions than the input."""
    width, height = loaded.entry.input_size
    across, down = _prepared(loaded, 2 * width, height)["data_samples"].metainfo["scale_factor"]
    if abs(across - down) > _ROUNDING * down:
        return "stretched to the input, ratio not kept"
    return "ratio kept, in the top left corner, the rest is padding"


def _to_torchscript(model: nn.Module, image: torch.Tensor, path: Path) -> Callable[[torch.Tensor], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are fixed on purpose
        torch.jit.save(torch.jit.trace(model, image, check_trace=False), str(path))
        return torch.jit.load(str(path))


def _to_onnx(model: nn.Module, image: torch.Tensor, path: Path) -> Callable[[torch.Tensor], Any]:
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are fixed on purpose
        torch.onnx.export(model, (image,), str(path), input_names=["image"], output_names=list(_NAMES),
                          opset_version=_OPSET, dynamo=False)  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda picture: [torch.from_numpy(o) for o in session.run(list(_NAMES), {"image": picture.numpy()})]


def _need_onnx() -> None:
    if missing := [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise SettingsError(
            f"expected the packages onnx and onnxruntime, got no {' and no '.join(missing)}; install them with "
            "pip install 'ppal-backend[onnx]', or use the torchscript format"
        )


def _differences(wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> tuple[float, float]:
    if [w.shape for w in wanted] != [g.shape for g in got]:
        return float("inf"), float("inf")
    box, score = (float((w - g).abs().max()) for w, g in zip(wanted, got, strict=True))
    return box, score


def _description(
    loaded: LoadedDetector, outputs: DenseOutputs, image: torch.Tensor, layout: str, classes: Sequence[str]
) -> dict[str, Any]:
    prepare, settings = loaded.model.data_preprocessor, loaded.model.bbox_head.test_cfg
    normalises = getattr(prepare, "_enable_normalize", False)
    _, _, height, width = image.shape
    return {
        "format": layout,
        "detector": loaded.entry.name,
        "classes": list(classes),
        "input": {
            "name": "image",
            "shape": [1, 3, height, width],
            "resize_within": list(loaded.entry.input_size),
            "place": _place(loaded),
            "channels": "RGB" if getattr(prepare, "_channel_conversion", False) else "BGR",
            "mean": prepare.mean.flatten().tolist() if normalises else [0.0, 0.0, 0.0],
            "std": prepare.std.flatten().tolist() if normalises else [1.0, 1.0, 1.0],
            "padding": _padding(loaded),
        },
        "outputs": {
            "boxes": "[1, n, 4] x1, y1, x2, y2 in pixels of the input; clip them to the image",
            "scores": "[1, n, classes] in [0, 1]",
        },
        "levels": [
            {"stride": list(stride) if isinstance(stride, tuple) else [stride, stride], "boxes": count}
            for stride, count in zip(loaded.model.bbox_head.prior_generator.strides, outputs.levels, strict=True)
        ],
        "as_the_detector_does": {
            "score_threshold": settings.get("score_thr", 0.0),
            "best_class_only": provider(loaded.model.bbox_head, "predict_by_feat") == "YOLOXHead",
            "boxes_a_level": settings.get("nms_pre", -1),
            "suppression_iou": settings.get("nms", {}).get("iou_threshold"),
            "boxes_an_image": settings.get("max_per_img", -1),
            **({} if loaded.tile is None else {"tiles_px": loaded.tile}),
        },
    }


def _padding(loaded: LoadedDetector) -> dict[str, Any]:
    """What the rest of the input is filled with, and whether that value is normalised as the image is."""
    for step in loaded.pipeline.transforms:
        if type(step).__name__ == "Pad":
            return {"value": step.pad_val.get("img", 0), "before_normalisation": True}
    return {"value": float(getattr(loaded.model.data_preprocessor, "pad_value", 0)), "before_normalisation": False}
