"""What else of mmdetection's own training recipes is followed: steps that combine images, and hooks that change things.

A recipe counts in epochs of COCO; a training here has a number of steps. What a hook does near the end of the recipe
happens at the same share of a training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppal_backend.errors import DetectorError

COMBINE = "CombineImages"
Steps = list[dict[str, Any]]

_COMBINING = ("Mosaic", "MixUp", "CachedMosaic", "CachedMixUp", "CopyPaste")
_ONLY_OF_CACHES = ("max_cached_images", "random_pop")
_NOT_NEEDED = {
    "CheckInvalidLossHook": "every loss is checked",
    "NumClassCheckHook": "the number of classes is set",
    "MeanTeacherHook": "teachers are moved",
    "SyncNormHook": "GPUs share their batch statistics",
    "SyncBuffersHook": "GPUs share their batch statistics",
}
_FASTEST_AVERAGE = 0.5
_HORIZONS = 5  # a training is at least so many times as long as the memory of averaged weights
_RAMPS = 20  # and so many times as long as the time in which that memory grows


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained beyond loss, optimiser and schedule.

    Args:
        steps: Training pipeline, with steps that combine images as ``CombineImages``.
        late_steps: Pipeline of the last part of a training, or None.
        late_from: Share of a training, in (0, 1), after which that part begins.
        late_l1: Whether YOLOX's head adds its L1 loss in that part.
        average: mmengine's ``EMAHook`` as configured, or None.
        left_out: Names of hooks of the config file that are neither followed nor needed.
    """

    steps: Steps
    late_steps: Steps | None = None
    late_from: float = 1.0
    late_l1: bool = False
    average: dict[str, Any] | None = None
    left_out: tuple[str, ...] = ()


def read_recipe(base: Mapping[str, Any]) -> Recipe:
    """The recipe in an mmdetection config file.

    Raises:
        DetectorError: There is no training pipeline, its first step reads no image, or a hook counts in epochs and
            the file does not say of how many.
    """
    steps = _training_steps(base)
    late_steps, late_from, late_l1, average = None, 1.0, False, None
    left_out = []
    for hook in map(plain_dict, base.get("custom_hooks") or ()):
        kind = type_name(hook)
        if kind == "EMAHook":
            average = {**hook, "type": "EMAHook"}
        elif kind == "PipelineSwitchHook":
            late_from = hook["switch_epoch"] / _epochs(base)
            late_steps = _combined(hook["switch_pipeline"])
        elif kind == "YOLOXModeSwitchHook":
            late_from = 1 - hook.get("num_last_epochs", 15) / _epochs(base)
            skipped = hook.get("skip_type_keys", ("Mosaic", "RandomAffine", "MixUp"))
            late_steps = [step for step in steps if type_name(step.get("step", step)) not in skipped]
            late_l1 = True
        elif kind not in _NOT_NEEDED:
            left_out.append(kind)
    if late_steps is not None and not 0 < late_from < 1:
        late_steps, late_l1 = None, False
    return Recipe(steps, late_steps, late_from, late_l1, average, tuple(left_out))


def type_name(item: Mapping[str, Any]) -> str:
    """The class that a dictionary of a config file means, without its module; "" for none.

    Config files name it as registered, import it themselves, or hold the path to it once such a file was stored.
    """
    kind = item.get("type") or ""
    return (kind if isinstance(kind, str) else str(getattr(kind, "__name__", kind))).rsplit(".", 1)[-1]


def plain_dict(step: Any) -> dict[str, Any]:
    """A dictionary of a config file without mmengine's own types."""
    return dict(step.to_dict()) if hasattr(step, "to_dict") else dict(step)


def with_pipeline(dataset: Any) -> Any:
    """Of data sets within one another the outermost that has a pipeline; the innermost where none has."""
    while dataset and "pipeline" not in dataset and "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset


def late_step(recipe: Recipe, total: int) -> int:
    """Step of a training of ``total`` steps from which its last part begins: at least one early, one late."""
    return min(max(1, round(recipe.late_from * total)), max(1, total - 1))


def average_momentum(published: float, total: int, horizons: int = _HORIZONS) -> float:
    """Weight of the newest step in a moving average of weights, for a training of ``total`` steps.

    Published momenta remember thousands of steps. A short training would end with an average that is still mostly the
    initial weights, so its memory is at most ``1 / horizons`` of the training.
    """
    return max(published, min(_FASTEST_AVERAGE, horizons / total))


def scaled_average(average: Mapping[str, Any], total: int) -> dict[str, Any]:
    """mmengine's ``EMAHook`` with a memory that suits a training of ``total`` steps."""
    momentum = average_momentum(float(average.get("momentum", 0.0002)), total)
    scaled = {**average, "momentum": momentum}
    if type_name({"type": average.get("ema_type", "")}) == "ExpMomentumEMA":
        scaled["gamma"] = max(1, min(int(average.get("gamma", 2000)), total // _RAMPS))
    return scaled


def device_optimizer(optimizer: Mapping[str, Any], device_type: str, half: str | None = None) -> dict[str, Any]:
    """An optimiser wrapper for this kind of device.

    Args:
        optimizer: As the config file has it. Mixed precision of its own is left alone on CUDA, and left out elsewhere.
        device_type: ``cuda``, ``cpu`` or another.
        half: ``bfloat16`` or ``float16`` to train in where the file says nothing; None for full precision.
    """
    plain = dict(optimizer)
    if device_type != "cuda" and type_name(plain) == "AmpOptimWrapper":
        plain["type"] = "OptimWrapper"
        for option in ("loss_scale", "dtype", "use_fsdp"):
            plain.pop(option, None)
    if half is None or type_name(plain) not in ("", "OptimWrapper"):
        return plain
    if device_type == "cuda":
        return {**plain, "type": "AmpOptimWrapper", "loss_scale": "dynamic", "dtype": half}
    return {**plain, "type": "CpuHalfOptimWrapper"}


def _training_steps(base: Mapping[str, Any]) -> Steps:
    """The whole pipeline from reading to packing; the outer one of ``MultiImageMixDataset`` goes on from the inner."""
    data = with_pipeline(base.get("train_dataloader", {}).get("dataset", {}))
    if data and type_name(data) == "MultiImageMixDataset":
        inner = with_pipeline(data["dataset"])
        if not inner.get("pipeline"):
            raise DetectorError(
                "expected a pipeline in the data set inside MultiImageMixDataset, found none; add one that begins "
                "with LoadImageFromFile and LoadAnnotations"
            )
        reading = _combined(inner["pipeline"])
        return [*reading, *_combined(data["pipeline"], reading)]
    steps = base.get("train_pipeline") or (data.get("pipeline") if data else None)
    return _combined(steps) if steps else []


def _combined(steps: Sequence[Any], source: Steps | None = None) -> Steps:
    """Steps with those that combine images rewritten.

    Args:
        steps: Steps of a config file.
        source: What reads the other images; all steps before the one in question when None.

    Raises:
        DetectorError: The first step combines images and nothing has read any.
    """
    done: Steps = []
    for item in steps:
        step = _positive(plain_dict(item))
        kind = type_name(step)
        if kind not in _COMBINING:
            done.append(step)
            continue
        reading = done if source is None else source
        if not reading:
            raise DetectorError(
                f"expected a training pipeline that begins with LoadImageFromFile and LoadAnnotations, got one whose "
                f"first step, {kind}, combines several images; put its data set into a MultiImageMixDataset, or these "
                f"two steps before it"
            )
        options = {key: value for key, value in step.items() if key not in _ONLY_OF_CACHES}
        prob = float(options.pop("prob", 1.0))
        options["type"] = kind.removeprefix("Cached")
        if kind == "CopyPaste":
            options["paste_by_box"] = True  # there are no masks
        done.append({"type": COMBINE, "step": options, "source": list(reading), "prob": prob})
    return done


def _positive(step: dict[str, Any]) -> dict[str, Any]:
    """The step, without leave to drop an image: one without objects, or a crop without any, is a true negative."""
    kind = type_name(step)
    if kind == "RandomCrop":
        return {**step, "allow_negative_crop": True}
    if kind == "FilterAnnotations":
        return {**step, "keep_empty": False}  # mmdetection's name says the opposite: False keeps the image
    return step


def _epochs(base: Mapping[str, Any]) -> int:
    epochs = base.get("train_cfg", {}).get("max_epochs") or base.get("max_epochs")
    if not epochs:
        raise DetectorError(
            "expected train_cfg.max_epochs beside hooks that count in epochs (PipelineSwitchHook or "
            "YOLOXModeSwitchHook), found none; add it"
        )
    return int(epochs)
