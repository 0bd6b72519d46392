from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ppal_backend.detector.config import build_config, find_entry
from ppal_backend.detector.data import StreamSampler, TrainingData, build_pipeline, data_info, read_coco, run_pipeline
from ppal_backend.detector.runtime import isolated
from ppal_backend.errors import DatasetError, ImageError
from tests.detector.shapes import CLASSES


@pytest.fixture
def stream(zoo_root: Path, train_json: Path) -> TrainingData:
    with isolated("test-data"):
        pipeline = build_pipeline(build_config(find_entry("small", zoo_root), CLASSES).train_pipeline)
    return TrainingData(read_coco(train_json, CLASSES), pipeline, CLASSES, seed=5)


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_class_indices_follow_the_callers_order_not_the_files(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.json",
        {
            "images": [
                {"id": 9, "file_name": "/b", "width": 5, "height": 4},
                {"id": 2, "file_name": "/a", "width": 5, "height": 4},
            ],
            "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "gone"}],
            "annotations": [
                {"image_id": 9, "category_id": 1, "bbox": [1, 2, 3, 1]},
                {"image_id": 9, "category_id": 2, "bbox": [0, 0, 2, 2], "iscrowd": 1},
                {"image_id": 9, "category_id": 3, "bbox": [0, 0, 2, 2]},
                {"image_id": 9, "category_id": 2, "bbox": [0, 0, 0, 2]},
            ],
        },
    )
    empty, full = read_coco(path, ("cat", "dog"))
    assert (empty.image_id, empty.instances) == (2, ())
    assert [(item.class_index, item.box_xyxy, item.crowd) for item in full.instances] == [
        (1, (1.0, 2.0, 4.0, 3.0), False),
        (0, (0.0, 0.0, 2.0, 2.0), True),
    ]
    assert [item["ignore_flag"] for item in data_info(full)["instances"]] == [0, 1]


@pytest.mark.parametrize("content", ["{", "[]", {"images": []}, {"images": [{}], "categories": []}])
def test_a_broken_file_is_a_dataset_error_that_names_it(tmp_path: Path, content: Any) -> None:
    path = write(tmp_path / "broken.json", content)
    with pytest.raises(DatasetError, match=r"broken\.json"):
        read_coco(path, ("a",))
    with pytest.raises(DatasetError, match="got none"):
        read_coco(tmp_path / "absent.json", ("a",))


def test_every_pass_of_the_stream_holds_every_image_once_in_another_order(stream: TrainingData) -> None:
    passes = [[stream.record_at(p).image_id for p in range(12 * n, 12 * n + 12)] for n in range(3)]
    assert all(sorted(one) == list(range(1, 13)) for one in passes)
    assert passes[0] != passes[1]


def test_a_position_always_gives_the_same_sample_and_leaves_global_randomness_alone(stream: TrainingData) -> None:
    np.random.seed(1)
    random.seed(1)
    first = [stream[p] for p in range(24)]
    drawn = (np.random.rand(), random.random())
    np.random.seed(1)
    random.seed(1)
    assert drawn == (np.random.rand(), random.random())
    for position in (23, 0, 7):
        again = stream[position]
        assert torch.equal(again["inputs"], first[position]["inputs"])
        assert again["data_samples"].flip == first[position]["data_samples"].flip
    assert len({bool(item["data_samples"].flip) for item in first}) == 2


def test_images_without_objects_stay_in(stream: TrainingData) -> None:
    empty = [p for p in range(12) if not stream.record_at(p).instances]
    assert len(empty) == 2
    assert stream[empty[0]]["data_samples"].gt_instances.bboxes.shape == (0, 4)


def test_skipping_continues_the_stream(stream: TrainingData) -> None:
    def ids(sampler: StreamSampler, batches: int) -> list[list[int]]:
        loader = DataLoader(stream, batch_size=5, sampler=sampler, collate_fn=lambda items: items)
        return [
            [item["data_samples"].img_id for item in batch] for batch, _ in zip(loader, range(batches), strict=False)
        ]

    whole = ids(StreamSampler(12), 6)
    resumed = StreamSampler(12)
    resumed.skip(4 * 5)
    assert ids(resumed, 2) == whole[4:]


@pytest.mark.parametrize("content", [None, b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_an_unreadable_image_is_named(stream: TrainingData, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    info = {"img_path": str(path), "img_id": 77, "height": 1, "width": 1, "instances": []}
    with pytest.raises(ImageError, match="image 77 "):
        run_pipeline(stream._pipeline, info)
