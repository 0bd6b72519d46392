"""Which weights a training starts from, how they get into the detector, and the detector as it is before any."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from ppal_backend.detector.config import build_config, set_class_count
from ppal_backend.detector.data import ImageRecord, build_pipeline, data_info, run_pipeline
from ppal_backend.detector.models import build_model
from ppal_backend.detector.runtime import isolated, pick_device
from ppal_backend.detector.train.semi import trained_part
from ppal_backend.detector.weights import apply_weights, has_folded_statistics, load_any, save_final, state_dict_of
from ppal_backend.detector.zoo import ZooEntry, find_entry
from ppal_backend.detector.zoo.fetch import weights_file, weights_target

if TYPE_CHECKING:
    from ppal_backend.detector.train.request import TrainRequest
    from ppal_backend.detector.train.runner import Initialise


logger = logging.getLogger(__name__)

_MEASURED_IMAGES = 32

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class InitialWeights:
    """A checkpoint on disk; ``kind`` is ``detector`` or ``backbone``."""

    path: Path
    kind: str


def starts_random(request: TrainRequest, entry: ZooEntry) -> bool:
    """Random weights are used where they were asked for, or where the zoo offers no others and says so."""
    nothing_else = request.init_weights is None and entry.weights is None
    return request.init_weights == "random" or (nothing_else and entry.from_scratch)


def find_weights(request: TrainRequest, entry: ZooEntry) -> InitialWeights | None:
    """Choose, fetch and check the initial weights, before anything is built; None for a random start.

    Raises:
        WeightsUnavailable: They cannot be had.
        CheckpointError: They are damaged or unsafe.
    """
    if starts_random(request, entry):
        return None
    if request.init_weights is None:
        path = weights_file(entry, request.weights_dir)
        kind = entry.weights.kind if entry.weights is not None else "detector"
    else:
        path, kind = Path(request.init_weights), "detector"
    tensors = state_dict_of(load_any(path), path)
    if kind == "detector" and not any(name.startswith("backbone.") for name in tensors):
        kind = "backbone"
    return InitialWeights(path, kind)


def initialiser(
    weights: InitialWeights | None, config: Config, classes: Sequence[str], images: Sequence[ImageRecord] = ()
) -> Initialise:
    """What puts the weights into a detector after its random initialisation; call it inside :func:`runtime.isolated`.

    Args:
        weights: Weights from :func:`find_weights`.
        config: Configuration of the training.
        classes: Labels in the order of the class indices.
        images: Images of the training. Folded batch-norm statistics of the weights are measured again on the first of
            them; without images they stay as they are, which is right for a detector that does not train.
    """
    if weights is None:
        return lambda model: None
    content = load_any(weights.path)
    tensors = state_dict_of(content, weights.path)
    meta = content.get("meta")
    # only this package writes "classes" there, and its rows are known to be in that order
    known = tuple(meta.get("classes", ())) if isinstance(meta, dict) else ()

    def initialise(model: torch.nn.Module) -> None:
        part = trained_part(model)
        fitting = tensors
        if known and known != tuple(classes):
            fitting = carry_classes(tensors, known, classes, part.state_dict(), _wider(config, len(classes) + 1))
        apply_weights(part, fitting, weights.kind, weights.path)
        if images and has_folded_statistics(tensors):
            measured = images[:_MEASURED_IMAGES]
            logger.warning(
                "%s holds batch norms folded into other layers: their statistics are measured again on %d images",
                weights.path, len(measured),
            )  # fmt: skip
            measure_statistics(part, config.test_pipeline, measured)

    return initialise


def measure_statistics(detector: Any, test_pipeline: Sequence[dict[str, Any]], images: Sequence[ImageRecord]) -> None:
    """Give every batch norm the mean and variance of what reaches it, and undo their effect in its scale and shift.

    In evaluation mode the detector computes what it did before. In training mode, where statistics of the batch take
    the place of those in the checkpoint, it now starts from nearly the same: without this, a detector whose batch
    norms were folded away (for a fast export) forgets all it knew at the first step.

    Args:
        detector: Detector with its weights, where it will train.
        test_pipeline: Its steps for prediction.
        images: Images to measure on, at least one.

    Raises:
        ImageError: An image cannot be read.
    """
    sums: dict[Any, list[torch.Tensor]] = {}

    def add(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0].detach().double().transpose(0, 1).flatten(1)
        found = [values.sum(1), values.square().sum(1), values.new_tensor(float(values.shape[1]))]
        sums[layer] = [old + new for old, new in zip(sums[layer], found, strict=True)] if layer in sums else found

    layers = [layer for layer in detector.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    training = {module: module.training for module in detector.modules()}
    pipeline = build_pipeline(test_pipeline)
    detector.eval()
    try:
        with torch.no_grad():
            for image in images:
                packed = pseudo_collate([run_pipeline(pipeline, data_info(image))])
                detector(**detector.data_preprocessor(packed, False), mode="tensor")
            for layer, (total, squares, count) in sums.items():
                _set_statistics(layer, total / count, squares / count - (total / count).square())
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode


def _set_statistics(layer: Any, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """New statistics of a batch norm; scale and shift make up for the change."""
    variance = variance.clamp(min=0)
    scale = layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()
    shift = layer.bias.double() + scale * (mean - layer.running_mean.double())
    layer.weight.copy_(scale * (variance + layer.eps).sqrt())
    layer.bias.copy_(shift)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)


def _wider(config: Config, classes: int) -> dict[str, torch.Size]:
    """Shapes of the same detector for another number of classes."""
    wider = config.copy()
    set_class_count(wider.model, classes)
    with torch.random.fork_rng():
        part = trained_part(build_model(wider))
    return {name: value.shape for name, value in part.state_dict().items()}


def carry_classes(
    tensors: Mapping[str, torch.Tensor],
    old: Sequence[str],
    new: Sequence[str],
    fresh: Mapping[str, torch.Tensor],
    wider: Shapes,
) -> dict[str, torch.Tensor]:
    """Rearrange the weights of a detector's head for other classes.

    Which rows belong to classes is read off the shapes of the same detector with one class more: the first dimension
    of such a tensor grows by ``a`` and holds ``a * C`` rows, or ``a * (C + 1)`` with a background in the last place.
    Rows of classification are ordered by anchor, then class; those of box regression (``fc_reg`` and the like) by
    class, then coordinate. Rows of labels that the old detector did not know stay fresh.

    Args:
        tensors: Weights of the old detector by name.
        old: Its labels in the order of the class indices.
        new: Labels of the new detector, likewise.
        fresh: Weights of the new detector before training, by name.
        wider: Shapes of the new detector with one class more, by name.

    Returns:
        ``tensors`` with those that depend on classes made to fit; where a shape is not as expected, the fresh ones.
    """
    carried = dict(tensors)
    for name, target in fresh.items():
        if name in tensors and target.dim() > 0 and wider[name] != target.shape:
            carried[name] = _rows(name, tensors[name], old, new, target, wider[name][0] - target.shape[0])
    return carried


def _rows(
    name: str, source: torch.Tensor, old: Sequence[str], new: Sequence[str], target: torch.Tensor, group: int
) -> torch.Tensor:
    background = target.shape[0] - group * len(new)
    expected = (group * len(old) + background, *target.shape[1:])
    result = target.detach().cpu().clone()
    if group < 1 or background not in (0, group) or tuple(source.shape) != expected:
        return result
    by_class = name.rsplit(".", 2)[-2].endswith("reg")
    position = {label: index for index, label in enumerate(old)}
    pairs = [(index, position[label]) for index, label in enumerate(new) if label in position]
    if background:
        pairs.append((len(new), len(old)))
    wide_new, wide_old = result.shape[0] // group, source.shape[0] // group
    for row in range(group):
        for to, come in pairs:
            if by_class:
                result[to * group + row] = source[come * group + row]
            else:
                result[row * wide_new + to] = source[row * wide_old + come]
    return result


def save_untrained(
    detector: str,
    classes: Sequence[str],
    path: Path,
    device: str = "auto",
    zoo_root: Path | None = None,
    weights_dir: Path | None = None,
) -> bool:
    """Write a checkpoint of the zoo's initial weights, where they are at hand and looking at a pool is affordable.

    Nothing is downloaded for this, and a detector that takes one image at a time on a CPU (``batch_cpu`` of the zoo)
    would need seconds for each: it waits for a GPU.

    Args:
        detector: Name in the zoo.
        classes: Labels in the order of the class indices.
        path: Where to write; loads like a trained detector's.
        device: Where the pool will be looked at: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        zoo_root: Folder of the zoo; None for the packaged one.
        weights_dir: Folder for downloaded weights; None for the default cache.

    Returns:
        Whether it was written; the log says why not.

    Raises:
        UnknownDetector: The zoo has no such detector.
        WeightsUnavailable: The weights on disk have the wrong checksum.
        CheckpointError: They are damaged, unsafe or of another architecture.
    """
    entry = find_entry(detector, zoo_root)
    if entry.weights is None or not weights_target(entry, weights_dir).is_file():
        logger.info("no initial weights of %s at hand: the pool is not looked at before the first training", detector)
        return False
    if pick_device(device).type == "cpu" and entry.batch_cpu == 1:
        logger.info("%s is too slow on a CPU to look at the pool before the first training", detector)
        return False
    weights = InitialWeights(weights_file(entry, weights_dir), entry.weights.kind)
    with isolated(f"ppal-{uuid.uuid4().hex}"):
        config = build_config(entry, classes)
        model = build_model(config)
        initialiser(weights, config, classes)(model)
        meta = {"detector": detector, "classes": list(classes), "difficulty": None}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_final(path, model.state_dict(), meta)
    return True
