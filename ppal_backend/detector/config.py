"""From a zoo entry to an mmengine Config: classes, pipelines, schedule and optimiser of one training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ppal_backend.detector.open_vocabulary import Prompts, is_open, set_prompts
from ppal_backend.detector.recipe import (
    Recipe,
    late_step,
    plain_dict,
    read_recipe,
    scaled_average,
    type_name,
    with_pipeline,
)
from ppal_backend.detector.runtime import stdout_aside
from ppal_backend.detector.train.semi import plain_model, semi_parts
from ppal_backend.detector.zoo import Schedule, ZooEntry, find_entry, load_zoo
from ppal_backend.errors import DetectorError

__all__ = ["ZooEntry", "build_config", "find_entry", "load_zoo", "prediction_steps", "read_config"]

FAULTS = (
    KeyError, IndexError, ValueError, TypeError, AttributeError, ImportError, RuntimeError, AssertionError,
)  # fmt: skip
"""What mmdetection raises of values that it has no use for: a config file is Python, and nothing says what they are."""

_WRONG = (*FAULTS, SyntaxError, NameError, LookupError, ArithmeticError)

_PRETRAINED = ("Pretrained", "PretrainedInit")  # as it is registered, and its class
_TEACHER = "teacher_"  # of mmdetection's distillation (LAD, LD): another model and its weights, fetched while building


def build_config(
    entry: ZooEntry,
    classes: Sequence[str],
    *,
    train_images: int | None = None,
    max_iterations: int | None = None,
    trained_backbone: bool = True,
    workers: int = 0,
    batch_size: int | None = None,
    prompts: Prompts | None = None,
) -> Config:
    """Build the configuration of one detector for one set of classes.

    Args:
        entry: Detector of the zoo.
        classes: Labels in the order of the class indices.
        train_images: Size of the training set; None leaves the training part out (inference only).
        max_iterations: Cap on the optimiser steps.
        trained_backbone: Whether trained weights will be put into the backbone. Without them frozen stages
            and frozen statistics would stay random for ever, so they are set free.
        workers: Data loader processes.
        batch_size: Images a step in place of the schedule's; see :func:`with_batch_size`.
        prompts: What a detector with an open vocabulary looks for, in the order of the classes.

    Returns:
        A Config with ``model``, ``trained_backbone``, ``train_pipeline`` and ``test_pipeline``, and for a training
        ``train_dataloader`` (without the data set, which the caller adds), ``train_cfg``, ``param_scheduler``,
        ``optim_wrapper`` and what the file's hooks mean (see :mod:`recipe`). Images
        without objects stay in the data (``filter_empty_gt=False``).

    Raises:
        DetectorError: No classes, repeated classes, the file has no model or pipeline, its model learns from another
            one, or prompts cannot be read.
    """
    labels = tuple(classes)
    if not labels or len(set(labels)) != len(labels):
        raise DetectorError(f"expected at least one class and no class twice, got {list(labels)}; fix the labels")
    base = read_config(entry.config)
    with wrong_values_told(entry.config):
        return _build(entry, labels, base, train_images, max_iterations, trained_backbone, workers, batch_size, prompts)


def _build(
    entry: ZooEntry, labels: tuple[str, ...], base: Config, train_images: int | None, max_iterations: int | None,
    trained_backbone: bool, workers: int, batch_size: int | None, prompts: Prompts | None,
) -> Config:  # fmt: skip
    if "model" not in base:
        raise DetectorError(f"expected a 'model' in {entry.config}, found none; use an mmdetection config file")
    model = plain_dict(base["model"])
    if teacher := next((key for key in model if key.startswith(_TEACHER)), None):
        raise DetectorError(
            f"expected a detector that learns from images alone in {entry.config}, got one with a {teacher}: the "
            f"weights of a trained teacher are not read here; use the config of the detector without distillation"
        )
    if train_images is None:
        model = plain_model(model)
    if not is_open(model):  # else no weight depends on the classes
        set_class_count(model, len(labels))
    strip_pretrained(model)
    if not trained_backbone:
        unfreeze(model)
    recipe = read_recipe(base)
    if not recipe.steps:
        raise DetectorError(f"expected a 'train_pipeline' in {entry.config}, found none; add one")
    test_steps = prediction_steps(base)
    if not test_steps:
        raise DetectorError(f"expected a 'test_pipeline' in {entry.config}, found none; add one")
    if prompts is not None:
        set_prompts(model, [recipe.steps, recipe.late_steps or [], test_steps], prompts)
    parts: dict[str, Any] = {
        "default_scope": "mmdet",
        "model": model,
        "trained_backbone": trained_backbone,
        "classes": labels,
        "train_pipeline": recipe.steps,
        "test_pipeline": test_steps,
        "filter_cfg": {"filter_empty_gt": False, "min_size": 0},
    }
    if train_images is not None:
        parts.update(semi_parts(base))
        parts.update(_training_part(base, entry.schedule, train_images, max_iterations, workers, batch_size))
        parts.update(_recipe_part(base, recipe, parts["train_cfg"]["max_iters"]))
    return Config(parts)


def read_config(path: Path) -> Config:
    """An mmdetection config file with everything that it inherits; the file runs as Python.

    Raises:
        DetectorError: It is missing or cannot be run.
    """
    try:
        with stdout_aside():
            return Config.fromfile(str(path))
    except (OSError, *_WRONG) as error:
        raise DetectorError(
            f"expected an mmdetection config file at {path}, which cannot be read ({error}); check the path, and that "
            f"every file it inherits from is there"
        ) from error


@contextmanager
def wrong_values_told(path: Path) -> Iterator[None]:
    """Turn what a config file's unusual values lead to into an error that people can act upon.

    Raises:
        DetectorError: In place of what Python raised.
    """
    try:
        yield
    except _WRONG as error:
        raise DetectorError(
            f"expected values as mmdetection's own config files have them in {path}, got others "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); correct them"
        ) from error


def prediction_steps(base: Config) -> list[dict[str, Any]]:
    """The test pipeline of a config file, also where its data set is wrapped in others; [] for none."""
    steps = base.get("test_pipeline")
    if steps is None:
        dataset = with_pipeline(base.get("test_dataloader", {}).get("dataset", {}))
        steps = dataset.get("pipeline") if dataset else None
    return [plain_dict(step) for step in steps or ()]


def set_class_count(node: Any, count: int) -> None:
    """Set ``num_classes`` in every head of a model configuration except region-proposal heads, in place."""

    def visit(item: dict[str, Any]) -> None:
        if "num_classes" in item and not type_name(item).startswith("RPN"):
            item["num_classes"] = count

    _walk(node, visit)


def strip_pretrained(node: Any) -> None:
    """Remove every instruction to fetch weights from a model configuration, in place.

    Weights are loaded by this package, which checks them first.
    """

    def visit(item: dict[str, Any]) -> None:
        item.pop("pretrained", None)
        init = item.get("init_cfg")
        if isinstance(init, Mapping) and type_name(init) in _PRETRAINED:
            item.pop("init_cfg")
        elif isinstance(init, list | tuple):
            kept = [part for part in init if type_name(part) not in _PRETRAINED]
            if len(kept) != len(init):
                item["init_cfg"] = kept or None

    _walk(node, visit)


def unfreeze(node: Any) -> None:
    """Let every part of a model configuration train, in place; for models that start from random weights.

    Every backbone freezes no stage by itself; the number that says so differs (EfficientNet refuses -1).
    """

    def visit(item: dict[str, Any]) -> None:
        item.pop("frozen_stages", None)
        if "norm_eval" in item:
            item["norm_eval"] = False
        norm = item.get("norm_cfg")
        if isinstance(norm, dict) and "requires_grad" in norm:
            norm["requires_grad"] = True

    _walk(node, visit)


def schedulers(schedule: Schedule, total: int) -> list[dict[str, Any]]:
    """Learning-rate schedulers by iteration: a linear warm-up, then the decay of the schedule.

    Args:
        schedule: Warm-up and kind of decay.
        total: Optimiser steps of the training, at least 1.
    """
    warmup = min(schedule.warmup_iterations, total // 5)
    parts: list[dict[str, Any]] = []
    if warmup:
        parts.append({"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "begin": 0, "end": warmup})
    if schedule.decay == "cosine" and total > warmup:
        parts.append(
            {
                "type": "CosineAnnealingLR",
                "T_max": total - warmup,
                "eta_min_ratio": 0.01,
                "by_epoch": False,
                "begin": warmup,
                "end": total,
            }
        )
    elif schedule.decay == "step":
        milestone = max(1, round(schedule.step_at * total))
        parts.append({"type": "MultiStepLR", "milestones": [milestone], "gamma": 0.1, "by_epoch": False})
    return parts


def with_batch_size(schedule: Schedule, batch_size: int) -> Schedule:
    """The same schedule for another batch size: learning rate in proportion, warm-up over as many images.

    The linear rule is the one that schedules are published with: a step of half as many images goes half as far, and
    there are twice as many, so that the path through the weights stays nearly the same.
    """
    share = batch_size / schedule.batch_size
    warmup = round(schedule.warmup_iterations / share)
    return replace(schedule, batch_size=batch_size, lr=schedule.lr * share, warmup_iterations=warmup)


def _training_part(
    base: Config, schedule: Schedule, images: int, max_iterations: int | None, workers: int, batch_size: int | None
) -> dict[str, Any]:
    if images < 1:
        raise DetectorError(f"expected at least one training image, got {images}; annotate images first")
    if "optim_wrapper" not in base:
        raise DetectorError("expected an 'optim_wrapper' in the detector's config file, found none; add one")
    total = schedule.iterations(images, max_iterations)
    if batch_size is not None:
        total = math.ceil(total * schedule.batch_size / batch_size)
        schedule = with_batch_size(schedule, batch_size)
    optim = base["optim_wrapper"].to_dict()
    optim["optimizer"]["lr"] = schedule.lr
    return {
        "train_dataloader": {
            "batch_size": schedule.batch_size,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "collate_fn": {"type": "pseudo_collate"},
        },
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": total, "val_interval": total + 1},
        "param_scheduler": schedulers(schedule, total),
        "optim_wrapper": optim,
    }


def _recipe_part(base: Config, recipe: Recipe, total: int) -> dict[str, Any]:
    """The hooks of the file as they stand, and what they mean in a training of ``total`` steps."""
    parts: dict[str, Any] = {}
    if base.get("custom_hooks"):
        parts["custom_hooks"] = [hook.to_dict() for hook in base["custom_hooks"]]
        parts["max_epochs"] = base.get("train_cfg", {}).get("max_epochs") or base.get("max_epochs")
    if recipe.late_steps is not None:
        parts["late_train_pipeline"] = recipe.late_steps
        parts["late_from_step"] = late_step(recipe, total)
        parts["late_l1"] = recipe.late_l1
    if recipe.average is not None:
        parts["weight_average"] = scaled_average(recipe.average, total)
    return parts


def _walk(node: Any, visit: Callable[[dict[str, Any]], None]) -> None:
    if isinstance(node, dict):
        visit(node)
        for value in node.values():
            _walk(value, visit)
    elif isinstance(node, list | tuple):
        for value in node:
            _walk(value, visit)
