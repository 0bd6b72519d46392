"""Whether detectors can run here: torch, the device, and mmcv's compiled operators on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppal_backend.errors import DetectorError


@dataclass(frozen=True)
class Environment:
    """What a detector would run on; ``device_name`` is the GPU's name, or ``CPU``."""

    torch: str
    device: str
    device_name: str


def check_environment(device: str) -> Environment:
    """Run one of mmcv's compiled operators on the device.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        DetectorError: There is no such GPU, or the operators are missing there; the text says what to install.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise DetectorError(
            f"expected a GPU for DEVICE={device}, but torch {torch.__version__} finds none; "
            "check nvidia-smi and that torch is built for CUDA, or set DEVICE=cpu"
        )
    try:
        from mmcv.ops import nms

        boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 9.0]], device=chosen)
        kept, _ = nms(boxes, torch.tensor([0.9, 0.8], device=chosen), 0.5)
    except (ImportError, RuntimeError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DetectorError(
            f"mmcv's compiled operators do not run on {chosen} ({first}); run make setup again, with FORCE_CUDA=1 on a "
            "machine with a GPU"
        ) from error
    if len(kept) != 1:
        raise DetectorError(f"mmcv's operators give wrong results on {chosen}; compile them for this torch: make setup")
    name = torch.cuda.get_device_name(chosen) if chosen.startswith("cuda") else "CPU"
    return Environment(torch.__version__, chosen, name)
