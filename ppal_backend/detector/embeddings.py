"""Feature vectors of detections and of whole images, from maps that the detector has just computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def same_width(levels: Sequence[torch.Tensor]) -> bool:
    """Whether all levels have one number of channels, so that their vectors can be compared."""
    return len({level.shape[-3] for level in levels}) == 1


def sample_embeddings(
    levels: Sequence[torch.Tensor], boxes_xyxy: torch.Tensor, level_indices: torch.Tensor, padded: tuple[int, int]
) -> torch.Tensor:
    """Take the feature vector at the centre of each box from the level its detection came from.

    Args:
        levels: Maps of one image, each ``[d, H_l, W_l]``, all of one width d.
        boxes_xyxy: ``[n, 4]`` in pixels of the network input.
        level_indices: ``[n]`` index into ``levels``.
        padded: Height and width of the padded network input that the maps cover.

    Returns:
        ``[n, d]`` bilinear samples; ``[0, d]`` without boxes.
    """
    height, width = padded
    centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    grid = centres / centres.new_tensor([width, height]) * 2 - 1
    sampled = levels[0].new_zeros(len(boxes_xyxy), levels[0].shape[0])
    for index, feature_map in enumerate(levels):
        here = level_indices == index
        if here.any():
            points = grid[here].to(feature_map.dtype)[None, None]
            taken = F.grid_sample(feature_map[None], points, mode="bilinear", align_corners=False)
            sampled[here] = taken[0, :, 0].T
    return sampled


def mean_over_image(feature_map: torch.Tensor, image: tuple[int, int], padded: tuple[int, int]) -> torch.Tensor:
    """Average a map over the part that the image covers, so that padding does not count.

    Args:
        feature_map: ``[d, H, W]``.
        image: Height and width of the resized image.
        padded: Height and width of the padded network input that the map covers.

    Returns:
        ``[d]``.
    """
    _, rows, columns = feature_map.shape
    used_rows = max(1, math.ceil(rows * image[0] / padded[0]))
    used_columns = max(1, math.ceil(columns * image[1] / padded[1]))
    return feature_map[:, :used_rows, :used_columns].mean(dim=(1, 2))


def image_features(
    backbone: Sequence[torch.Tensor], neck: Sequence[torch.Tensor], image: tuple[int, int], padded: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Describe a whole image.

    Args:
        backbone: Maps of the backbone for one image, each ``[d_l, H_l, W_l]``.
        neck: Maps of the neck.
        image: Height and width of the resized image.
        padded: Height and width of the padded network input.

    Returns:
        ``global``: last backbone map averaged; ``fpn``: every neck level averaged, joined.
    """
    return {
        "global": mean_over_image(backbone[-1], image, padded),
        "fpn": torch.cat([mean_over_image(level, image, padded) for level in neck]),
    }
