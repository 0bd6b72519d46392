from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ppal_backend.detector.weights import apply_weights, classes_of, load_any, load_checkpoint, state_dict_of
from ppal_backend.detector.zoo import Schedule, Weights, ZooEntry
from ppal_backend.detector.zoo.fetch import weights_file
from ppal_backend.errors import CheckpointError, WeightsUnavailable

SCHEDULE = Schedule(1, 1, 1, 1, 0.1)


def entry(tmp_path: Path, weights: Weights | None) -> ZooEntry:
    return ZooEntry("toy", "t", "p", tmp_path / "c.py", "anchor", (64, 64), weights, SCHEDULE)


class Toy(torch.nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        self.head = torch.nn.Linear(4, classes)


class Attack:
    """Unpickling this would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    path, target = tmp_path / "evil.pth", tmp_path / "was_here"
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": Attack(target)}, path)
    with pytest.raises(CheckpointError, match="not loaded"):
        load_checkpoint(path)
    assert not target.exists()


def test_damaged_and_missing_files_are_told_apart(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.rand(5000)}, whole)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[:9000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(cut)
    with pytest.raises(CheckpointError, match="found none"):
        load_checkpoint(tmp_path / "absent.pth")
    torch.save([1, 2], whole)
    with pytest.raises(CheckpointError, match="list"):
        load_checkpoint(whole)


def test_state_dict_is_found_in_its_usual_places() -> None:
    half = {"module.a": torch.tensor([0.5], dtype=torch.float16), "n": torch.tensor(3)}
    wrapped = {"module._orig_mod.module.a": half["module.a"], "n": half["n"]}
    for checkpoint in (
        {"state_dict": half, "meta": {}}, {"model": half}, half, {"state_dict": None, "model": half},
        {"model_state_dict": half, "epoch": 3}, {"state_dict": wrapped},
    ):  # fmt: skip
        tensors = state_dict_of(checkpoint, Path("x"))
        assert tensors["a"].dtype == torch.float32 and tensors["a"].item() == 0.5
        assert tensors["n"].dtype == torch.int64
    with pytest.raises(CheckpointError, match="no tensor"):
        state_dict_of({"meta": 3}, Path("x"))


@pytest.mark.parametrize(
    "meta",
    [
        {"classes": ["a", "b"]},
        {"dataset_meta": {"classes": ("a", "b")}},
        {"dataset_meta": {"CLASSES": ("a", "b"), "PALETTE": [(1, 2, 3)]}},
        {"CLASSES": ("a", "b")},
    ],
)
def test_classes_are_found_where_every_release_of_mmdetection_writes_them(meta: dict[str, Any]) -> None:
    """Release candidates of mmdetection 3, which published RTMDet, wrote capitals."""
    assert classes_of({"meta": meta}) == ("a", "b")


@pytest.mark.parametrize("meta", [None, {}, {"CLASSES": None}, {"dataset_meta": {"CLASSES": "ab"}}, {"classes": [1]}])
def test_without_names_of_classes_there_are_none(meta: Any) -> None:
    assert classes_of({"meta": meta}) == ()


def test_weights_of_a_training_that_diverged_are_told() -> None:
    tensors = {"a": torch.tensor([1.0, torch.nan]), "b": torch.tensor([-torch.inf]), "n": torch.tensor(3)}
    with pytest.raises(CheckpointError, match=r"nan in 1 of 3 tensors \(a\).*choose another"):
        state_dict_of({"state_dict": tensors}, Path("x"))
    assert torch.isinf(state_dict_of({"b": tensors["b"]}, Path("x"))["b"]), "masks hold it"


def test_a_whole_model_of_other_software_is_told_with_what_to_do(tmp_path: Path) -> None:
    for content in (Toy(2), {"model": Toy(2)}):
        torch.save(content, tmp_path / "whole.pth")
        with pytest.raises(CheckpointError, match=r"a pickled object of other software; save it again as a state dict"):
            state_dict_of(load_any(tmp_path / "whole.pth"), tmp_path / "whole.pth")


def test_of_a_student_and_its_teacher_the_teacher_counts() -> None:
    pair = {"student.a": torch.tensor(1.0), "teacher.a": torch.tensor(2.0)}
    assert {name: value.item() for name, value in state_dict_of({"state_dict": pair}, Path("x")).items()} == {"a": 2.0}
    both = {**pair, "b": torch.tensor(3.0)}
    assert set(state_dict_of(both, Path("x"))) == {"student.a", "teacher.a", "b"}


def test_class_dependent_layers_keep_their_fresh_values() -> None:
    torch.manual_seed(0)
    source, target = Toy(7), Toy(2)
    fresh = target.head.weight.clone()
    copied = apply_weights(target, source.state_dict(), "detector", Path("x"))
    assert copied == len(source.backbone.state_dict())
    assert torch.equal(target.backbone[0].weight, source.backbone[0].weight)
    assert torch.equal(target.head.weight, fresh)


def test_backbone_weights_go_under_the_backbone_only() -> None:
    source, target = Toy(2), Toy(2)
    bare = {**source.backbone.state_dict(), "fc.weight": torch.rand(10, 4)}
    assert apply_weights(target, bare, "backbone", Path("x")) == len(source.backbone.state_dict())
    assert torch.equal(target.backbone[0].weight, source.backbone[0].weight)


def test_weights_of_another_architecture_are_refused() -> None:
    with pytest.raises(CheckpointError, match="0 of 9 tensors"):
        apply_weights(Toy(2), {"encoder.weight": torch.ones(3)}, "detector", Path("x"))


def test_shipped_weights_are_checked_against_their_digest(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert weights_file(entry(tmp_path, Weights("detector", file, None, digest, "MIT"))) == file
    assert weights_file(entry(tmp_path, Weights("detector", file, None, digest[:8], "MIT"))) == file
    with pytest.raises(WeightsUnavailable, match="expected 0000"):
        weights_file(entry(tmp_path, Weights("detector", file, None, "0000", "MIT")))
    file.unlink()
    with pytest.raises(WeightsUnavailable, match=r"w\.pth"):
        weights_file(entry(tmp_path, Weights("detector", file, None, digest, "MIT")))
    with pytest.raises(WeightsUnavailable, match="random"):
        weights_file(entry(tmp_path, None))


def test_download_is_verified_and_kept(tmp_path: Path) -> None:
    source = tmp_path / "server" / "net.pth"
    source.parent.mkdir()
    source.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    cache = tmp_path / "cache"
    got = weights_file(entry(tmp_path, Weights("backbone", None, source.as_uri(), digest, "MIT")), cache)
    assert got == cache / "net.pth" and got.read_bytes() == b"weights"
    source.unlink()
    again = weights_file(entry(tmp_path, Weights("backbone", None, source.as_uri(), digest, "MIT")), cache)
    assert again == got


def test_offline_says_the_address_and_where_to_put_the_file(tmp_path: Path) -> None:
    weights = Weights("backbone", None, "http://127.0.0.1:9/nothing/net.pth", "ab", "MIT")
    with pytest.raises(WeightsUnavailable) as caught:
        weights_file(entry(tmp_path, weights), tmp_path / "cache")
    assert "http://127.0.0.1:9/nothing/net.pth" in str(caught.value)
    assert str(tmp_path / "cache" / "net.pth") in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wrong_download_is_not_kept(tmp_path: Path) -> None:
    source = tmp_path / "net.pth"
    source.write_bytes(b"something else")
    with pytest.raises(WeightsUnavailable, match="sha256"):
        weights_file(entry(tmp_path, Weights("backbone", None, source.as_uri(), "abcd", "MIT")), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
