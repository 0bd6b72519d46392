from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from PIL import Image

from benchmarks.detector_loops import scaled_zoo
from ppal_backend.acquisition.ccms import similarity_matrix
from ppal_backend.acquisition.ccms.objects import resolve_metric
from ppal_backend.acquisition.strategies import get_strategy
from ppal_backend.detector.data import ImageRecord, data_info, run_pipeline
from ppal_backend.detector.heads import inference_family
from ppal_backend.detector.heads.base import override
from ppal_backend.detector.infer import prediction
from ppal_backend.detector.infer.embeddings import image_features, levels_of_size, mean_over_images, sample_embeddings
from ppal_backend.detector.infer.inference import PoolImage, PoolInference, PoolResult
from ppal_backend.detector.infer.prediction import mixed_precision, read_batches, workers_for
from ppal_backend.detector.train.training import TrainRequest, TrainResult, train
from ppal_backend.detector.weights import load_checkpoint, save_final
from ppal_backend.errors import CheckpointError, ImageError
from ppal_backend.structures import QueryContext
from ppal_backend.structures.round import Progress
from tests.detector.families import build
from tests.detector.shapes import CLASSES, write_set
from tests.reference import ccms as reference


@pytest.fixture(scope="module")
def engine(trained: TrainResult, zoo_root: Path) -> PoolInference:
    return PoolInference("small", trained.checkpoint, CLASSES, "cpu", zoo_root)


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
    assert {result.detections.image_size for result in results} == {(120, 80)}
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
    hooks = [len(module._forward_hooks) for module in model.modules()]
    list(engine.run(images))
    stream = engine.run(images, batch_size=2)
    next(stream)
    stream.close()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
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


def test_threads_that_read_ahead_change_nothing(
    engine: PoolInference, trained: TrainResult, zoo_root: Path, images: list[PoolImage], tmp_path: Path
) -> None:
    threaded = PoolInference("small", trained.checkpoint, CLASSES, "cpu", zoo_root, workers=3)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"nothing")
    mixed = [*images[:5], PoolImage(555, broken), *images[5:]]
    with pytest.raises(ImageError, match="image 555 "):
        list(threaded.run(mixed, batch_size=2))
    reported: list[int] = []
    seen: list[Progress] = []
    found = list(threaded.run_with_features(mixed, 2, seen.append, lambda image_id, error: reported.append(image_id)))
    assert reported == [555] and [item.done for item in seen] == [2, 4, 6, 8, 9]
    plain = list(engine.run_with_features(mixed, 2, on_error=lambda image_id, error: None))
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.detections.image_id == theirs.detections.image_id
        np.testing.assert_array_equal(ours.detections.boxes_xyxy, theirs.detections.boxes_xyxy)
        np.testing.assert_array_equal(ours.detections.embeddings, theirs.detections.embeddings)
        np.testing.assert_array_equal(ours.features["fpn"], theirs.features["fpn"])


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_stays_a_few_batches_ahead(workers: int) -> None:
    """However large the pool, three batches at most are in memory, and a stream that is closed reads no more."""
    started: list[int] = []

    def read(info: dict[str, Any]) -> dict[str, Any]:
        started.append(info["img_id"])
        return {"id": info["img_id"]}

    records = [ImageRecord(i, "", 0, 0, ()) for i in range(40)]
    stream = read_batches(SimpleNamespace(transforms=[read]), records, 4, workers)
    for number in range(3):
        batch = next(stream)
        assert [record.image_id for record, _ in batch] == [item["id"] for _, item in batch]
        assert [record.image_id for record, _ in batch] == list(range(4 * number, 4 * number + 4))
        assert len(started) <= 4 * (number + (3 if workers else 1))
    stream.close()
    assert len(started) <= 4 * (2 + (3 if workers else 1))
    rest = list(read_batches(SimpleNamespace(transforms=[read]), records[:10], 4, workers))
    assert [len(batch) for batch in rest] == [4, 4, 2]


def test_a_strip_of_which_nothing_is_left_at_the_input_size_is_reported_and_the_others_looked_at(
    engine: PoolInference, images: list[PoolImage], tmp_path: Path
) -> None:
    Image.new("RGB", (4000, 4)).save(tmp_path / "strip.png")
    told: dict[int, str] = {}
    pool = [images[0], PoolImage(77, tmp_path / "strip.png"), images[1]]
    found = list(engine.run(pool, batch_size=3, on_error=lambda image_id, error: told.update({image_id: str(error)})))
    assert [one.image_id for one in found] == [images[0].image_id, images[1].image_id]
    assert list(told) == [77] and "image 77 " in told[77] and "cannot be brought to the input size; crop it" in told[77]


def test_choices_of_workers_and_precision() -> None:
    """Half precision and threads that read ahead are for GPUs; a CPU is left as it is unless it is asked for."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (workers_for(cpu, None), workers_for(cpu, 3), workers_for(cuda, 0)) == (0, 3, 0)
    assert 1 <= workers_for(cuda, None) <= 4
    with pytest.raises(ValueError, match="workers >= 0"):
        workers_for(cpu, -1)
    with mixed_precision(cpu, True):
        assert not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")
    assert isinstance(mixed_precision(cuda, False), nullcontext)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks that there is no GPU here
        chosen = mixed_precision(cuda, True)
    assert isinstance(chosen, torch.autocast) and (chosen.device, chosen.fast_dtype) == ("cuda", torch.float16)


def test_detections_know_how_many_boxes_they_stand_for(
    trained: TrainResult, zoo_root: Path, images: list[PoolImage], results: list[PoolResult]
) -> None:
    counting = PoolInference("small", trained.checkpoint, CLASSES, "cpu", zoo_root, count=True)
    counted = list(counting.run(images, batch_size=3))
    for one, result in zip(counted, results, strict=True):
        assert one.pre_nms_counts is not None and len(one.pre_nms_counts) == len(one)
        assert result.detections.pre_nms_counts is None
        np.testing.assert_array_equal(one.boxes_xyxy, result.detections.boxes_xyxy)
    joined = np.concatenate([np.asarray(one.pre_nms_counts) for one in counted])
    assert joined.min() >= 1 and joined.max() > 1


def with_detector(
    engine: PoolInference, monkeypatch: pytest.MonkeyPatch, name: str, embedding: str = "query"
) -> PoolInference:
    """The same engine with a detector of another family in it."""
    model = build(name).eval()
    monkeypatch.setattr(engine, "_loaded", replace(engine._loaded, model=model))
    monkeypatch.setattr(engine, "_family", inference_family(model))
    monkeypatch.setattr(engine, "_embedding", embedding)
    return engine


def test_queries_describe_detections_or_the_maps_do(
    engine: PoolInference, images: list[PoolImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampled embedding is the mean over the neck's levels of torch's own sample at the centre of the box."""
    queries = list(with_detector(engine, monkeypatch, "deformable_detr").run(images[:3], batch_size=3))
    sampled = list(with_detector(engine, monkeypatch, "deformable_detr", "sampled").run(images[:3], batch_size=3))
    data = engine.model.data_preprocessor(pseudo_collate([packed(engine, image) for image in images[:3]]))
    with torch.no_grad():
        levels = engine.model.neck(engine.model.backbone(data["inputs"]))
    (scale_x, scale_y), (height, width) = data["data_samples"][0].scale_factor, data["inputs"].shape[2:]
    for by_query, by_map in zip(queries, sampled, strict=True):
        np.testing.assert_array_equal(by_query.boxes_xyxy, by_map.boxes_xyxy)
        assert by_query.levels is None and by_map.levels is None
        assert by_query.embeddings.shape == by_map.embeddings.shape == (25, 32)
    for index, (x1, y1, x2, y2) in enumerate(sampled[0].boxes_xyxy):
        point = torch.tensor([[[[(x1 + x2) * scale_x / width - 1, (y1 + y2) * scale_y / height - 1]]]])
        wanted = [torch.nn.functional.grid_sample(level[:1], point.float(), align_corners=False) for level in levels]
        np.testing.assert_allclose(sampled[0].embeddings[index], torch.cat(wanted).mean(0).flatten(), atol=1e-4)
    assert np.abs(queries[0].embeddings - sampled[0].embeddings).max() > 0.1


def test_an_unknown_embedding_is_refused(trained: TrainResult, zoo_root: Path) -> None:
    with pytest.raises(ValueError, match="'query', 'sampled'"):
        PoolInference("small", trained.checkpoint, CLASSES, "cpu", zoo_root, embedding="pooled")  # type: ignore[arg-type]


def test_a_detector_without_a_pyramid_is_compared_by_its_probabilities(
    train_json: Path, test_json: Path, images: list[PoolImage], tmp_path: Path
) -> None:
    """SSD from training to picks: no embeddings, so CCMS takes KL, and equals loops over the probabilities."""
    root = tmp_path / "zoo"
    scaled_zoo("ssd_tiny", root, 0.4)
    request = TrainRequest(
        "ssd_tiny", CLASSES, train_json, None, tmp_path / "run", device="cpu", init_weights="random",
        max_iterations=8, zoo_root=root,
    )  # fmt: skip
    trained = train(request)
    found = list(PoolInference("ssd_tiny", trained.checkpoint, CLASSES, "cpu", root).run(images))
    assert all(item.embeddings.shape == (len(item), 0) and item.softmax for item in found)
    assert resolve_metric(found, "auto") == "kl"
    wanted = reference.similarity(found, 0.05, "kl")
    np.testing.assert_allclose(similarity_matrix(found), wanted, atol=1e-4)
    assert np.ptp(wanted[np.triu_indices(len(found), 1)]) > 0.01
    context = QueryContext(found, len(CLASSES), difficulty=np.asarray(trained.difficulty))
    picks = get_strategy("ppal", delta=2.0).query(context, 3, np.random.default_rng(0)).image_ids
    assert len(set(picks)) == 3 and set(picks) <= {image.image_id for image in images}
    others = get_strategy("ppal", delta=2.0, metric="kl").query(context, 3, np.random.default_rng(0)).image_ids
    assert list(picks) == list(others)


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


@pytest.fixture
def foreign(trained: TrainResult, tmp_path: Path) -> Callable[[dict[str, torch.Tensor], tuple[str, ...]], Path]:
    """Makes a checkpoint from elsewhere: tensors and classes."""

    def make(tensors: dict[str, torch.Tensor], classes: tuple[str, ...]) -> Path:
        meta = {"detector": "small", "classes": list(classes), "difficulty": None}
        save_final(tmp_path / "foreign.pth", tensors, meta)
        return tmp_path / "foreign.pth"

    return make


def test_a_head_of_another_number_of_classes_is_told_shortly(
    trained: TrainResult, zoo_root: Path, foreign: Any
) -> None:
    """Somebody forgot a class, or the background: torch's own error is a page long."""
    path = foreign(load_checkpoint(trained.checkpoint)["state_dict"], ("a", "b"))
    with pytest.raises(
        CheckpointError, match=r"small with 2 classes.*2 of \d+ tensors missing or of another shape"
    ) as it:
        PoolInference("small", path, ("a", "b"), "cpu", zoo_root)
    assert "bbox_head.retina_cls.weight" in str(it.value) and "--classes" in str(it.value)
    assert len(str(it.value)) < 500 and "\n" not in str(it.value)


def test_weights_of_another_detector_are_told_shortly(zoo_root: Path, foreign: Any) -> None:
    with pytest.raises(CheckpointError, match="small with 3 classes") as it:
        PoolInference("small", foreign({"x": torch.ones(1)}, CLASSES), CLASSES, "cpu", zoo_root)
    assert len(str(it.value)) < 500 and "\n" not in str(it.value)


def test_what_a_checkpoint_holds_beside_the_detector_is_left_out_and_counted(
    trained: TrainResult, zoo_root: Path, images: list[PoolImage], foreign: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """mmdetection 2 kept averaged weights beside the others; other software leaves a mask head or a counter."""
    tensors = load_checkpoint(trained.checkpoint)["state_dict"]
    more = {f"ema_{name.replace('.', '_')}": value for name, value in list(tensors.items())[:5]}
    plain = list(PoolInference("small", trained.checkpoint, CLASSES, "cpu", zoo_root).run(images[:2]))
    path = foreign({**tensors, **more}, CLASSES)
    found = list(PoolInference("small", path, CLASSES, "cpu", zoo_root).run(images[:2]))
    assert sum(map(len, found)) > 0
    assert all(np.array_equal(a.scores, b.scores) for a, b in zip(plain, found, strict=True))
    assert "5 tensors" in caplog.text and "ema_backbone" in caplog.text


def test_embeddings_take_height_and_width_in_the_right_order() -> None:
    """A map whose value is its column (or row) number, on an input that is wider than high."""
    columns = torch.arange(8.0).expand(1, 1, 4, 8)
    rows = torch.arange(4.0)[:, None].expand(1, 1, 4, 8)
    box = torch.tensor([[40.0, 8.0, 48.0, 16.0]])  # centre (44, 12): cell (row 1, column 5) at stride 8
    first = torch.tensor([0])
    assert sample_embeddings([columns], first, box, first, (32, 64)).item() == pytest.approx(5.0)
    assert sample_embeddings([rows], first, box, first, (32, 64)).item() == pytest.approx(1.0)
    assert sample_embeddings([rows], first[:0], box[:0], first[:0], (32, 64)).shape == (0, 1)


def test_embeddings_of_a_batch_equal_torchs_own_samples() -> None:
    """Each box takes the map of its own image and level; a box without a level takes the mean of all levels."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(3, 5, 8 // k, 12 // k, generator=generator) for k in (1, 2)]
    low = torch.rand(40, 2, generator=generator) * torch.tensor([90.0, 60.0])
    boxes = torch.cat([low, low + torch.rand(40, 2, generator=generator) * 40], 1)  # some centres past the edge
    images, own = torch.arange(40) % 3, torch.arange(40) % 3 - 1
    grid = (boxes[:, :2] + boxes[:, 2:]) / 2 / torch.tensor([96.0, 64.0]) * 2 - 1
    sampled = sample_embeddings(levels, images, boxes, own, (64, 96))
    for index in range(40):
        maps = levels if own[index] < 0 else [levels[own[index]]]
        points = grid[index][None, None, None]
        wanted = [torch.nn.functional.grid_sample(m[images[index]][None], points, align_corners=False) for m in maps]
        np.testing.assert_allclose(sampled[index], torch.stack(wanted).mean(0).flatten(), atol=1e-5)


@pytest.mark.parametrize(
    ("width", "height", "level"),
    [(112, 112, 0), (223, 223, 0), (224, 224, 1), (224, 56, 0), (447, 447, 1), (448, 448, 2), (999, 999, 2), (1, 1, 0)],
)
def test_the_level_of_a_box_follows_from_its_size(width: int, height: int, level: int) -> None:
    """Lin et al. 2017, Eq. 1 by hand: 224 px belong to stride 16, on a pyramid of strides 8, 16 and 32."""
    maps = [torch.zeros(1, 4, 64 // k, 96 // k) for k in (1, 2, 4)]
    box = torch.tensor([[10.0, 20.0, 10.0 + width, 20.0 + height]])
    assert levels_of_size(maps, box, (512, 768)).tolist() == [level]


def test_embeddings_may_come_from_the_level_of_the_boxs_size(
    engine: PoolInference, images: list[PoolImage], results: list[PoolResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On images this small every box belongs to the finest level, whichever level found it."""
    monkeypatch.setattr(engine, "_levels", "scale")
    changed = 0
    for was, now in zip(results, engine.run(images, batch_size=3), strict=True):
        found = was.detections
        np.testing.assert_array_equal(now.boxes_xyxy, found.boxes_xyxy)
        np.testing.assert_array_equal(now.levels, found.levels)
        assert found.levels is not None and found.embeddings is not None and now.embeddings is not None
        finest = found.levels == 0
        np.testing.assert_allclose(now.embeddings[finest], found.embeddings[finest], atol=1e-6)
        changed += int((np.abs(now.embeddings[~finest] - found.embeddings[~finest]).max(1) > 1e-3).sum())
    assert changed > 0


def test_unknown_levels_are_refused(trained: TrainResult, zoo_root: Path) -> None:
    with pytest.raises(ValueError, match="'provenance', 'scale'"):
        PoolInference("small", trained.checkpoint, CLASSES, "cpu", zoo_root, levels="all")  # type: ignore[arg-type]


def test_padding_does_not_count_in_image_features() -> None:
    """Whether the images of a batch have one size or several."""
    feature_map = torch.full((2, 2, 4, 4), 9.0)
    feature_map[0, :, :2, :3] = 1.0
    feature_map[1, :, :3, :2] = 2.0
    both = mean_over_images(feature_map, [(30, 48), (48, 20)], (64, 64))
    assert both.tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert mean_over_images(feature_map[:1], [(30, 48)], (64, 64)).tolist() == [[1.0, 1.0]]
    described = image_features([feature_map], [feature_map, feature_map[:, :1]], [(64, 64)] * 2, (64, 64))
    assert described["fpn"].shape == (2, 3) and described["global"][1, 0] == feature_map[1, 0].mean()


def test_what_a_head_finds_in_half_precision_is_decoded_in_full(engine: PoolInference, images: list[PoolImage]) -> None:
    head = engine.model.bbox_head
    kinds: list[torch.dtype] = []
    decode = type(head).predict_by_feat

    def decoding(cls_scores: list[torch.Tensor], *rest: Any, **more: Any) -> Any:
        kinds.extend(item.dtype for item in cls_scores)
        return decode(head, cls_scores, *rest, **more)

    undo = override(head, predict_by_feat=decoding)
    with torch.autocast("cpu", torch.bfloat16):
        list(engine.run(images))
    undo()
    assert set(kinds) == {torch.float32}


def test_a_detector_that_overflows_in_half_precision_goes_on_in_full(
    engine: PoolInference, images: list[PoolImage], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = list(engine.run(images))
    monkeypatch.setattr(
        prediction, "mixed_precision", lambda _, wanted: torch.autocast("cpu", torch.float16, enabled=wanted)
    )
    monkeypatch.setattr(engine, "_amp", True)
    norm, last = engine.model.bbox_head.cls_convs[0].norm, engine.model.bbox_head.retina_cls
    before = [item.data for item in (norm.weight, norm.bias, last.weight)]
    try:
        norm.weight.data, norm.bias.data = before[0] * 1e6, before[1] * 1e6  # float16 ends at 65,504
        last.weight.data = before[2] / 1e6
        found = list(engine.run(images, batch_size=1))
    finally:
        norm.weight.data, norm.bias.data, last.weight.data = before
    assert len(images) > 1 and caplog.text.count("overflows in half precision") == 1, "half is not tried batch by batch"
    for there, here in zip(found, usual, strict=True):
        np.testing.assert_allclose(there.scores, here.scores, atol=1e-3)
