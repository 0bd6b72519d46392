"""mmengine's Runner as a training here needs it: quiet, on a chosen device, resuming from plain weights."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmcv.cnn.bricks import Swish
from mmengine.config import Config
from mmengine.dist import get_world_size, is_distributed
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ppal_backend.detector.data import MixedData, StreamSampler, TrainingData, collate
from ppal_backend.detector.weights import load_checkpoint
from ppal_backend.errors import DetectorError

LOG_NAME = "train.log"
_CHECKPOINTS_PER_TRAINING = 10
_FEWEST_STEPS_BETWEEN = 25

Initialise = Callable[[torch.nn.Module], None]


class TrainingRunner(Runner):
    """mmengine's Runner with a chosen device, a quiet log, our own initial weights and no environment probe."""

    def __init__(self, device: torch.device, initialise: Initialise, **kwargs: Any) -> None:
        self._device = device
        self._initialise = initialise
        super().__init__(**kwargs)

    def build_logger(self, log_level: Any = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        built = super().build_logger(log_level, os.path.join(self.work_dir, LOG_NAME), **kwargs)  # noqa: PTH118
        built.handlers = [item for item in built.handlers if isinstance(item, logging.FileHandler)]
        return built

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: torch.nn.Module) -> torch.nn.Module:
        placed = in_fastest_layout(model.to(self._device))
        return _shared(placed, self._device) if self.distributed else placed

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """mmengine runs compilers here to learn their versions; nobody reads that."""

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Resume from plain weights only; mmengine would fall back to unsafe unpickling, and print."""
        checkpoint = load_checkpoint(Path(filename))
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        inner = self.model.module if self.distributed else self.model
        inner.load_state_dict(checkpoint["state_dict"])
        self._has_loaded = True
        return checkpoint

    def dump_config(self) -> None:
        """The configuration is written once, by :func:`_run`."""

    def _init_model_weights(self) -> None:
        super()._init_model_weights()
        self._initialise(self.model.module if self.distributed else self.model)


def in_fastest_layout(model: torch.nn.Module) -> torch.nn.Module:
    """The model with channels last in memory, a sixth faster on CPUs, where its operators allow that, and torch's SiLU.

    Those of mmcv do not: its deformable convolutions refuse this layout, and RoIAlign silently takes it for the usual
    one. mmcv's ``Swish`` is the same function in two steps, each of which reads and writes everything.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is Swish:
                setattr(module, name, torch.nn.SiLU())
    if _has_mmcv_operators(model):
        return model
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@OPTIM_WRAPPERS.register_module()
class CpuHalfOptimWrapper(OptimWrapper):
    """mmengine's ``AmpOptimWrapper`` for CPUs, which that one refuses: bfloat16, whose range needs no scaled losses."""

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        """Forward and losses in bfloat16 where torch holds that to be safe."""
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield


def half_precision(model: torch.nn.Module, head_family: str, device: torch.device) -> str | None:
    """Name of the half precision to train in, None for full precision.

    bfloat16 where the GPU or CPU has instructions for it, since its range needs no scaled losses; on a GPU float16 with
    mmcv's operators, which have no bfloat16. DETR's relatives, whose matching compares costs, and detectors with a
    teacher stay in full precision. Losses are computed in full precision whatever the network runs in.
    """
    if device.type not in ("cuda", "cpu") or head_family in ("detr", "grounding") or hasattr(model, "teacher"):
        return None
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() and not _has_mmcv_operators(model)
        return "bfloat16" if fast else None
    if _has_mmcv_operators(model) or not torch.cuda.is_bf16_supported():
        return "float16"
    return "bfloat16"


def _has_mmcv_operators(model: torch.nn.Module) -> bool:
    return any(kind.__module__.startswith("mmcv.ops") for module in model.modules() for kind in type(module).__mro__)


def _shared(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model of one of several processes; on CUDA its batch statistics are those of the whole batch."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    wrapped: torch.nn.Module = MMDistributedDataParallel(
        module=model,
        device_ids=[device.index] if on_cuda else None,
        broadcast_buffers=False,
        find_unused_parameters=True,  # a batch without objects leaves parts of some heads alone
    )
    return wrapped


def remove_if_empty(folder: Path) -> None:
    """Remove the time-stamped folder that mmengine makes for itself, unless something was put there."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def build_runner(
    config: Config,
    data: TrainingData | MixedData,
    model: torch.nn.Module,
    *,
    device: torch.device,
    name: str,
    work_dir: Path,
    seed: int,
    resume_from: Path | None,
    initialise: Initialise,
    visualizer: dict[str, Any],
) -> TrainingRunner:
    """Put a training together; call it inside :func:`runtime.isolated` of the same ``name``.

    Args:
        config: What :func:`config.build_config` made for a training.
        data: Training stream.
        model: Detector, built.
        device: Where it trains.
        name: Unique name of the run.
        work_dir: Folder for checkpoints and log.
        seed: Seed of initialisation.
        resume_from: Step checkpoint to go on from, already checked, or None.
        initialise: Called with the detector after its random initialisation.
        visualizer: Configuration of mmengine's visualiser.
    """
    loading = config.train_dataloader
    loader = DataLoader(
        data,
        batch_size=loading.batch_size // get_world_size(),
        sampler=StreamSampler(len(data)),
        num_workers=loading.num_workers,
        persistent_workers=loading.persistent_workers,
        collate_fn=collate,
    )
    return TrainingRunner(
        device=device,
        initialise=initialise,
        model=model,
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(config.train_cfg),
        optim_wrapper=config.optim_wrapper,
        param_scheduler=config.param_scheduler.copy() or None,
        default_hooks=_default_hooks(config.train_cfg.max_iters, config.optim_wrapper.get("accumulative_counts", 1)),
        log_processor={"type": "LogProcessor", "by_epoch": False, "window_size": 20},
        visualizer=visualizer,
        load_from=None if resume_from is None else str(resume_from),
        resume=resume_from is not None,
        randomness={"seed": seed},
        launcher="pytorch" if is_distributed() else "none",  # the processes have met already
        default_scope="mmdet",
        experiment_name=name,
    )


def _default_hooks(total: int, accumulated: int) -> dict[str, Any]:
    """Checkpoints fall between updates of the weights: they hold no gradients that are still adding up."""
    interval = max(_FEWEST_STEPS_BETWEEN, total // _CHECKPOINTS_PER_TRAINING)
    interval = -(-interval // accumulated) * accumulated
    return {
        "logger": {"type": "LoggerHook", "interval": 50, "log_metric_by_epoch": False},
        # mmengine deletes the oldest file before it writes the newest: two, so that one is always whole
        "checkpoint": {
            "type": "CheckpointHook",
            "interval": interval,
            "by_epoch": False,
            "max_keep_ckpts": 2,
            "save_last": False,
        },
        "sampler_seed": None,
    }


TRACKING_FOLDER = "tracking"
TRACKERS: dict[str, dict[str, Any]] = {
    "tensorboard": {"type": "TensorboardVisBackend"},
    "mlflow": {
        "type": "MLflowVisBackend",
        "tracked_config_keys": ["optim_wrapper", "param_scheduler", "train_cfg", "train_dataloader"],
        "artifact_suffix": (".log",),
    },
}
"""Names of the trackers, which are also those of the packages they need, with mmengine's backends."""


def require_tracker(tracking: str | None) -> None:
    """Find out before anything is trained whether the tracker's package is there.

    Raises:
        DetectorError: It is not installed; the message says how to.
    """
    if tracking is not None and importlib.util.find_spec(tracking) is None:
        raise DetectorError(
            f"expected the package {tracking} for PPAL_TRACKING={tracking}, found none; "
            f"install it with: pip install {tracking}"
        )


def visualizer_config(tracking: str | None, work_dir: Path) -> dict[str, Any]:
    """Configuration of mmengine's visualiser.

    Args:
        tracking: Name of a tracker, or None for a visualiser that writes nothing.
        work_dir: Folder of the training; a tracker writes to ``tracking/`` in it.
    """
    if tracking is None:
        return {"type": "Visualizer", "vis_backends": []}
    return {
        "type": "Visualizer",
        "vis_backends": [dict(TRACKERS[tracking])],
        "save_dir": str(work_dir / TRACKING_FOLDER),
    }
