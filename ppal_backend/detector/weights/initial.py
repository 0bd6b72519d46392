"""Which weights a training starts from, how they get into the detector, and the detector as it is before any."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from ppal_backend.detector.config import build_config, set_class_count
from ppal_backend.detector.data import ImageRecord, build_pipeline, data_info, run_pipeline
from ppal_backend.detector.models import build_model
from ppal_backend.detector.open_vocabulary import Prompts, is_open
from ppal_backend.detector.runtime import isolated, pick_device
from ppal_backend.detector.train.semi import trained_part
from ppal_backend.detector.weights import (
    apply_weights,
    classes_of,
    complete_weights,
    has_folded_statistics,
    kind_of,
    load_any,
    save_final,
    state_dict_of,
)
from ppal_backend.detector.zoo import ZOO_FILE, ZooEntry, find_entry
from ppal_backend.detector.zoo.fetch import weights_file, weights_target
from ppal_backend.errors import CheckpointError

if TYPE_CHECKING:
    from ppal_backend.detector.train.request import TrainRequest
    from ppal_backend.detector.train.runner import Initialise


logger = logging.getLogger(__name__)

_MEASURED_IMAGES = 32

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class InitialWeights:
    """A checkpoint on disk.

    Args:
        path: The file.
        kind: ``backbone`` for a backbone alone; ``detector`` for what may be a whole detector, which shows when it is
            put into one.
        classes: What its head's rows stand for by the zoo, for a file that does not say; () for unknown.
        known: Label -> the classes among them that it starts from; used unless the file is a training of this project,
            whose rows go over by label.
        entry: Name of the zoo's entry that says so; "" for a file that was named instead.
    """

    path: Path
    kind: str
    classes: tuple[str, ...] = ()
    known: Mapping[str, Sequence[str]] = field(default_factory=dict)
    entry: str = ""


def starts_random(request: TrainRequest, entry: ZooEntry) -> bool:
    """Random weights are used where they were asked for, or where the zoo offers no others and says so."""
    nothing_else = request.init_weights is None and entry.weights is None
    return request.init_weights == "random" or (nothing_else and entry.from_scratch)


def find_weights(request: TrainRequest, entry: ZooEntry) -> InitialWeights | None:
    """Choose and fetch the initial weights, which :func:`initialiser` reads; None for a random start.

    Raises:
        WeightsUnavailable: They cannot be had.
    """
    if starts_random(request, entry):
        return None
    if request.init_weights is not None:
        return InitialWeights(Path(request.init_weights), "detector", (), request.known)
    path = weights_file(entry, request.weights_dir)
    assert entry.weights is not None, "else there is no file"
    return InitialWeights(path, entry.weights.kind, entry.weights.classes, request.known, entry.name)


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

    Raises:
        CheckpointError: The file is missing or damaged; when called, what comes back raises it for weights of another
            architecture.
    """
    if weights is None:
        return lambda model: None
    content = load_any(weights.path)
    tensors = state_dict_of(content, weights.path)
    meta = content.get("meta")
    as_is = meta.get("weights_classes") if isinstance(meta, dict) else None
    rows = tuple(as_is or classes_of(content) or weights.classes)
    if not as_is and isinstance(meta, dict) and "classes" in meta:  # a training of this package
        sources: Mapping[str, Sequence[str]] = {label: (label,) for label in classes if label in rows}
    else:
        sources = {
            label: names for label, names in weights.known.items() if label in classes and set(names) <= set(rows)
        }

    def initialise(model: torch.nn.Module) -> None:
        part = trained_part(model)
        fitting = tensors
        kind = "backbone" if weights.kind == "backbone" else kind_of(tensors, part)
        if kind == "backbone" != weights.kind and weights.entry:
            logger.warning("%s; they are used as that", _backbone_alone(weights.entry, weights.path))
        if kind == "detector" and rows and rows != tuple(classes) and not is_open(config.model):
            fresh, wider = part.state_dict(), shapes_of(config, len(classes) + 1)
            fitting = carry_classes(tensors, rows, classes, fresh, wider, sources)
            if sources and not holds_classes(tensors, len(rows), len(classes), fresh, wider):
                logger.warning(
                    "%s lists %d classes and its head has other rows: %s start with fresh ones",
                    weights.path, len(rows), ", ".join(sources),
                )  # fmt: skip
        apply_weights(part, fitting, kind, weights.path)
        if images and has_folded_statistics(tensors):
            measured = images[:_MEASURED_IMAGES]
            logger.warning(
                "%s holds batch norms folded into other layers: their statistics are measured again on %d images",
                weights.path, len(measured),
            )  # fmt: skip
            measure_statistics(part, config.test_pipeline, measured)

    return initialise


def _backbone_alone(entry: str, path: Path) -> str:
    """What is wrong with an entry of the zoo that calls a backbone's weights a detector's, and what to do."""
    return (
        f"expected weights of a whole detector in {path}, as the zoo says of {entry}, got a backbone's alone; set "
        f'kind = "backbone" and remove classes under [{entry}.weights] in {ZOO_FILE}'
    )


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


def shapes_of(config: Config, classes: int) -> dict[str, torch.Size]:
    """Shapes of the same detector for another number of classes."""
    other = config.copy()
    set_class_count(other.model, classes)
    with torch.random.fork_rng():
        part = trained_part(build_model(other))
    return {name: value.shape for name, value in part.state_dict().items()}


def holds_classes(
    tensors: Mapping[str, torch.Tensor], old: int, new: int, fresh: Mapping[str, torch.Tensor], wider: Shapes
) -> bool:
    """Whether weights have the rows of so many classes, wherever the detector has rows of classes.

    A file whose list of classes is not that of its head (``num_classes`` was never set) does not, nor do weights of
    the same detector with other anchors: such rows cannot be told apart and start afresh.

    Args:
        tensors: Weights by name.
        old: How many classes they list.
        new: Of the detector to compare with.
        fresh: Its weights by name.
        wider: Its shapes with one class more, by name.
    """
    return all(
        tuple(tensors[name].shape) == _expected(target.shape, wider[name], old, new)
        for name, target in fresh.items()
        if name in tensors and target.dim() > 0 and wider[name] != target.shape
    )


def _expected(shape: torch.Size, wider: torch.Size, old: int, new: int) -> tuple[int, ...] | None:
    """Shape with ``old`` classes of a tensor that has ``shape`` with ``new``; None where its rows are no classes'."""
    group = wider[0] - shape[0]
    background = shape[0] - group * new
    return (group * old + background, *shape[1:]) if group >= 1 and background in (0, group) else None


def carry_classes(
    tensors: Mapping[str, torch.Tensor],
    old: Sequence[str],
    new: Sequence[str],
    fresh: Mapping[str, torch.Tensor],
    wider: Shapes,
    sources: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, torch.Tensor]:
    """Rearrange the weights of a detector's head for other classes.

    Which rows belong to classes is read off the shapes of the same detector with one class more: the first dimension
    of such a tensor grows by ``a`` and holds ``a * C`` rows, or ``a * (C + 1)`` with a background in the last place.
    Rows of classification are ordered by anchor, then class; those of box regression (``fc_reg`` and the like) by
    class, then coordinate. A label that comes from several classes gets the mean of their rows. Rows of labels that the
    old detector did not know stay fresh.

    Args:
        tensors: Weights of the old detector by name.
        old: Its labels in the order of the class indices.
        new: Labels of the new detector, likewise.
        fresh: Weights of the new detector before training, by name.
        wider: Shapes of the new detector with one class more, by name.
        sources: New label -> the old ones it comes from; None for the one of the same name.

    Returns:
        ``tensors`` with those that depend on classes made to fit; where a shape is not as expected, the fresh ones.
    """
    carried = dict(tensors)
    if sources is None:
        sources = {label: (label,) for label in new if label in old}
    pairs = [
        (index, [old.index(name) for name in sources[label]]) for index, label in enumerate(new) if label in sources
    ]
    for name, target in fresh.items():
        if name in tensors and target.dim() > 0 and wider[name] != target.shape:
            carried[name] = _rows(name, tensors[name], (len(old), len(new)), pairs, target, wider[name])
    return carried


def _rows(
    name: str,
    source: torch.Tensor,
    counts: tuple[int, int],
    pairs: Sequence[tuple[int, Sequence[int]]],
    target: torch.Tensor,
    wider: torch.Size,
) -> torch.Tensor:
    """One tensor with its rows rearranged; ``counts`` are the numbers of old and new classes."""
    old, new = counts
    result = target.detach().cpu().clone()
    if tuple(source.shape) != _expected(target.shape, wider, old, new):
        return result
    group = wider[0] - target.shape[0]
    background = target.shape[0] - group * new
    by_class = name.rsplit(".", 2)[-2].endswith("reg")
    moves = [*pairs, (new, [old])] if background else pairs
    wide_new, wide_old = result.shape[0] // group, source.shape[0] // group
    for row in range(group):
        for to, come in moves:
            if by_class:
                result[to * group + row] = source[[index * group + row for index in come]].mean(0)
            else:
                result[row * wide_new + to] = source[[row * wide_old + index for index in come]].mean(0)
    return result


def save_as_is(
    detector: str,
    labels: Sequence[str],
    known: Mapping[str, Sequence[str]],
    path: Path,
    zoo_root: Path | None = None,
    weights_dir: Path | None = None,
    tile: int | None = None,
) -> None:
    """Write the zoo's detector, with all the classes it knows, as a checkpoint that predicts a project's labels.

    Loaded, it predicts as published; what it says of a class comes out under the first label that is known from it, and
    what it says of all other classes is left out (see :class:`~ppal_backend.detector.infer.relabelling.Relabelling`).

    Args:
        detector: Name in the zoo.
        labels: Labels of the project in the order of the class indices.
        known: Label -> classes of the weights that it is known from, at least one; or its prompt.
        path: Where to write; loads like a trained detector's.
        zoo_root: Folder of the zoo; None for the packaged one.
        weights_dir: Folder for downloaded weights; None for the default cache.
        tile: Side in pixels of the tiles that it looks through; None for whole images.

    Raises:
        UnknownDetector: The zoo has no such detector.
        WeightsUnavailable: The weights cannot be had, or have the wrong checksum.
        CheckpointError: They are damaged, unsafe, of another architecture, or know other classes than the zoo says.
    """
    entry = find_entry(detector, zoo_root)
    file = weights_file(entry, weights_dir)
    content = load_any(file)
    tensors = state_dict_of(content, file)
    rows = classes_of(content) or (entry.weights.classes if entry.weights is not None else ())
    prompts = Prompts.of(entry, labels, known, weights_dir)
    if prompts is not None:
        rows = tuple(labels)
    unknown = sorted({name for names in known.values() for name in names} - set(rows))
    if prompts is None and (unknown or not known):
        raise CheckpointError(
            f"expected the weights of {detector} in {file} to know {', '.join(unknown) or 'a label'}, got "
            f"{len(rows)} other classes; correct weights.classes of its zoo entry"
        )
    with isolated(f"ppal-{uuid.uuid4().hex}"):
        model = build_model(build_config(entry, rows, prompts=prompts))
        if kind_of(tensors, model) == "backbone":
            raise CheckpointError(_backbone_alone(entry.name, file))
        advice = "choose the right file, and correct weights.classes of its zoo entry"
        weights = complete_weights(model, tensors, f"{detector} with {len(rows)} classes", file, advice)
    meta = {
        "detector": detector,
        "classes": list(labels),
        "difficulty": None,
        **(
            {"weights_classes": list(rows), "known": {label: list(names) for label, names in known.items()}}
            if prompts is None
            else prompts.meta
        ),
        **({} if tile is None else {"slices": tile}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_final(path, weights, meta)


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
    weights = InitialWeights(weights_file(entry, weights_dir), entry.weights.kind, entry=entry.name)
    with isolated(f"ppal-{uuid.uuid4().hex}"):
        prompts = Prompts.of(entry, classes, {}, weights_dir)
        config = build_config(entry, classes, prompts=prompts)
        model = build_model(config)
        model.init_weights()  # what the weights do not hold; some of it would be unset memory
        initialiser(weights, config, classes)(model)
        meta = {"detector": detector, "classes": list(classes), "difficulty": None}
        meta.update({} if prompts is None else prompts.meta)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_final(path, model.state_dict(), meta)
    return True
