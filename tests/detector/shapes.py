"""Tiny labelled images of coloured shapes, drawn for the tests of the detectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("red square", "green disc", "blue bar")
_COLOURS = ((220, 40, 40), (40, 180, 60), (50, 80, 220))


def draw(
    rng: np.random.Generator, size: tuple[int, int], objects: int
) -> tuple[Image.Image, list[tuple[int, list[int]]]]:
    """One picture and its (class index, [x, y, width, height]) list."""
    width, height = size
    background = rng.integers(90, 160, (height, width, 3)).astype(np.uint8)
    image = Image.fromarray(background)
    pen = ImageDraw.Draw(image)
    boxes: list[tuple[int, list[int]]] = []
    for _ in range(objects):
        kind = int(rng.integers(0, 3))
        side = int(rng.integers(24, 44))
        wide, high = (side, side // 2) if kind == 2 else (side, side)
        x, y = int(rng.integers(0, width - wide)), int(rng.integers(0, height - high))
        if any(abs(x - b[0]) < 34 and abs(y - b[1]) < 34 for _, b in boxes):
            continue
        shape = pen.ellipse if kind == 1 else pen.rectangle
        shape((x, y, x + wide - 1, y + high - 1), fill=_COLOURS[kind])
        boxes.append((kind, [x, y, wide, high]))
    return image, boxes


def write_set(
    folder: Path,
    images: int,
    seed: int = 0,
    size: tuple[int, int] = (96, 96),
    first_id: int = 1,
    classes: tuple[str, ...] = CLASSES,
    empty_every: int = 0,
) -> Path:
    """Write images and a COCO file; every ``empty_every``-th image is a true negative."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, list[dict[str, object]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(classes)],
    }
    for number in range(images):
        image_id = first_id + number
        objects = 0 if empty_every and number % empty_every == 0 else int(rng.integers(1, 4))
        image, boxes = draw(rng, size, objects)
        path = folder / f"{image_id}.png"
        image.save(path)
        content["images"].append({"id": image_id, "file_name": str(path), "width": size[0], "height": size[1]})
        for kind, box in boxes:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": kind + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    target = folder / "coco.json"
    target.write_text(json.dumps(content))
    return target
