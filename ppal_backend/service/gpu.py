"""Memory of the GPUs, read from the driver: the service itself never loads CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pynvml


@dataclass(frozen=True)
class GpuMemory:
    """One GPU of this machine, in bytes; whichever process uses it."""

    index: int
    used: int
    total: int


def gpu_memory(nvml: Any = pynvml) -> list[GpuMemory]:
    """Every GPU of this machine; none when there is no driver."""
    try:
        nvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        infos = [
            nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())
        ]
        return [GpuMemory(index, int(info.used), int(info.total)) for index, info in enumerate(infos)]
    except pynvml.NVMLError:  # a GPU that hangs must not take the other metrics along
        return []
    finally:
        nvml.nvmlShutdown()
