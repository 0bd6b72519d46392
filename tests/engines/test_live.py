"""The prediction process: started late, kept, replaced when it dies, never waited for beyond the deadline."""

import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from ppal_backend.engines.live import LiveModel, LiveOptions, LivePredictor, PredictionTimeout
from ppal_backend.errors import CheckpointError, DetectorError
from ppal_backend.structures.detections import Detections

FIRST, SECOND, THIRD = (LiveModel("tiny", f"/models/{n}.pth", ("Cat", "Dog")) for n in "abc")


def fake_loader(model, options):
    """Stands for a detector, in the process: what an image does is written in its path."""
    log = Path(options.zoo) / "loads"
    with log.open("a") as file:
        file.write(Path(model.checkpoint).stem)
    if model.detector == "damaged":
        raise CheckpointError(f"checkpoint {model.checkpoint} is damaged")
    return lambda images: [found for image_id, path in images if (found := _do(options, image_id, path)) is not None]


def _do(options, image_id, path):
    word, _, number = path.partition(" ")
    if word == "sleep":
        time.sleep(float(number))
    if word == "die" or (word == "die-once" and not (Path(options.zoo) / "died").exists()):
        (Path(options.zoo) / "died").touch()
        os._exit(9)
    if word == "raise":
        raise RuntimeError("secret detail")
    if word == "unreadable":
        return None
    return Detections(
        image_id,
        np.array([[0, 0, image_id, 1]], np.float32),
        np.array([0.5], np.float32),
        np.array([1]),
        np.ones((1, 256), np.float32),
        class_probs=np.array([[0.1, 0.5]], np.float32),
        levels=np.array([3]),
    )


@pytest.fixture
def predictor(tmp_path):
    predictor = LivePredictor(LiveOptions("cpu", tmp_path), fake_loader, stuck_after_s=0.5)
    yield predictor
    predictor.close()


def loads(tmp_path):
    return (tmp_path / "loads").read_text()


def test_boxes_come_back_slim_and_in_order(predictor):
    found = predictor.predict(FIRST, [(5, "x"), (3, "x")], timeout_s=60)
    assert [d.image_id for d in found] == [5, 3]
    assert found[0].boxes_xyxy.tolist() == [[0, 0, 5, 1]]
    assert (found[0].scores.tolist(), found[0].class_indices.tolist()) == ([0.5], [1])
    assert found[0].embeddings.shape == (1, 0)
    assert found[0].class_probs is None and found[0].levels is None


def test_nothing_starts_before_the_first_image(predictor):
    assert predictor.predict(FIRST, [], timeout_s=1) == []
    assert predictor.pid is None


def test_one_process_keeps_the_two_models_used_last(predictor, tmp_path):
    for model in (FIRST, SECOND, FIRST, SECOND):
        predictor.predict(model, [(1, "x")], timeout_s=60)
    pid = predictor.pid
    assert loads(tmp_path) == "ab"
    predictor.predict(FIRST, [(1, "x")], timeout_s=60)
    predictor.predict(THIRD, [(1, "x")], timeout_s=60)  # puts out b, the one used longest ago
    predictor.predict(FIRST, [(1, "x")], timeout_s=60)
    predictor.predict(SECOND, [(1, "x")], timeout_s=60)
    assert loads(tmp_path) == "abcb"
    assert predictor.pid == pid


def test_an_unreadable_image_is_missing(predictor):
    found = predictor.predict(FIRST, [(1, "x"), (2, "unreadable"), (3, "x")], timeout_s=60)
    assert [d.image_id for d in found] == [1, 3]


def test_a_process_that_dies_is_started_once_more(predictor, tmp_path):
    found = predictor.predict(FIRST, [(1, "die-once")], timeout_s=60)
    assert [d.image_id for d in found] == [1]
    assert loads(tmp_path) == "aa"


def test_a_process_killed_between_two_requests(predictor):
    predictor.predict(FIRST, [(1, "x")], timeout_s=60)
    killed = predictor.pid
    psutil.Process(killed).kill()
    assert [d.image_id for d in predictor.predict(FIRST, [(2, "x")], timeout_s=60)] == [2]
    assert predictor.pid != killed


def test_a_process_that_dies_twice_is_a_clear_error_and_the_next_request_works(predictor, tmp_path):
    with pytest.raises(DetectorError, match="ended twice"):
        predictor.predict(FIRST, [(1, "die")], timeout_s=60)
    assert loads(tmp_path) == "aa"
    assert len(predictor.predict(FIRST, [(2, "x")], timeout_s=60)) == 1


def test_errors_that_were_meant_to_be_shown(predictor):
    damaged = LiveModel("damaged", "/models/d.pth", ("Cat",))
    with pytest.raises(CheckpointError, match=r"/models/d\.pth is damaged"):
        predictor.predict(damaged, [(1, "x")], timeout_s=60)
    pid = predictor.pid
    assert len(predictor.predict(FIRST, [(2, "x")], timeout_s=60)) == 1
    assert predictor.pid == pid


def test_unexpected_errors_go_to_the_log_only(predictor, caplog):
    with pytest.raises(DetectorError, match="log has the details") as caught:
        predictor.predict(FIRST, [(1, "raise")], timeout_s=60)
    assert "secret detail" not in str(caught.value)
    assert "secret detail" in caplog.text
    assert len(predictor.predict(FIRST, [(2, "x")], timeout_s=60)) == 1


def test_nobody_waits_longer_than_they_said_and_late_answers_are_not_mixed_up(predictor):
    predictor.predict(FIRST, [(1, "x")], timeout_s=60)
    pid = predictor.pid
    start = time.monotonic()
    with pytest.raises(PredictionTimeout):
        predictor.predict(FIRST, [(1, "sleep 0.4")], timeout_s=0.1)
    assert time.monotonic() - start < 0.3
    assert [d.image_id for d in predictor.predict(FIRST, [(2, "x")], timeout_s=60)] == [2]
    assert predictor.pid == pid  # it was only slow


def test_a_stuck_process_is_replaced(predictor):
    predictor.predict(FIRST, [(1, "x")], timeout_s=60)
    stuck = predictor.pid
    with pytest.raises(PredictionTimeout):
        predictor.predict(FIRST, [(1, "sleep 600")], timeout_s=0.1)
    with pytest.raises(PredictionTimeout):
        predictor.predict(FIRST, [(2, "x")], timeout_s=0.7)
    assert not psutil.pid_exists(stuck)
    assert [d.image_id for d in predictor.predict(FIRST, [(3, "x")], timeout_s=60)] == [3]


def test_close_leaves_no_process(predictor):
    predictor.predict(FIRST, [(1, "x")], timeout_s=60)
    pid = predictor.pid
    predictor.close()
    predictor.close()
    assert predictor.pid is None
    assert not psutil.pid_exists(pid)
    assert len(predictor.predict(FIRST, [(2, "x")], timeout_s=60)) == 1


def test_the_process_ends_when_its_parent_is_killed(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, time; from tests.engines.test_live import *\n"
        "if __name__ == '__main__':\n"
        f"    p = LivePredictor(LiveOptions('cpu', Path({str(tmp_path)!r})), fake_loader)\n"
        "    p.predict(FIRST, [(1, 'x')], timeout_s=60); print(p.pid, flush=True); time.sleep(60)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment) as parent:
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        parent.kill()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def untrained(tmp_path):
    """A checkpoint of the smallest detector of the zoo with random weights."""
    from ppal_backend.detector.config import build_config, find_entry
    from ppal_backend.detector.models import build_model
    from ppal_backend.detector.runtime import isolated
    from ppal_backend.detector.weights import save_final

    with isolated("untrained"):
        model = build_model(build_config(find_entry("retinanet_tiny"), ("Cat", "Dog")))
    model.bbox_head.retina_cls.bias.data.zero_()  # scores about 0.5 instead of 0.01: boxes to compare
    path = tmp_path / "final.pth"
    save_final(path, model.state_dict(), {"detector": "retinanet_tiny", "classes": ["Cat", "Dog"]})
    return LiveModel("retinanet_tiny", str(path), ("Cat", "Dog"))


@pytest.mark.slow
def test_a_real_detector_gives_what_it_gives_in_a_round(untrained, tmp_path):
    from PIL import Image

    from ppal_backend.detector.infer.inference import PoolImage, PoolInference

    image, broken = tmp_path / "image.png", tmp_path / "broken.jpg"
    Image.effect_noise((160, 120), 90).convert("RGB").save(image)
    broken.write_bytes(b"no image")
    predictor = LivePredictor(LiveOptions("cpu", None, 1))
    try:
        found = predictor.predict(untrained, [(5, str(image)), (6, str(broken))], timeout_s=120)
        with pytest.raises(CheckpointError, match="Dog"):
            predictor.predict(LiveModel("retinanet_tiny", untrained.checkpoint, ("Dog",)), [(5, str(image))], 120)
        with pytest.raises(CheckpointError, match=r"none\.pth"):
            predictor.predict(LiveModel("retinanet_tiny", str(tmp_path / "none.pth"), ("Cat",)), [(5, str(image))], 120)
    finally:
        predictor.close()
    (wanted,) = PoolInference("retinanet_tiny", Path(untrained.checkpoint), untrained.labels, "cpu").run(
        [PoolImage(5, image)]
    )
    (live,) = found
    assert len(wanted) > 10
    np.testing.assert_allclose(live.boxes_xyxy, wanted.boxes_xyxy, atol=1e-3)
    np.testing.assert_allclose(live.scores, wanted.scores, atol=1e-5)
    np.testing.assert_array_equal(live.class_indices, wanted.class_indices)
