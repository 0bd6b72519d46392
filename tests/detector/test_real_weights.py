"""Published weights in their entry of the zoo: `yolox_nano` from COCO, where its file lies beside the checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ppal_backend.detector.config import build_config
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.models import build_model
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.train.training import TrainRequest, evaluate, train
from ppal_backend.detector.weights import load_any, load_checkpoint, state_dict_of
from ppal_backend.detector.weights.initial import save_as_is
from ppal_backend.detector.zoo import default_zoo_root, find_entry
from ppal_backend.detector.zoo.fetch import place_weights
from ppal_backend.detector.zoo.known_classes import COCO_CLASSES, match_classes
from ppal_backend.files import read_json
from tests.detector.shapes import CLASSES

GIVEN = Path(__file__).resolve().parents[3] / "shared" / "weights" / "yolox_nano_coco.pth"
AQUARIUM = GIVEN.parents[1] / "data" / "aquarium"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not GIVEN.is_file(), reason=f"needs the weights at {GIVEN}"),
]


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights in place; the digest of the zoo is theirs."""
    folder = tmp_path_factory.mktemp("weights")
    assert place_weights(find_entry("yolox_nano"), GIVEN, folder).name == GIVEN.name
    return folder


def test_every_weight_has_its_place_but_the_class_layers() -> None:
    tensors = state_dict_of(load_any(GIVEN), GIVEN)
    entry = find_entry("yolox_nano")
    with isolated("test-real-weights"):
        whole = build_model(build_config(entry, [f"class {number}" for number in range(len(COCO_CLASSES))]))
        other = build_model(build_config(entry, CLASSES)).state_dict()
    keys = whole.load_state_dict(tensors, strict=True)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert other.keys() == tensors.keys()
    differ = {name for name, value in other.items() if value.shape != tensors[name].shape}
    assert differ == {
        f"bbox_head.multi_level_conv_cls.{level}.{part}" for level in range(3) for part in ("weight", "bias")
    }


def test_a_detector_trained_for_two_steps_starts_from_them_and_runs(
    weights_dir: Path, train_json: Path, test_json: Path, tmp_path: Path
) -> None:
    zoo_root = tmp_path / "zoo"  # the same with 2 images a step, for speed
    shutil.copytree(default_zoo_root(), zoo_root)
    file = zoo_root / "zoo.toml"
    file.write_text(file.read_text().replace("batch_size = 8\nlr = 0.002\n", "batch_size = 2\nlr = 0.002\n"))
    assert find_entry("yolox_nano", zoo_root).schedule.batch_size == 2
    result = train(
        TrainRequest(
            "yolox_nano",
            CLASSES,
            train_json,
            None,
            tmp_path / "work",
            3,
            "cpu",
            max_iterations=2,
            weights_dir=weights_dir,
            zoo_root=zoo_root,
        )
    )
    given = state_dict_of(load_any(GIVEN), GIVEN)
    trained = state_dict_of(load_checkpoint(result.checkpoint), result.checkpoint)
    frozen = [name for name in given if name.startswith("backbone.") and not name.endswith("num_batches_tracked")]
    assert frozen and all(torch.equal(trained[name], given[name]) for name in frozen)
    name = "neck.reduce_layers.0.conv.weight"
    moved = float((trained[name] - given[name]).abs().max())
    assert 0 < moved < 3 * find_entry("yolox_nano").schedule.lr  # AdamW: about the learning rate a step
    metrics = evaluate("yolox_nano", result.checkpoint, CLASSES, test_json, "cpu")
    assert metrics.images == 8 and metrics.map is not None and 0 <= metrics.map <= 1
    assert set(metrics.per_class) == set(CLASSES)


@pytest.mark.skipif(not AQUARIUM.is_dir(), reason=f"needs the photographs at {AQUARIUM}")
def test_birds_of_photographs_are_boxed_before_any_label(weights_dir: Path, tmp_path: Path) -> None:
    """Pictures of penguins and puffins; few of these birds are found, and none of another class is shown."""
    content = read_json(AQUARIUM / "test.json")
    birds = {c["id"] for c in content["categories"] if c["name"] in ("penguin", "puffin")}
    wanted = {row["image_id"] for row in content["annotations"] if row["category_id"] in birds}
    files = [AQUARIUM / "images" / image["file_name"] for image in content["images"] if image["id"] in wanted]
    labels = ("fish", "penguin", "puffin")
    known = match_classes(labels, {"penguin": ("bird",), "puffin": ("bird",)}, COCO_CLASSES)
    save_as_is("yolox_nano", labels, known.sources, tmp_path / "as_is.pth", None, weights_dir)
    inference = PoolInference("yolox_nano", tmp_path / "as_is.pth", labels, "cpu")
    found = list(inference.run([PoolImage(number, file) for number, file in enumerate(files)]))
    assert {int(i) for one in found for i in one.class_indices} == {labels.index("penguin")}
    assert sum(int((one.scores >= 0.3).sum()) for one in found) >= 10
