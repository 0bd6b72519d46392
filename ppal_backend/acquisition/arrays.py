"""Conversions between numpy arrays and tensors at the border of the package."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray | torch.Tensor


def as_tensor(value: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return ``value`` as a tensor (shares memory with a numpy array where it can)."""
    if isinstance(value, torch.Tensor):
        return value if dtype is None else value.to(dtype)
    array = np.asarray(value)
    if not array.flags.writeable:
        array = array.copy()
    return torch.as_tensor(array, dtype=dtype)


def like(value: torch.Tensor, example: Any) -> Any:
    """Return ``value`` in the kind of ``example``: a tensor for a tensor, a numpy array otherwise."""
    return value if isinstance(example, torch.Tensor) else value.detach().cpu().numpy()


def require_finite(value: torch.Tensor, name: str) -> None:
    """Raise ``ValueError`` when ``value`` holds NaN or infinity."""
    if not bool(torch.isfinite(value).all()):
        raise ValueError(
            f"expected finite {name} with shape {tuple(value.shape)}, got NaN or infinite values; repair them first"
        )


def require_range(value: torch.Tensor, name: str, low: float, high: float) -> None:
    """Raise ``ValueError`` when ``value`` is not finite or leaves [low, high]."""
    require_finite(value, name)
    if value.numel() and (float(value.min()) < low or float(value.max()) > high):
        raise ValueError(
            f"expected {name} in [{low}, {high}], got [{float(value.min())}, {float(value.max())}] with shape "
            f"{tuple(value.shape)}"
        )
