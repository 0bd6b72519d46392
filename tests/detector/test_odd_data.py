"""Odd pictures, boxes and classes through the recipe for photographs: training, evaluation and a look at a pool."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppal_backend.detector.infer.evaluation import evaluate
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.train.training import TrainRequest, train
from ppal_backend.detector.zoo import default_zoo_root

Box = tuple[int, tuple[float, float, float, float]]  # class index, and x, y, width, height in pixels


def picture(path: Path, kind: str, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(size[0])
    shape = (size[1], size[0], 3) if kind == "colour" else (size[1], size[0])
    values = rng.integers(0, 65_535, shape, np.uint16) if kind == "16 bit" else rng.integers(0, 255, shape, np.uint8)
    Image.fromarray(values).save(path)


def write(folder: Path, pictures: list[tuple[str, tuple[int, int], list[Box]]], classes: tuple[str, ...]) -> Path:
    images, rows = [], []
    for number, (kind, size, boxes) in enumerate(pictures, start=1):
        path = folder / f"{number}.png"
        picture(path, kind, size)
        images.append({"id": number, "file_name": str(path), "width": size[0], "height": size[1]})
        for index, box in boxes:
            row = {"id": len(rows) + 1, "image_id": number, "category_id": index + 1, "bbox": list(box)}
            rows.append({**row, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    (folder / "set.json").write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
    return folder / "set.json"


def classes_named(count: int) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(count))


CASES = {
    "grayscale and 16-bit pictures": (
        3,
        [("grey", (120, 90), [(0, (10, 10, 40, 40))]), ("16 bit", (90, 120), [(1, (10, 10, 40, 40))]),
         ("colour", (100, 100), [(2, (10, 10, 40, 40))])],
    ),
    "pictures of 50 px and of 3,000 px": (
        2, [("colour", (50, 50), [(0, (5, 5, 30, 30))]), ("colour", (3000, 40), [(1, (100, 2, 400, 30))])],
    ),
    "boxes of 2 px": (2, [("colour", (640, 480), [(0, (100, 100, 2, 2)), (1, (300, 50, 2, 3))])] * 2),
    "one class": (1, [("colour", (120, 90), [(0, (10, 10, 40, 40))])] * 2),
    "a hundred classes, most of them absent": (100, [("colour", (120, 90), [(99, (10, 10, 40, 40))])] * 2),
    "mostly images without a box": (
        2, [("colour", (120, 90), [(1, (10, 10, 40, 40))]), *[("colour", (90, 90), [])] * 5],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_nothing_odd_stops_a_training_or_a_look_at_the_pool(case: str, tmp_path: Path) -> None:
    count, pictures = CASES[case]
    classes = classes_named(count)
    zoo = tmp_path / "zoo"
    shutil.copytree(default_zoo_root(), zoo)
    table = (zoo / "zoo.toml").read_text()
    (zoo / "zoo.toml").write_text(table.replace("batch_size = 8\nlr = 0.002\n", "batch_size = 2\nlr = 0.002\n"))
    annotations = write(tmp_path, pictures, classes)
    work = tmp_path / "work"
    request = TrainRequest("yolox_nano", classes, annotations, None, work, 3, "cpu", "random", 5, zoo_root=zoo)
    result = train(request)  # five steps: four of mosaics, one of single images
    assert result.iterations == 5 and np.isfinite(result.final_loss)
    assert result.difficulty is not None and len(result.difficulty) == count
    assert all(0 <= value <= 1 for value in result.difficulty)
    metrics = evaluate("yolox_nano", result.checkpoint, classes, annotations, "cpu", zoo_root=zoo)
    assert metrics.images == len(pictures) and metrics.map is not None and 0 <= metrics.map <= 1
    engine = PoolInference("yolox_nano", result.checkpoint, classes, "cpu", zoo)
    pool = [PoolImage(number, tmp_path / f"{number}.png") for number in range(1, len(pictures) + 1)]
    found = {detections.image_id: detections for detections in engine.run(pool)}
    assert sorted(found) == list(range(1, len(pictures) + 1))
    for number, (_, (width, height), _) in enumerate(pictures, start=1):
        boxes = np.asarray(found[number].boxes_xyxy)
        assert np.isfinite(boxes).all() and np.asarray(found[number].class_indices).max(initial=0) < count
        assert found[number].image_size in (None, (width, height), (height, width))
