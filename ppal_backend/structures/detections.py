"""Predicted boxes of one image as a validated value object, and the overlap of boxes."""

from __future__ import annotations

import sys
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor

_PER_BOX = (
    "boxes_xyxy",
    "scores",
    "class_indices",
    "embeddings",
    "class_probs",
    "levels",
    "pre_nms_counts",
    "true_positive",
)
_RANK = {"boxes_xyxy": 2, "embeddings": 2, "class_probs": 2}
_SUM_TOLERANCE = 1e-2
_INFER_TOLERANCE = 1e-4


def is_tensor(value: object) -> bool:
    """Tell whether ``value`` is a torch tensor, without importing torch."""
    torch_module = sys.modules.get("torch")
    return torch_module is not None and isinstance(value, torch_module.Tensor)


def to_numpy(value: Any) -> np.ndarray:
    """Return ``value`` (array or tensor on any device) as a numpy array, without a copy where possible."""
    if is_tensor(value):
        return value.detach().cpu().numpy()
    return np.asarray(value)


def _is_integer(value: Any) -> bool:
    if is_tensor(value):
        import torch

        return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return bool(np.issubdtype(value.dtype, np.integer))


def _is_float(value: Any) -> bool:
    return bool(value.is_floating_point()) if is_tensor(value) else bool(np.issubdtype(value.dtype, np.floating))


def _is_finite(value: Any) -> bool:
    if is_tensor(value):
        return bool(value.isfinite().all())
    return bool(np.isfinite(value).all())


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections of one image after non-maximum suppression.

    All per-box fields are of one kind: numpy arrays, or tensors on one device. An image without detections
    has fields of length 0 (see :meth:`empty`).

    Args:
        image_id: Id of the image (the Label Studio task id).
        boxes_xyxy: ``[n, 4]`` float, pixels of the image as displayed.
        scores: ``[n]`` float in [0, 1], the detector's final confidence.
        class_indices: ``[n]`` integer in 0..C-1.
        embeddings: ``[n, d]`` float, one feature vector per box.
        class_probs: ``[n, k]`` float in [0, 1] or None. With ``softmax`` each row is a distribution over
            C + 1 classes, background last; without it a row holds C independent sigmoid probabilities.
        levels: ``[n]`` integer feature-pyramid level of each box, or None.
        softmax: Whether ``class_probs`` come from a softmax. None (the default) means: yes if every row sums to 1
            within 1e-4; after construction the field is always a bool. Adapters that know should say so.
        pre_nms_counts: ``[n]`` number of boxes before suppression that belong to each box, or None.
        true_positive: ``[n]`` bool, whether the box matches an annotated instance (labelled images only), or
            None where that is not known.
        image_size: Width and height of the image in pixels, or None where that is not known.

    Raises:
        ValueError: A shape, kind, dtype or range is wrong, or a value is NaN or infinite.
    """

    image_id: int
    boxes_xyxy: Array
    scores: Array
    class_indices: Array
    embeddings: Array
    class_probs: Array | None = None
    levels: Array | None = None
    softmax: bool | None = None
    pre_nms_counts: Array | None = None
    true_positive: Array | None = None
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.image_id, bool) or not isinstance(self.image_id, int | np.integer):
            raise ValueError(f"expected image_id to be an int, got {self.image_id!r}; pass the task id")
        object.__setattr__(self, "image_id", int(self.image_id))
        if self.image_size is not None:
            width, height = (int(v) for v in self.image_size)
            if width < 1 or height < 1:
                raise ValueError(f"expected image_size as width and height >= 1, got {self.image_size}")
            object.__setattr__(self, "image_size", (width, height))
        self._check_shapes()
        self._check_values()
        self._check_probabilities()

    def _check_shapes(self) -> None:
        tensor = is_tensor(self.scores)
        for name in _PER_BOX:
            value = getattr(self, name)
            if value is None:
                continue
            if is_tensor(value) != tensor or not (tensor or isinstance(value, np.ndarray)):
                raise ValueError(
                    f"expected every field of Detections to be of one kind (numpy array or tensor), got "
                    f"{type(value).__name__} for {name} beside {type(self.scores).__name__} for scores; "
                    f"convert them first"
                )
        if self.scores.ndim != 1:
            raise ValueError(f"expected scores with shape (n,), got {tuple(self.scores.shape)}; pass one per box")
        count = len(self.scores)
        for name in _PER_BOX:
            value = getattr(self, name)
            if value is None:
                continue
            wanted = {"boxes_xyxy": f"({count}, 4)", "embeddings": f"({count}, d)", "class_probs": f"({count}, k)"}
            good = value.ndim == _RANK.get(name, 1) and len(value) == count
            if not good or (name == "boxes_xyxy" and value.shape[1] != 4):
                raise ValueError(
                    f"expected {name} with shape {wanted.get(name, f'({count},)')}, got {tuple(value.shape)}; "
                    f"give one row per score"
                )

    def _check_values(self) -> None:
        for name in ("boxes_xyxy", "scores", "embeddings", "class_probs"):
            value = getattr(self, name)
            if value is None:
                continue
            if not _is_float(value):
                raise ValueError(f"expected {name} of a floating dtype, got {value.dtype}; convert it first")
            if not _is_finite(value):
                raise ValueError(
                    f"expected finite {name} with shape {tuple(value.shape)}, got NaN or infinite values for image "
                    f"{self.image_id}; drop or repair these boxes"
                )
        for name in ("class_indices", "levels", "pre_nms_counts"):
            value = getattr(self, name)
            if value is None:
                continue
            if not _is_integer(value):
                raise ValueError(f"expected {name} of an integer dtype, got {value.dtype}; convert it first")
            if len(value) and int(value.min()) < 0:
                raise ValueError(f"expected {name} >= 0, got {int(value.min())} for image {self.image_id}")
        if self.true_positive is not None and str(self.true_positive.dtype).removeprefix("torch.") != "bool":
            raise ValueError(f"expected true_positive of dtype bool, got {self.true_positive.dtype}")
        if len(self.scores) and not 0.0 <= float(self.scores.min()) <= float(self.scores.max()) <= 1.0:
            raise ValueError(
                f"expected scores in [0, 1], got [{float(self.scores.min())}, {float(self.scores.max())}] for image "
                f"{self.image_id}; pass probabilities, not logits"
            )

    def _check_probabilities(self) -> None:
        given = self.softmax
        object.__setattr__(self, "softmax", bool(given))
        if self.class_probs is None or not len(self.scores):
            return
        low, high = float(self.class_probs.min()), float(self.class_probs.max())
        if low < -1e-6 or high > 1.0 + 1e-6:
            raise ValueError(f"expected class_probs in [0, 1], got [{low}, {high}]; pass probabilities, not logits")
        off = float(abs(self.class_probs.sum(1) - 1.0).max())
        if given is None:
            object.__setattr__(self, "softmax", self.class_probs.shape[1] > 1 and off <= _INFER_TOLERANCE)
        classes = self.class_probs.shape[1]
        top = int(self.class_indices.max())
        if top >= classes:
            raise ValueError(
                f"expected class_indices below {classes} (class_probs has shape {tuple(self.class_probs.shape)}, "
                f"softmax={self.softmax}), got {top}; check the label space"
            )
        if given and off > _SUM_TOLERANCE:
            raise ValueError(f"expected softmax class_probs to sum to 1, got rows off by {off:.3g}; normalise them")

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls, image_id: int, embedding_dim: int = 0) -> Detections:
        """Return an image without detections (numpy, float32)."""
        return cls(
            image_id=image_id,
            boxes_xyxy=np.zeros((0, 4), np.float32),
            scores=np.zeros(0, np.float32),
            class_indices=np.zeros(0, np.int64),
            embeddings=np.zeros((0, embedding_dim), np.float32),
        )

    def filter(self, mask: Array) -> Detections:
        """Keep some boxes.

        Args:
            mask: ``[n]`` bool mask or integer indices, of the kind of the fields.

        Returns:
            A new object holding the chosen boxes in the order of ``mask``.

        Raises:
            ValueError: A bool mask has another length than the detections.
        """
        if str(mask.dtype).removeprefix("torch.") == "bool" and tuple(mask.shape) != (len(self),):
            raise ValueError(f"expected a mask with shape ({len(self)},), got {tuple(mask.shape)}")
        made = copy(self)  # some boxes of what is checked already need no check of their own
        for name in _PER_BOX:
            value = getattr(self, name)
            object.__setattr__(made, name, None if value is None else value[mask])
        return made

    def part(self, image_id: int, rows: slice, image_size: tuple[int, int] | None = None) -> Detections:
        """Some adjacent boxes as those of another image: views, not checked again."""
        made = object.__new__(Detections)
        for name in _PER_BOX:
            value = getattr(self, name)
            object.__setattr__(made, name, None if value is None else value[rows])
        object.__setattr__(made, "image_id", image_id)
        object.__setattr__(made, "softmax", self.softmax)
        object.__setattr__(made, "image_size", image_size)
        return made

    def to(self, device: torch.device | str) -> Detections:
        """Return the detections as tensors on ``device`` (numpy fields are converted)."""
        import torch

        moved: dict[str, Any] = {}
        for name in _PER_BOX:
            value = getattr(self, name)
            moved[name] = None if value is None else torch.as_tensor(value).to(device)
        return replace(self, **moved)

    def numpy(self) -> Detections:
        """Return the detections as numpy arrays in host memory."""
        if not is_tensor(self.scores):
            return self
        host: dict[str, Any] = {}
        for name in _PER_BOX:
            value = getattr(self, name)
            host[name] = None if value is None else to_numpy(value)
        return replace(self, **host)

    def __repr__(self) -> str:
        given = [f.name for f in fields(self) if f.name in _PER_BOX and getattr(self, f.name) is not None]
        return f"Detections(image_id={self.image_id}, n={len(self)}, fields={given})"


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every box with every other.

    Args:
        a: ``[n, 4]`` corners x1, y1, x2, y2, in any one unit.
        b: ``[m, 4]`` likewise.

    Returns:
        ``[n, m]`` in [0, 1]; 0 for boxes without area.
    """
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inner = np.clip(high - low, 0.0, None).prod(2)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0.0, None).prod(1) for boxes in (a, b)]
    return np.asarray(inner / np.maximum(areas[0][:, None] + areas[1][None, :] - inner, 1e-12))
