"""Detections refuse what later steps could not survive."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from ppal_backend.structures import Detections

GOOD = {
    "image_id": 7,
    "boxes_xyxy": np.array([[0, 0, 10, 10], [5, 5, 20, 9]], np.float32),
    "scores": np.array([0.9, 0.4], np.float32),
    "class_indices": np.array([0, 2]),
    "embeddings": np.array([[1, 2], [3, 4]], np.float32),
}


def make(**changes):
    return Detections(**{**GOOD, **changes})


def test_length_and_filter():
    d = make(levels=np.array([1, 2]), class_probs=np.array([[0.9, 0.1, 0], [0.2, 0.4, 0.4]], np.float32), softmax=True)
    assert len(d) == 2
    kept = d.filter(np.array([False, True]))
    assert kept.image_id == 7 and kept.softmax
    for name in ("boxes_xyxy", "scores", "class_indices", "embeddings", "class_probs", "levels"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(d, name)[1:])
    turned = d.filter(np.array([1, 0]))
    np.testing.assert_array_equal(turned.scores, d.scores[::-1])


def test_round_trip_through_tensors():
    d = make()
    moved = d.to("cpu")
    assert isinstance(moved.scores, torch.Tensor) and moved.levels is None
    back = moved.numpy()
    np.testing.assert_array_equal(back.embeddings, d.embeddings)
    np.testing.assert_array_equal(moved.filter(torch.tensor([False, True])).scores, d.scores[1:])


def test_empty():
    d = Detections.empty(3, 8)
    assert len(d) == 0 and d.boxes_xyxy.shape == (0, 4) and d.embeddings.shape == (0, 8)


def test_softmax_is_recognised_when_not_said():
    assert make(class_probs=np.array([[0.9, 0.05, 0.05], [0.2, 0.2, 0.6]], np.float32)).softmax is True
    assert make(class_probs=np.array([[0.9, 0.3, 0.1], [0.2, 0.2, 0.6]], np.float32)).softmax is False
    said = make(class_probs=np.array([[0.9, 0.05, 0.05], [0.2, 0.2, 0.6]], np.float32), softmax=False)
    assert said.softmax is False
    assert make().softmax is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": "7"}, "image_id to be an int"),
        ({"image_id": True}, "image_id to be an int"),
        ({"boxes_xyxy": np.zeros((2, 5), np.float32)}, r"boxes_xyxy with shape \(2, 4\), got \(2, 5\)"),
        ({"boxes_xyxy": np.zeros((3, 4), np.float32)}, r"boxes_xyxy with shape \(2, 4\), got \(3, 4\)"),
        ({"scores": np.zeros((2, 1), np.float32)}, r"scores with shape \(n,\), got \(2, 1\)"),
        ({"class_indices": np.array([0])}, r"class_indices with shape \(2,\), got \(1,\)"),
        ({"embeddings": np.zeros(2, np.float32)}, r"embeddings with shape \(2, d\), got \(2,\)"),
        ({"class_probs": np.zeros((1, 3), np.float32)}, r"class_probs with shape \(2, k\), got \(1, 3\)"),
        ({"levels": np.array([1])}, r"levels with shape \(2,\), got \(1,\)"),
        ({"scores": np.array([0.5, np.nan], np.float32)}, r"finite scores .* image 7"),
        ({"scores": np.array([0.5, 1.5], np.float32)}, r"scores in \[0, 1\]"),
        ({"embeddings": np.array([[1, np.inf], [0, 0]], np.float32)}, "finite embeddings"),
        ({"boxes_xyxy": np.full((2, 4), np.nan, np.float32)}, "finite boxes_xyxy"),
        ({"class_indices": np.array([0, -1])}, "class_indices >= 0, got -1"),
        ({"class_indices": np.array([0.0, 1.0])}, "integer dtype"),
        ({"scores": np.array([1, 0])}, "floating dtype"),
        ({"class_probs": np.full((2, 2), 0.5, np.float32)}, r"class_indices below 2 .* got 2"),
        ({"class_probs": np.full((2, 4), 1.5, np.float32)}, r"class_probs in \[0, 1\]"),
        ({"class_probs": np.full((2, 4), 0.5, np.float32), "softmax": True}, "sum to 1"),
        ({"scores": torch.tensor([0.5, 0.4])}, "one kind"),
        ({"boxes_xyxy": [[0, 0, 1, 1]] * 2}, "one kind"),
        ({"true_positive": np.array([1, 0])}, "dtype bool"),
    ],
)
def test_bad_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_size_of_the_image_is_checked_and_kept():
    box, score = np.zeros((1, 4), np.float32), np.zeros(1, np.float32)
    d = Detections(1, box, score, np.zeros(1, int), np.zeros((1, 2)), image_size=(8, 6))
    assert d.image_size == (8, 6)
    assert d.filter(np.array([0])).to("cpu").numpy().image_size == (8, 6)
    with pytest.raises(ValueError, match=r"image_size as width and height >= 1, got \(8, 0\)"):
        replace(d, image_size=(8, 0))


def test_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"mask with shape \(2,\), got \(3,\)"):
        make().filter(np.array([True, False, True]))


def test_structures_do_not_pull_in_torch():
    code = "import sys; import ppal_backend.structures as s; s.Detections.empty(1); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
