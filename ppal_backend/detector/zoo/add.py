"""An operator's own detector: an mmdetection config and its weights, tried first and then added to the zoo.

The config file is Python, which mmengine runs: only an operator with a shell may add one. Projects, and with them
Label Studio, name a detector that is there and never a file.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from ppal_backend.detector.config import FAULTS, build_config, prediction_steps, read_config, wrong_values_told
from ppal_backend.detector.heads import detection_head, inference_family, training_family
from ppal_backend.detector.models import build_model
from ppal_backend.detector.recipe import read_recipe, type_name
from ppal_backend.detector.runtime import isolated, stdout_aside
from ppal_backend.detector.train.semi import is_semi, predicting_part, trained_part
from ppal_backend.detector.weights import (
    apply_weights,
    backbone_of,
    classes_of,
    kind_of,
    load_any,
    load_checkpoint,
    state_dict_of,
)
from ppal_backend.detector.weights.initial import holds_classes, shapes_of
from ppal_backend.detector.zoo import RESERVED, ZOO_FILE, Schedule, ZooEntry, find_entry, load_zoo, names_in, toml_value
from ppal_backend.detector.zoo.check import CLASSES, CheckReport, check
from ppal_backend.errors import DetectorError, UnsupportedHead
from ppal_backend.files import atomic_file, sha256_of

_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")  # what a project may name
_RECIPE_OF = "retinanet_r50_fpn"  # its schedule is the paper's
_HEADER = "# Detectors of your own, beside the packaged ones. The keys are told in model_zoo/README.md.\n"
_WEIGHTS_NAME = "weights.pth"


@dataclass(frozen=True)
class Added:
    """A detector that was added.

    Args:
        entry: What the zoo now says of it.
        tensors: Tensors of the checkpoint that fit the detector, or None without a checkpoint.
        report: What the trial showed.
        remarks: What of the config file is not followed, for people.
    """

    entry: ZooEntry
    tensors: int | None
    report: CheckReport
    remarks: tuple[str, ...] = ()


def add(
    config: Path,
    weights: Path | None,
    own_zoo: Path,
    *,
    name: str | None = None,
    difficulty: bool = True,
    device: str = "auto",
) -> Added:
    """Try an operator's detector and add it to the operator's zoo.

    The config is stored flat, with everything it inherits, and the weights as plain tensors, so that neither depends
    on the files they came from. Nothing is stored unless everything succeeds.

    Args:
        config: mmdetection config file.
        weights: Checkpoint of the detector or of its backbone, or None.
        own_zoo: Folder of the operator's zoo; made where it is missing.
        name: Name for projects to choose it by; from the file's name when None.
        difficulty: Whether its training must tell class difficulty. Without it, every class weighs the same.
        device: Where to try it.

    Raises:
        DetectorError: The config cannot be read, lacks something, cannot be built or trained, or the name is taken.
        UnsupportedHead: No head family traces its predictions, or none reads its training and ``difficulty`` is on.
        CheckpointError: The checkpoint is damaged, unsafe or of another architecture.
    """
    name = _free_name(config.stem if name is None else name, own_zoo)
    with tempfile.TemporaryDirectory(prefix="ppal-zoo-add-") as folder:
        staged = Path(folder) / name
        staged.mkdir()
        flat = _flat(config)
        with wrong_values_told(config):
            flat.dump(str(staged / "config.py"))
            with stdout_aside():
                Config.fromfile(str(staged / "config.py"))  # what cannot be written down shows here
            entry = _entry_of(name, staged / "config.py", flat)
        family, kind, tensors, told = _fit(entry, weights, staged / _WEIGHTS_NAME, difficulty)
        table = _table(entry, family, weights, kind, staged / _WEIGHTS_NAME)
        (Path(folder) / ZOO_FILE).write_text(table, encoding="utf-8")
        report = _trial(name, device, Path(folder), difficulty)
        _install(staged, own_zoo, table)
    return Added(find_entry(name, own_zoo), tensors, report, (*_remarks(flat, report.device), *told))


def _free_name(wanted: str, own_zoo: Path) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", wanted.lower()).strip("_")
    if not _NAME.fullmatch(name):
        raise DetectorError(f"expected a name of small letters, digits and _, got {wanted!r}; give one with --name")
    if name in RESERVED:
        raise DetectorError(
            f"expected the name of a detector, got {name!r}, which means something else in the zoo's file; "
            "give another with --name"
        )
    taken = names_in(load_zoo())
    if (own_zoo / ZOO_FILE).is_file():
        taken |= names_in(load_zoo(own_zoo))
    if name in taken:
        raise DetectorError(f"expected a new name, got {name!r}, which the zoo has; give another with --name")
    return name


def _flat(path: Path) -> Config:
    """The config with its bases resolved, and pipelines under the names that this package looks for."""
    flat = read_config(path)
    if "data" in flat and "train_dataloader" not in flat:
        raise DetectorError(
            f"expected a config file of mmdetection 3 at {path}, got one of mmdetection 2 (its data sets stand in "
            f"'data'); take mmdetection 3's config of this detector, which loads the same weights"
        )
    model = flat.get("model")
    if not isinstance(model, dict) or "type" not in model:
        raise DetectorError(f"expected a 'model' with a 'type' in {path}, found none; use an mmdetection config file")
    if is_semi(flat.model) and "unlabelled_pipeline" not in flat:
        _rename_semi_parts(flat, path)
    return flat


def _remarks(flat: Config, device: str) -> tuple[str, ...]:
    """What the file asks for and a training here does otherwise."""
    remarks = [f"its hook {name} is left out" for name in read_recipe(flat).left_out]
    if type_name(flat.optim_wrapper) == "AmpOptimWrapper" and not device.startswith("cuda"):
        remarks.append("mixed precision is used on a GPU only")
    return tuple(remarks)


def _rename_semi_parts(flat: Config, path: Path) -> None:
    """mmdetection's semi-supervised configs name two pipelines, and the ratio of both kinds of images in a batch."""
    missing = [key for key in ("sup_pipeline", "unsup_pipeline") if key not in flat]
    if missing:
        raise DetectorError(f"expected pipelines for labelled and unlabelled images in {path}, found no {missing}")
    labelled, unlabelled = flat.get("train_dataloader", {}).get("sampler", {}).get("source_ratio", (1, 1))
    if unlabelled % labelled:
        raise DetectorError(
            f"expected a whole number of unlabelled images for each labelled one, got source_ratio "
            f"{[labelled, unlabelled]} in {path}; change it"
        )
    flat.train_pipeline, flat.unlabelled_pipeline = flat.sup_pipeline, flat.unsup_pipeline
    flat.unlabelled_ratio = unlabelled // labelled


def _entry_of(name: str, file: Path, flat: Config) -> ZooEntry:
    inner = flat.model.detector if is_semi(flat.model) else flat.model
    backbone = inner.get("backbone", {})
    size = _input_size(flat)
    if size is None:
        raise DetectorError("expected a step with a 'scale' in the test pipeline, found none; add a Resize")
    parts = f"{type_name(flat.model)}, {type_name(backbone) or 'unknown'}{backbone.get('depth', '')}"
    return ZooEntry(
        name=name,
        title=f"{parts} (your own)",
        paper="",
        config=file,
        head_family="",
        input_size=size,
        weights=None,
        schedule=_schedule(flat),
    )


def _input_size(flat: Config) -> tuple[int, int] | None:
    """Longest and shortest side that the test pipeline resizes to."""
    for step in prediction_steps(flat):
        scale = step.get("scale")
        if type(scale) is int:
            return scale, scale
        if isinstance(scale, list | tuple) and len(scale) == 2 and all(isinstance(side, int) for side in scale):
            return max(scale), min(scale)
    return None


def _schedule(flat: Config) -> Schedule:
    """The paper's recipe at the config's own batch size, and its learning rate for a batch of that size."""
    batch = int(flat.get("train_dataloader", {}).get("batch_size", 2))
    optimizer = flat.get("optim_wrapper", {}).get("optimizer", {})
    if "lr" not in optimizer:
        raise DetectorError("expected optim_wrapper.optimizer.lr in the config, found none; add an optimizer")
    meant_for = flat.get("auto_scale_lr", {}).get("base_batch_size", batch)
    share = 1
    if is_semi(flat.model):  # the schedule counts labelled images
        share = 1 + int(flat.get("unlabelled_ratio", 1))
    return replace(
        find_entry(_RECIPE_OF).schedule,
        batch_size=max(1, batch // share),
        lr=float(optimizer["lr"]) * batch / meant_for,
    )


def _fit(
    entry: ZooEntry, weights: Path | None, target: Path, difficulty: bool
) -> tuple[str, str, int | None, tuple[str, ...]]:
    """Build the detector, find its head family, put the weights in and store them.

    Returns:
        The family's name, the kind of the weights ("" without), how many of their tensors fit, and remarks.
    """
    remarks: tuple[str, ...] = ()
    with isolated(f"ppal-add-{entry.name}"):
        built = build_config(entry, CLASSES, train_images=1, trained_backbone=False)
        model = build_model(built)
        predicting = predicting_part(model)
        inference_family(predicting)
        family = _family(model, difficulty)
        if weights is None:
            return family, "", None, remarks
        content = load_any(weights)
        tensors, classes = state_dict_of(content, weights), list(classes_of(content))
        kind = kind_of(tensors, predicting)
        if kind == "backbone":  # the rest is a classifier's, and the classes are those of its head
            tensors, classes = backbone_of(tensors, predicting), []
        count = apply_weights(predicting, tensors, kind, weights)
        wider = shapes_of(built, len(CLASSES) + 1)
        if classes and not holds_classes(tensors, len(classes), len(CLASSES), trained_part(model).state_dict(), wider):
            remarks = (
                f"its weights list {len(classes)} classes and their head has other rows, so the list is left out and "
                "no label starts from a class they know; to change that, correct the checkpoint's dataset_meta.classes",
            )
            classes = []
    torch.save({"state_dict": tensors, "meta": {"dataset_meta": {"classes": classes}}}, target)
    return family, kind, count, remarks


def _family(model: Any, difficulty: bool) -> str:
    head = detection_head(model)
    try:
        return training_family(head).name.split()[0].lower()
    except UnsupportedHead as error:
        if difficulty:
            raise UnsupportedHead(f"{error}; with --no-difficulty it is added all the same") from error
        return type(head).__name__.lower()


def _trial(name: str, device: str, root: Path, difficulty: bool) -> CheckReport:
    try:
        return check(name, device, root, difficulty=difficulty)
    except FAULTS as error:
        raise DetectorError(
            f"{name} can be built, but neither trained nor run as an object detector ({type(error).__name__}: "
            f"{error}); check its pipelines, and that it needs boxes only"
        ) from error


def _table(entry: ZooEntry, family: str, weights: Path | None, kind: str, file: Path) -> str:
    """The entry as TOML."""
    values: dict[str, Any] = {
        "title": entry.title,
        "paper": entry.paper,
        "config": f"{entry.name}/config.py",
        "head_family": family,
        "input_size": list(entry.input_size),
    }
    lines = [f"[{entry.name}]", *_rows(values)]
    if weights is not None:
        described: dict[str, Any] = {
            "kind": kind,
            "path": f"{entry.name}/{file.name}",
            "sha256": sha256_of(file),
            "licence": "your own",
            "source": str(weights.resolve()),
        }
        if kind == "detector":
            described["classes"] = list(classes_of(load_checkpoint(file)))
        lines += ["", f"[{entry.name}.weights]", *_rows(described)]
    lines += ["", f"[{entry.name}.schedule]", *_rows(asdict(entry.schedule))]
    return "\n".join(lines) + "\n"


def _rows(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {toml_value(value)}" for key, value in values.items()]


def _install(staged: Path, own_zoo: Path, table: str) -> None:
    """Files first, the table that makes them known last and at once."""
    file = own_zoo / ZOO_FILE
    shutil.copytree(staged, own_zoo / staged.name, dirs_exist_ok=True)
    before = file.read_text(encoding="utf-8") if file.is_file() else f"{_HEADER}include_packaged = true\n"
    with atomic_file(file, "w") as stream:
        stream.write(f"{before.rstrip()}\n\n{table}")
