"""Training difficulty of classes: Eq. 1 to 4 of Yang et al., "Plug and Play Active Learning", CVPR 2024."""

from __future__ import annotations

import math
from typing import Any

import torch

from ppal_backend.acquisition.arrays import Array, as_tensor, like, require_range

_ABSENT = ("keep", "drift")


def training_difficulty(p: Array, iou: Array, xi: float = 0.6) -> Any:
    """Difficulty of positive predictions, q = 1 - p^xi * iou^(1 - xi).

    Args:
        p: ``[n]`` probability in [0, 1] that the detector gives the assigned ground-truth class.
        iou: ``[n]`` overlap in [0, 1] of the decoded predicted box with its ground-truth box.
        xi: Share of classification against localisation, in [0, 1].

    Returns:
        ``[n]`` difficulties in [0, 1], of the kind of ``p``; empty for empty input.

    Raises:
        ValueError: Shapes differ, a value leaves [0, 1], or is NaN.

    Source: Eq. 1.
    """
    if not 0.0 <= xi <= 1.0:
        raise ValueError(f"expected xi in [0, 1], got {xi}")
    probability, overlap = as_tensor(p), as_tensor(iou)
    if probability.shape != overlap.shape:
        raise ValueError(
            f"expected p and iou of one shape, got {tuple(probability.shape)} and {tuple(overlap.shape)}; "
            f"give one overlap per prediction"
        )
    require_range(probability, "p", 0.0, 1.0)
    require_range(overlap, "iou", 0.0, 1.0)
    return like(1.0 - probability.pow(xi) * overlap.pow(1.0 - xi), p)


def difficulty_coefficients(difficulty: Array, alpha: float = 0.3, beta: float = 0.2) -> Any:
    """Weights of classes, w = 1 + alpha * beta * log(1 + gamma * d) with gamma = e^(1/alpha) - 1.

    Args:
        difficulty: ``[C]`` class difficulties in [0, 1].
        alpha: How fast weights grow with difficulty, > 0.
        beta: Upper bound of the growth, >= 0.

    Returns:
        ``[C]`` weights in [1, 1 + beta], exactly 1 at difficulty 0 and 1 + beta at difficulty 1, of the kind of
        ``difficulty``.

    Raises:
        ValueError: A difficulty leaves [0, 1] or is NaN; alpha is not positive; beta is negative.

    Source: Eq. 4.
    """
    if not alpha > 0 or not beta >= 0:
        raise ValueError(f"expected alpha > 0 and beta >= 0, got alpha={alpha}, beta={beta}")
    values = as_tensor(difficulty)
    values = values if values.is_floating_point() else values.double()
    require_range(values, "difficulty", 0.0, 1.0)
    weights = 1.0 + alpha * beta * torch.log1p(math.expm1(1.0 / alpha) * values.double())
    weights = torch.where(values == 1, 1.0 + beta, weights.clamp(1.0, 1.0 + beta))
    return like(weights.to(values.dtype), difficulty)


class DifficultyEMA:
    """Moving average of class difficulties over training steps.

    A class seen in a step moves by d <- m * d + (1 - m) * mean(q), and its momentum m returns to the base. A class
    that is absent keeps its difficulty, and its momentum is multiplied by the base, so that its next update weighs
    more.

    With ``absent="drift"`` it is as in the authors' code, not as Eq. 2 and 3 say: an absent class is averaged with 1,
    and a class counts as seen only where its mean quality 1 - mean(q) is above 0, so that the momentum of one whose
    boxes were all missed goes on falling. Left out is the 1e-5 that they add to the number of predictions.

    Args:
        num_classes: C >= 1.
        momentum: Base momentum m0 in [0, 1].
        absent: ``"keep"`` or ``"drift"``.

    Raises:
        ValueError: An argument is out of range.

    Source: Eq. 2 and 3.
    """

    def __init__(self, num_classes: int, momentum: float = 0.99, absent: str = "keep") -> None:
        if num_classes < 1:
            raise ValueError(f"expected num_classes >= 1, got {num_classes}")
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"expected momentum in [0, 1], got {momentum}")
        if absent not in _ABSENT:
            raise ValueError(f"expected absent to be one of {_ABSENT}, got {absent!r}")
        self.num_classes = num_classes
        self.base_momentum = momentum
        self.absent = absent
        self._difficulty = torch.ones(num_classes, dtype=torch.float64)
        self._momentum = torch.full((num_classes,), momentum, dtype=torch.float64)

    @property
    def difficulty(self) -> torch.Tensor:
        """``[C]`` float64 difficulties in [0, 1] (a copy, on the CPU)."""
        return self._difficulty.clone()

    @property
    def momentum(self) -> torch.Tensor:
        """``[C]`` float64 momenta (a copy, on the CPU)."""
        return self._momentum.clone()

    def update(self, class_indices: Array, q: Array) -> None:
        """Take in the positive predictions of one training step.

        Args:
            class_indices: ``[n]`` integer ground-truth classes, 0..C-1.
            q: ``[n]`` difficulties in [0, 1] (Eq. 1). Both may be empty: then every class is absent.

        Raises:
            ValueError: Lengths differ, a class is out of range, or a difficulty leaves [0, 1].
        """
        sums, counts = self.sums_and_counts(class_indices, q)
        self.update_from_sums(sums, counts)

    def sums_and_counts(self, class_indices: Array, q: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum difficulties and count predictions per class, for example to all-reduce over processes.

        Returns:
            ``[C]`` float64 sums and ``[C]`` float64 counts, on the CPU.
        """
        classes, values = as_tensor(class_indices), as_tensor(q)
        if classes.ndim != 1 or classes.shape != values.shape:
            raise ValueError(
                f"expected class_indices and q with shape (n,), got {tuple(classes.shape)} and {tuple(values.shape)}"
            )
        classes = classes.detach().cpu().long()
        values = values.detach().cpu().double()
        require_range(values, "q", 0.0, 1.0)
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_classes:
            raise ValueError(
                f"expected class_indices in 0..{self.num_classes - 1}, got "
                f"{int(classes.min())}..{int(classes.max())}; check the label space"
            )
        sums = torch.zeros(self.num_classes, dtype=torch.float64).index_add_(0, classes, values)
        counts = torch.bincount(classes, minlength=self.num_classes).double()
        return sums, counts

    def update_from_sums(self, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Take in one step from the ``[C]`` sums and counts of :meth:`sums_and_counts`."""
        for name, value in (("sums", sums), ("counts", counts)):
            if tuple(value.shape) != (self.num_classes,):
                raise ValueError(f"expected {name} with shape ({self.num_classes},), got {tuple(value.shape)}")
        sums, counts = sums.detach().cpu().double(), counts.detach().cpu().double()
        seen = counts > 0
        mean = torch.where(seen, sums / counts.clamp(min=1.0), torch.ones_like(sums))
        moved = self._momentum * self._difficulty + (1.0 - self._momentum) * mean
        target = moved if self.absent == "drift" else torch.where(seen, moved, self._difficulty)
        self._difficulty = target.clamp(0.0, 1.0)
        decayed = self.base_momentum * self._momentum
        if self.absent == "drift":
            seen &= mean < 1.0
        self._momentum = torch.where(seen, torch.full_like(decayed, self.base_momentum), decayed)

    def state_dict(self) -> dict[str, Any]:
        """Return difficulties and momenta (copies) with the settings they belong to."""
        return {
            "difficulty": self._difficulty.clone(),
            "momentum": self._momentum.clone(),
            "base_momentum": self.base_momentum,
            "absent": self.absent,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: The state belongs to another number of classes or holds values out of range.
        """
        loaded = {}
        for name in ("difficulty", "momentum"):
            value = as_tensor(state[name], torch.float64).detach().cpu().clone()
            if tuple(value.shape) != (self.num_classes,):
                raise ValueError(
                    f"expected {name} with shape ({self.num_classes},), got {tuple(value.shape)}; "
                    f"the state belongs to another set of classes"
                )
            require_range(value, name, 0.0, 1.0)
            loaded[name] = value
        self._difficulty, self._momentum = loaded["difficulty"], loaded["momentum"]
        self.base_momentum = float(state.get("base_momentum", self.base_momentum))
        self.absent = str(state.get("absent", self.absent))
