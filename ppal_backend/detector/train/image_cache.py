"""Photos are decoded once a training and not at every step: what the pipeline resizes them to is kept on disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS

from ppal_backend.detector.data import ImageRecord
from ppal_backend.detector.recipe import COMBINE, type_name
from ppal_backend.files import atomic_file

FOLDER = "images"
_FEWEST_PIXELS = 100_000  # a millisecond of decoding
_LEAST_SHARE = 0.5  # of the pixels that the pipeline makes of them
_MOST_BYTES = 4 * 2**30
_LEAVE_FREE = 2 * 2**30


def with_image_cache(
    steps: Sequence[dict[str, Any]], records: Sequence[ImageRecord], folder: Path
) -> list[dict[str, Any]]:
    """A training pipeline whose readers keep resized copies of photos, where that changes nothing else.

    That is so when the first thing done to an image is a resize to a fixed scale: the copy is what this resize
    makes, so that every later step sees the same pixels and boxes, to the bit. Other pipelines (random scales and
    crops, several branches) need the photo itself and are returned as they are, and so is one for small images.
    The images that a step combines with the one at hand are read in the same way.

    Where tiles are cut out of images first, decoded photos are kept as they are, and of one only the tile is read.

    Args:
        steps: Steps of the pipeline.
        records: Images of the training.
        folder: Where copies go, as long as there is room: at most 4 GiB, and never the last 2 GiB of the disk.
    """
    plain = [_with_cached_source(dict(step), records, folder) for step in steps]
    kinds = [type_name(step) for step in plain[:3]]
    if kinds == ["LoadImageFromFile", "LoadAnnotations", "RandomSlice"]:
        return [{**plain[0], "type": "LoadDecodedImage", "folder": str(folder)}, *plain[1:]]
    if kinds != ["LoadImageFromFile", "LoadAnnotations", "Resize"]:
        return plain
    scale = plain[2].get("scale")
    if set(plain[2]) != {"type", "scale", "keep_ratio"} or not plain[2]["keep_ratio"]:
        return plain
    if not isinstance(scale, list | tuple):
        return plain
    if not any(_is_worth_caching(record.width, record.height, scale) for record in records):
        return plain
    reader = {**plain[0], "type": "LoadResizedImage", "scale": tuple(scale), "folder": str(folder)}
    return [reader, *plain[1:]]


def _with_cached_source(step: dict[str, Any], records: Sequence[ImageRecord], folder: Path) -> dict[str, Any]:
    if step["type"] == COMBINE:
        step["source"] = with_image_cache(step["source"], records, folder)
    return step


def _is_worth_caching(width: int, height: int, scale: Sequence[int]) -> bool:
    """Whether decoding takes longer than reading the copy, which is not compressed."""
    return width * height >= max(_FEWEST_PIXELS, _LEAST_SHARE * scale[0] * scale[1])


@TRANSFORMS.register_module()
class LoadResizedImage(LoadImageFromFile):
    """Reads an image, or the copy of it that an earlier call has resized; boxes are scaled along with it.

    Args:
        scale: Scale of the ``Resize`` that follows.
        folder: Where copies lie.
        options: Options of mmcv's own reader.
    """

    def __init__(self, scale: tuple[int, int], folder: str, **options: Any) -> None:
        super().__init__(**options)
        self._scale, self._folder = scale, Path(folder)

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Read one image."""
        width, height = results["width"], results["height"]
        if not _is_worth_caching(width, height, self._scale):
            return super().transform(results)
        copy = _copy_of(results, self._folder, ".bmp")
        if copy.is_file():
            read = super().transform({**results, "img_path": str(copy)})
            if read is not None:
                read["img_path"] = results["img_path"]
                read["instances"] = _scaled(results["instances"], read["img_shape"], (height, width))
            return read
        read = super().transform(results)
        if read is not None and read["img_shape"] == (height, width):
            image = mmcv.imrescale(read["img"], self._scale)
            if _has_room(self._folder, image.nbytes):
                with atomic_file(copy) as file:
                    file.write(cv2.imencode(".bmp", image)[1].tobytes())  # lossless, and read in no time
        return read


@TRANSFORMS.register_module()
class LoadDecodedImage(LoadImageFromFile):
    """Reads an image, or maps into memory the pixels that an earlier call has decoded.

    What is mapped cannot be written to, and is read where it is looked at: ``RandomSlice`` copies a tile of it.

    Args:
        folder: Where decoded images lie.
        options: Options of mmcv's own reader.
    """

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(**options)
        self._folder = Path(folder)

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Read one image."""
        if results["width"] * results["height"] < _FEWEST_PIXELS:
            return super().transform(results)
        copy = _copy_of(results, self._folder, ".npy")
        if copy.is_file():
            image = np.load(copy, mmap_mode="r")
            return {**results, "img": image, "img_shape": image.shape[:2], "ori_shape": image.shape[:2]}
        read = super().transform(results)
        if read is not None and _has_room(self._folder, read["img"].nbytes):
            with atomic_file(copy) as file:
                np.save(file, read["img"])
        return read


def _copy_of(results: dict[str, Any], folder: Path, suffix: str) -> Path:
    return folder / f"{hashlib.sha256(str(results['img_path']).encode()).hexdigest()}{suffix}"


def _has_room(folder: Path, size: int) -> bool:
    """Whether another copy of about this size in bytes may be kept."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = sum(1 for _ in folder.iterdir())
    return (kept + 1) * size <= _MOST_BYTES and shutil.disk_usage(folder).free >= _LEAVE_FREE


def _scaled(
    instances: Sequence[dict[str, Any]], shape: tuple[int, int], original: tuple[int, int]
) -> list[dict[str, Any]]:
    """Boxes on the copy, in the same single precision in which mmdetection's ``Resize`` scales them."""
    ratios = np.asarray([shape[1] / original[1], shape[0] / original[0]] * 2, np.float32)
    return [{**item, "bbox": (np.asarray(item["bbox"], np.float32) * ratios).tolist()} for item in instances]
