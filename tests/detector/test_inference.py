from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate

from ppal_backend.detector.data import ImageRecord, data_info, run_pipeline
from ppal_backend.detector.embeddings import image_features, mean_over_image, sample_embeddings
from ppal_backend.detector.inference import PoolImage, PoolInference, PoolResult
from ppal_backend.detector.training import TrainResult
from ppal_backend.errors import CheckpointError, ImageError
from ppal_backend.structures.progress import Progress
from tests.detector.shapes import CLASSES, write_set


@pytest.fixture(scope="module")
def engine(trained: TrainResult, zoo_root: Path) -> PoolInference:
    return PoolInference("small", trained.checkpoint, CLASSES, "cpu", zoo_root)


@pytest.fixture(scope="module")
def images(test_json: Path) -> list[PoolImage]:
    return [PoolImage(item["id"], item["file_name"]) for item in json.loads(test_json.read_text())["images"]]


@pytest.fixture(scope="module")
def results(engine: PoolInference, images: list[PoolImage]) -> list[PoolResult]:
    return list(engine.run_with_features(images, batch_size=3))


def packed(engine: PoolInference, image: PoolImage) -> dict[str, Any]:
    record = ImageRecord(image.image_id, str(image.path), 0, 0, ())
    return run_pipeline(engine._loaded.pipeline, data_info(record))


def test_boxes_and_scores_are_mmdets_own(
    engine: PoolInference, images: list[PoolImage], results: list[PoolResult]
) -> None:
    plain = []
    with torch.no_grad():
        for start in range(0, 8, 3):
            batch = pseudo_collate([packed(engine, image) for image in images[start : start + 3]])
            plain += engine.model.test_step(batch)
    assert sum(len(sample.pred_instances.scores) for sample in plain) > 20
    for image, sample, result in zip(images, plain, results, strict=True):
        found = result.detections
        assert found.image_id == image.image_id
        np.testing.assert_allclose(found.boxes_xyxy, sample.pred_instances.bboxes, atol=1e-4)
        np.testing.assert_allclose(found.scores, sample.pred_instances.scores, atol=1e-6)
        np.testing.assert_array_equal(found.class_indices, sample.pred_instances.labels)


def test_boxes_are_in_pixels_of_the_image(results: list[PoolResult]) -> None:
    boxes = np.concatenate([result.detections.boxes_xyxy for result in results])
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 120 + 1e-3 and boxes[:, 3].max() <= 80 + 1e-3
    assert boxes[:, 2].max() > 70  # in the frame of the 64 px network input nothing lies so far right


def test_probabilities_are_the_heads_own_and_hold_the_score(results: list[PoolResult]) -> None:
    for result in results:
        found = result.detections
        assert found.class_probs is not None and found.class_probs.shape == (len(found), 3) and not found.softmax
        own = found.class_probs[np.arange(len(found)), found.class_indices]
        np.testing.assert_allclose(own, found.scores, atol=1e-6)


def test_embedding_is_the_neck_at_the_box_centre(
    engine: PoolInference, images: list[PoolImage], results: list[PoolResult]
) -> None:
    """A bilinear sample computed by hand from a separate pass over the neck."""
    strides = (8, 16, 32)
    checked = set()
    for image, result in zip(images, results, strict=True):
        data = engine.model.data_preprocessor(pseudo_collate([packed(engine, image)]))
        with torch.no_grad():
            levels = engine.model.extract_feat(data["inputs"])
        scale_x, scale_y = data["data_samples"][0].scale_factor
        found = result.detections
        assert found.levels is not None and found.embeddings.shape == (len(found), 16)
        for index in range(len(found)):
            level = int(found.levels[index])
            x1, y1, x2, y2 = found.boxes_xyxy[index]
            x, y = (x1 + x2) / 2 * scale_x / strides[level] - 0.5, (y1 + y2) / 2 * scale_y / strides[level] - 0.5
            expected = by_hand(levels[level][0].numpy(), x, y)
            np.testing.assert_allclose(found.embeddings[index], expected, atol=2e-4)
            checked.add(level)
    assert len(checked) >= 2


def by_hand(feature_map: np.ndarray, x: float, y: float) -> np.ndarray:
    value = np.zeros(len(feature_map))
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < feature_map.shape[1] and 0 <= column < feature_map.shape[2]:
                value += (1 - abs(y - row)) * (1 - abs(x - column)) * feature_map[:, row, column]
    return value


def test_the_size_of_batches_and_the_order_change_nothing(
    engine: PoolInference, images: list[PoolImage], results: list[PoolResult]
) -> None:
    shuffled = [images[i] for i in (5, 0, 7, 3, 1, 6, 2, 4)]
    by_id = {result.detections.image_id: result for result in engine.run_with_features(shuffled, batch_size=5)}
    for result in results:
        other = by_id[result.detections.image_id]
        np.testing.assert_allclose(other.detections.boxes_xyxy, result.detections.boxes_xyxy, atol=1e-3)
        np.testing.assert_allclose(other.detections.embeddings, result.detections.embeddings, atol=1e-4)
        for name in ("global", "fpn"):
            np.testing.assert_allclose(other.features[name], result.features[name], atol=1e-4)


def test_image_features_are_means_over_the_image(
    engine: PoolInference, images: list[PoolImage], results: list[PoolResult]
) -> None:
    data = engine.model.data_preprocessor(pseudo_collate([packed(engine, images[0])]))
    with torch.no_grad():
        backbone = engine.model.backbone(data["inputs"])
        neck = engine.model.neck(backbone)
    sample = data["data_samples"][0]
    assert (tuple(sample.img_shape), tuple(sample.batch_input_shape)) == ((43, 64), (64, 64))
    rows = {8: 6, 16: 3, 32: 2}  # cells of 64 / stride that 43 px reach into
    expected = np.concatenate(
        [level[0, :, : rows[stride]].mean((1, 2)) for level, stride in zip(neck, (8, 16, 32), strict=True)]
    )
    np.testing.assert_allclose(results[0].features["fpn"], expected, atol=1e-5)
    np.testing.assert_allclose(results[0].features["global"], backbone[-1][0, :, :2].mean((1, 2)), atol=1e-5)


def test_the_detector_is_left_as_it_was(engine: PoolInference, images: list[PoolImage]) -> None:
    model = engine.model
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    list(engine.run(images))
    stream = engine.run(images, batch_size=2)
    next(stream)
    stream.close()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_results_are_streamed(engine: PoolInference, images: list[PoolImage]) -> None:
    seen: list[Progress] = []
    stream = engine.run(images, batch_size=2, on_progress=seen.append)
    assert seen == []
    assert next(stream).image_id == images[0].image_id
    assert len(list(stream)) == 7
    assert [(item.step, item.done, item.total) for item in seen] == [("infer", n, 8) for n in (2, 4, 6, 8)]


def test_an_unreadable_image_is_an_error_or_left_out(
    engine: PoolInference, images: list[PoolImage], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 nothing")
    mixed = [images[0], PoolImage(555, broken), PoolImage(556, tmp_path / "gone.png"), images[1]]
    with pytest.raises(ImageError, match="image 555 "):
        list(engine.run(mixed, batch_size=4))
    reported: list[int] = []
    for size in (1, 2, 4):
        reported.clear()
        kept = list(engine.run(mixed, batch_size=size, on_error=lambda image_id, error: reported.append(image_id)))
        assert [item.image_id for item in kept] == [images[0].image_id, images[1].image_id]
        assert reported == [555, 556]


def test_an_empty_pool_and_an_empty_image(engine: PoolInference, tmp_path: Path) -> None:
    assert list(engine.run([])) == []
    assert list(engine.run_with_features([])) == []
    engine.model.test_cfg = engine.model.bbox_head.test_cfg
    threshold = engine.model.bbox_head.test_cfg.score_thr
    write_set(tmp_path, 1, empty_every=1)
    try:
        engine.model.bbox_head.test_cfg.score_thr = 0.999
        (only,) = engine.run([PoolImage(1, tmp_path / "1.png")])
    finally:
        engine.model.bbox_head.test_cfg.score_thr = threshold
    assert len(only) == 0 and only.embeddings.shape == (0, 16)


def test_batch_size_must_be_positive(engine: PoolInference, images: list[PoolImage]) -> None:
    with pytest.raises(ValueError, match="batch_size >= 1"):
        list(engine.run(images, batch_size=0))


def test_a_checkpoint_of_other_classes_is_refused(trained: TrainResult, zoo_root: Path) -> None:
    with pytest.raises(CheckpointError, match="order counts"):
        PoolInference("small", trained.checkpoint, ("a", "b", "c"), "cpu", zoo_root)


def test_embeddings_take_height_and_width_in_the_right_order() -> None:
    """A map whose value is its column (or row) number, on an input that is wider than high."""
    columns = torch.arange(8.0).expand(1, 4, 8)
    rows = torch.arange(4.0)[:, None].expand(1, 4, 8)
    box = torch.tensor([[40.0, 8.0, 48.0, 16.0]])  # centre (44, 12): cell (row 1, column 5) at stride 8
    level = torch.tensor([0])
    assert sample_embeddings([columns], box, level, (32, 64)).item() == pytest.approx(5.0)
    assert sample_embeddings([rows], box, level, (32, 64)).item() == pytest.approx(1.0)
    assert sample_embeddings([rows], box[:0], level[:0], (32, 64)).shape == (0, 1)


def test_padding_does_not_count_in_image_features() -> None:
    feature_map = torch.full((2, 4, 4), 9.0)
    feature_map[:, :2, :3] = 1.0
    assert mean_over_image(feature_map, (30, 48), (64, 64)).tolist() == [1.0, 1.0]
    described = image_features([feature_map], [feature_map, feature_map[:1]], (64, 64), (64, 64))
    assert described["fpn"].shape == (3,) and described["global"][0] == feature_map[0].mean()
