"""Feature vectors of detections and of whole images, from maps that the detector has just computed.

All functions take a whole batch at once: detections of several images lie one after the other, and ``images`` says
which map each belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_SIZE_PER_STRIDE = 224 / 16


def same_width(levels: Sequence[torch.Tensor]) -> bool:
    """Whether all levels have one number of channels, so that their vectors can be compared."""
    return len({level.shape[-3] for level in levels}) == 1


def sample_embeddings(
    levels: Sequence[torch.Tensor],
    images: torch.Tensor,
    boxes_xyxy: torch.Tensor,
    level_indices: torch.Tensor,
    padded: tuple[int, int],
) -> torch.Tensor:
    """Take the feature vector at the centre of each box from the level its detection came from.

    Args:
        levels: Maps of a batch, each ``[N, d, H_l, W_l]``, all of one width d.
        images: ``[n]`` index of each box's image in the batch.
        boxes_xyxy: ``[n, 4]`` in pixels of the network input.
        level_indices: ``[n]`` index into ``levels``; where it is negative, the mean over all levels is taken.
        padded: Height and width of the padded network input that the maps cover.

    Returns:
        ``[n, d]`` float32 bilinear samples, zero outside the maps; ``[0, d]`` without boxes.
    """
    height, width = padded
    centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]).float() / 2
    sampled = torch.zeros(len(boxes_xyxy), levels[0].shape[1], device=boxes_xyxy.device)
    for index, feature_map in enumerate(levels):
        here = ((level_indices == index) | (level_indices < 0)).nonzero().squeeze(1)
        if len(here):
            scale = centres.new_tensor([feature_map.shape[3] / width, feature_map.shape[2] / height])
            sampled[here] += _bilinear(feature_map, images[here], centres[here] * scale - 0.5)
    sampled[level_indices < 0] /= len(levels)
    return sampled


def levels_of_size(levels: Sequence[torch.Tensor], boxes_xyxy: torch.Tensor, padded: tuple[int, int]) -> torch.Tensor:
    """The pyramid level that a box of its size belongs to, whichever level found it.

    Args:
        levels: Maps of a batch, each ``[N, d, H_l, W_l]``, from fine to coarse.
        boxes_xyxy: ``[n, 4]`` in pixels of the network input.
        padded: Height and width of the padded network input that the maps cover.

    Returns:
        ``[n]`` int64 indices into ``levels``.

    Source: Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, Eq. 1: a box of 224 px belongs to
    the level of stride 16, and half the size to half the stride.
    """
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    size = sides.float().clamp(min=1e-6).prod(1).sqrt()
    finest = padded[1] / levels[0].shape[3]
    wanted = torch.floor(torch.log2(size / (_SIZE_PER_STRIDE * finest)) + 1e-6)
    return wanted.long().clamp(0, len(levels) - 1)


def _bilinear(feature_map: torch.Tensor, images: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """``[n, d]`` samples of ``[N, d, H, W]`` at ``[n, 2]`` points (x, y), whole numbers in the middle of cells."""
    rows, columns = feature_map.shape[2:]
    last = torch.tensor([columns - 1, rows - 1], device=points.device)
    corner = points.floor()
    fraction = points - corner
    total = torch.zeros(len(points), feature_map.shape[1], device=points.device)
    for right in (0, 1):
        for down in (0, 1):
            cell = corner.long() + torch.tensor([right, down], device=points.device)
            inside = ((cell >= 0) & (cell <= last)).all(1)
            across = fraction[:, 0] if right else 1 - fraction[:, 0]
            along = fraction[:, 1] if down else 1 - fraction[:, 1]
            cell = cell.clamp(min=0).minimum(last)
            values = feature_map[images, :, cell[:, 1], cell[:, 0]].float()
            total += (across * along * inside)[:, None] * values
    return total


def mean_over_images(
    feature_map: torch.Tensor, images: Sequence[tuple[int, int]], padded: tuple[int, int]
) -> torch.Tensor:
    """Average a map over the part that each image covers, so that padding does not count.

    Args:
        feature_map: ``[N, d, H, W]``.
        images: Height and width of each resized image.
        padded: Height and width of the padded network input that the map covers.

    Returns:
        ``[N, d]`` float32.
    """
    rows, columns = feature_map.shape[2:]
    used = [
        (max(1, math.ceil(rows * height / padded[0])), max(1, math.ceil(columns * width / padded[1])))
        for height, width in images
    ]
    if len(set(used)) == 1:
        return feature_map[:, :, : used[0][0], : used[0][1]].mean(dim=(2, 3), dtype=torch.float32)
    return torch.stack(
        [feature_map[i, :, :down, :right].mean(dim=(1, 2), dtype=torch.float32) for i, (down, right) in enumerate(used)]
    )


def image_features(
    backbone: Sequence[torch.Tensor],
    neck: Sequence[torch.Tensor],
    images: Sequence[tuple[int, int]],
    padded: tuple[int, int],
) -> dict[str, torch.Tensor]:
    """Describe whole images.

    Args:
        backbone: Maps of the backbone, each ``[N, d_l, H_l, W_l]``.
        neck: Maps of the neck.
        images: Height and width of each resized image.
        padded: Height and width of the padded network input.

    Returns:
        ``global``: last backbone map averaged; ``fpn``: every neck level averaged, joined. ``[N, d]`` each.
    """
    return {
        "global": mean_over_images(backbone[-1], images, padded),
        "fpn": torch.cat([mean_over_images(level, images, padded) for level in neck], dim=1),
    }
