"""Make the initial weights that the zoo ships for ``retinanet_tiny``.

The detector is trained on generated scenes of the ``pretrain`` glyphs, none of which is a class of the demo, so
that it starts a project the way an ImageNet backbone would: knowing edges and objects, not the classes.

    python scripts/train_initial_weights.py            # about ten minutes on two CPU cores

writes ``model_zoo/retinanet_tiny/initial.pth`` (a half-precision state dict without the class-dependent layer) and
puts its sha256 into ``model_zoo/zoo.toml``. The work folder can be given again to resume a run that was cut off.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
import time
from pathlib import Path

import torch

from ppal_backend.detector.train.training import TrainRequest, evaluate, train
from ppal_backend.detector.weights import load_checkpoint, state_dict_of
from ppal_backend.structures.round import Progress
from ppal_backend.synthetic.scenes import generate

ROOT = Path(__file__).resolve().parents[1]
DETECTOR = "retinanet_tiny"
CLASS_LAYER = "bbox_head.retina_cls."
ASPECT_RATIOS = (1.0, 1.0, 1.25, 0.8)


def main() -> None:
    """Generate, train, evaluate on held-out scenes, export."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    work = options.work or Path(tempfile.mkdtemp(prefix="ppal-initial-"))
    train_json, classes = _scenes(work / "train", options.images, options.seed)
    held_out, _ = _scenes(work / "held_out", options.images // 15, options.seed + 1)
    request = TrainRequest(
        detector=DETECTOR,
        classes=classes,
        train_json=train_json,
        val_json=None,
        work_dir=work / f"run-{options.iterations}",
        seed=options.seed,
        device="cpu",
        init_weights="random",
        difficulty=False,
        zoo_root=_zoo(work, options.iterations, options.lr),
    )
    started = time.monotonic()
    last = [0]

    def report(progress: Progress) -> None:
        if progress.done - last[0] >= 100 or progress.done == progress.total:
            last[0] = progress.done
            print(
                f"{time.monotonic() - started:6.0f} s  step {progress.done}/{progress.total}  {progress.detail}",
                flush=True,
            )

    result = train(request, report)
    metrics = evaluate(DETECTOR, result.checkpoint, classes, held_out, "cpu", zoo_root=request.zoo_root)
    print(f"held-out scenes: AP {metrics.map:.3f}, AP50 {metrics.map50:.3f}")
    digest = export(result.checkpoint, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, sha256 {digest}")
    if options.out == ROOT / "model_zoo" / DETECTOR / "initial.pth":
        _note_digest(ROOT / "model_zoo" / "zoo.toml", digest)


def export(checkpoint: Path, out: Path) -> str:
    """Write a half-precision state dict without the class-dependent layer; its sha256."""
    tensors = {
        name: value.half() if value.is_floating_point() else value
        for name, value in state_dict_of(load_checkpoint(checkpoint), checkpoint).items()
        if not name.startswith(CLASS_LAYER)
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": tensors}, out)
    return hashlib.sha256(out.read_bytes()).hexdigest()


def _scenes(folder: Path, images: int, seed: int) -> tuple[Path, tuple[str, ...]]:
    """Generate scenes; the COCO file with absolute paths and the class names."""
    source = generate(folder, images, seed, glyphs="pretrain", burst_share=0.0, aspect_ratios=ASPECT_RATIOS)
    content = json.loads(source.read_text(encoding="utf-8"))
    for image in content["images"]:
        image["file_name"] = str(folder / "images" / image["file_name"])
    target = folder.parent / f"{folder.name}.json"
    target.write_text(json.dumps(content), encoding="utf-8")
    return target, tuple(item["name"] for item in content["categories"])


def _zoo(work: Path, iterations: int, lr: float) -> Path:
    """A zoo of one entry whose schedule is this long."""
    folder = work / "zoo"
    folder.mkdir(parents=True, exist_ok=True)
    config = ROOT / "model_zoo" / DETECTOR / "config.py"
    (folder / "zoo.toml").write_text(
        f"""[{DETECTOR}]
title = "initial training"
paper = ""
config = {json.dumps(str(config))}
head_family = "anchor"
input_size = [160, 128]
[{DETECTOR}.schedule]
epochs = 1
min_iterations = {iterations}
max_iterations = {iterations}
batch_size = 16
lr = {lr}
warmup_iterations = 200
decay = "cosine"
[{DETECTOR}.inference]
batch_cpu = 32
""",
        encoding="utf-8",
    )
    return folder


def _note_digest(zoo_file: Path, digest: str) -> None:
    text = zoo_file.read_text(encoding="utf-8")
    pattern = rf'(\[{DETECTOR}\.weights\][^\[]*?sha256 = )"[0-9a-f]*"'
    zoo_file.write_text(re.sub(pattern, rf'\1"{digest}"', text, count=1), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "model_zoo" / DETECTOR / "initial.pth")
    parser.add_argument("--work", type=Path, help="work folder; a temporary one when not given")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--iterations", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
