"""Initial weights from a detector of other classes: what it knew of a class goes over to the class of that label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Shapes = Mapping[str, torch.Size]


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
