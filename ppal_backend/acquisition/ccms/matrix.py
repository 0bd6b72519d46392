"""Category Conditioned Matching Similarity of images (Eq. 6 and 7), as a matrix or row by row.

Both forms work class by class on tiles (see :mod:`ppal_backend.acquisition.ccms.tiles`): one matrix product gives the
object similarities of two tiles, whose maxima and score-weighted sums are added to the image pairs they belong to.
Nothing of the size of all object pairs is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from ppal_backend.acquisition.arrays import as_tensor
from ppal_backend.acquisition.ccms.objects import PackedObjects, pack_objects
from ppal_backend.acquisition.ccms.tiles import (
    Tile,
    TilePlan,
    Workspace,
    class_rows,
    gather_tile,
    in_order,
    multiply,
    plan_tiles,
    reduce_product,
    tile_weights,
)
from ppal_backend.acquisition.uncertainty import MAX_DETECTIONS
from ppal_backend.structures import Detections
from ppal_backend.structures.detections import is_tensor

_GIB = float(1 << 30)
_CPU_TILE = 768
_GPU_TILE = 8192
_GPU_SHARE = 0.5  # of the device's free memory, for tiles and their copies
_MIN_TILE = 64
_CPU_CELLS = 1 << 18
_GPU_CELLS = 1 << 24
_LAZY_CPU_TILE = 2048


def similarity_matrix(
    detections: Sequence[Detections],
    score_threshold: float = 0.05,
    device: torch.device | str | None = None,
    memory_gib: float | None = None,
    *,
    metric: str = "auto",
    max_detections: int = MAX_DETECTIONS,
) -> Any:
    """Similarity of every pair of images.

    S(o, O_b) is the largest cosine + 1 of object o with a same-class object of image b, 0 without one; S'(a, b) its
    mean over a's objects weighted by their scores; S the mean of both directions. For ``metric="kl"`` (the paper's
    choice for SSD) cosine + 1 is replaced by 2 * exp(-(KL(p|q) + KL(q|p)) / 2) of probability vectors, which is 2
    for equal vectors and falls to 0.

    Args:
        detections: N images. Their order does not matter for any pair, nor does the order of detections inside an
            image.
        score_threshold: Lowest score that counts, in [0, 1].
        device: Where to compute; default: where the input is.
        memory_gib: Bound on what this call allocates (result, packed objects, scratch); None for no bound.
        metric: ``cosine`` of embeddings, ``kl`` of ``class_probs``; ``auto`` takes cosine where embeddings are
            given (d > 0).
        max_detections: Objects per image at most, the highest-scored.

    Returns:
        ``[N, N]`` float32 in [0, 2], symmetric, diagonal exactly 2; a tensor on ``device`` when the input holds
        tensors, else a numpy array. An image without valid detections has 0 with every other image. ``[0, 0]`` for
        no images. A zero embedding has cosine 0 with everything.

    Raises:
        ValueError: Images differ in embedding width, an argument is out of range, or ``memory_gib`` cannot hold the
            result (use :class:`LazySimilarity` then).

    Source: Eq. 6 and 7.
    """
    _check_result_fits(len(detections), memory_gib)
    objects = pack_objects(detections, score_threshold, device, metric, max_detections)
    n = objects.num_images
    result = torch.zeros(n, n, device=objects.left.device)
    side = _tile_side(objects, memory_gib, n, _CPU_TILE)

    def panel(unit: tuple[Tile, list[Tile]], space: Workspace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return _products(*unit, objects.metric, space)

    cells = float((torch.bincount(objects.classes).double() ** 2).sum()) / 2
    for rows, columns, values in in_order(panel, _rows_of_tiles(objects, side), result.device, cells):
        _scatter_add(result, rows, columns, values)
    _symmetrise(result)
    tensor_in = bool(detections) and is_tensor(detections[0].scores)
    return result if tensor_in else result.cpu().numpy()


def _rows_of_tiles(objects: PackedObjects, side: int) -> Iterator[tuple[Tile, list[Tile]]]:
    """Every tile with the tiles of its class from itself on: the upper triangle, class by class."""
    for _, rows in class_rows(objects):
        tiles = [gather_tile(objects, plan) for plan in plan_tiles(objects, rows, side)]
        yield from ((tile, tiles[k:]) for k, tile in enumerate(tiles))


def _products(
    a: Tile, others: list[Tile], metric: str, space: Workspace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The similarity of tile ``a`` with itself (half, as it is counted twice) and with later tiles.

    The shares of all tiles are collected side by side, so that each row of the result is visited once.

    Returns:
        Images of the rows, images of the columns, and the shares.
    """
    columns = torch.cat([b.images for b in others])
    panel = space.get("panel", len(a.images), len(columns))
    start = 0
    for b in others:
        part = panel[:, start : start + len(b.images)]
        reduce_product(multiply(a.left, b.right, metric, space), a.weights, b.weights, space, part)
        if b is a:
            part.mul_(0.5)
        start += len(b.images)
    return a.images, columns, panel


def _scatter_add(result: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> None:
    """Add ``values`` to the cells of ``rows`` x ``columns`` (each distinct), a few rows at a time."""
    flat = result.view(-1)
    cells = torch.int32 if flat.numel() < 2**31 else torch.int64
    base, columns = (rows * result.shape[1]).to(cells), columns.to(cells)
    step = max(1, (_GPU_CELLS if result.is_cuda else _CPU_CELLS) // max(1, len(columns)))
    for start in range(0, len(rows), step):
        index = base[start : start + step, None] + columns
        flat.index_add_(0, index.view(-1), values[start : start + step].reshape(-1))


def _symmetrise(result: torch.Tensor) -> None:
    """Replace the matrix by itself plus its transpose, in place, within [0, 2], with diagonal 2."""
    n, block = len(result), 512
    for i in range(0, n, block):
        for j in range(i, n, block):
            upper, lower = result[i : i + block, j : j + block], result[j : j + block, i : i + block]
            both = (upper + lower.T).clamp_(0.0, 2.0)
            upper.copy_(both)
            lower.copy_(both.T)
    result.fill_diagonal_(2.0)


def _check_result_fits(n: int, memory_gib: float | None) -> None:
    if memory_gib is None:
        return
    if not memory_gib > 0:
        raise ValueError(f"expected memory_gib > 0, got {memory_gib}")
    needed = 4.0 * n * n / _GIB
    if needed > memory_gib:
        raise ValueError(
            f"expected memory_gib >= {needed:.3f} for a matrix with shape ({n}, {n}), got {memory_gib}; "
            f"use LazySimilarity, which never holds the matrix"
        )


def _tile_side(objects: PackedObjects, memory_gib: float | None, n: int, cpu_side: int) -> int:
    """Objects per tile side: what the cache (or the GPU) likes, less where the memory bound or the GPU's asks for it.

    Scratch is at most about 4 float32 and 1 int64 matrices of one tile product, for each product under way.
    """
    on_gpu = objects.left.is_cuda
    side = _GPU_TILE if on_gpu else cpu_side
    packed = 2 * 4 * objects.left.numel() * (1 if objects.right is objects.left else 2)
    if memory_gib is not None:
        free = memory_gib * _GIB - 4.0 * n * n - packed
    elif on_gpu:
        free = _GPU_SHARE * torch.cuda.mem_get_info(objects.left.device)[0] - packed
    else:
        return side
    at_once = 1 if on_gpu or torch.get_num_threads() == 1 else torch.get_num_threads() + 1
    while side > _MIN_TILE and 24.0 * side * side * at_once > free:
        side //= 2
    return side


class Similarity(Protocol):
    """Similarities of N images, computed for the rows or blocks asked for; see :class:`LazySimilarity`."""

    device: torch.device

    def __len__(self) -> int:
        """N."""

    def rows(self, indices: Any) -> torch.Tensor:
        """Similarity ``[k, N]`` of some images with all."""

    def against(self, others: PackedObjects) -> torch.Tensor:
        """Similarity ``[k, N]`` of k images from elsewhere with all."""

    def panel(self, columns: Any) -> Callable[[Any], torch.Tensor]:
        """Function of some images that gives their similarity with those in ``columns``."""

    def block(self, rows: Any, columns: Any) -> torch.Tensor:
        """Similarity ``[k, l]`` of some images with some others."""


MakeSimilarity = Callable[..., Similarity]
"""Makes similarities from the arguments of :class:`LazySimilarity`."""


class LazySimilarity:
    """The similarity of :func:`similarity_matrix`, computed for the rows or blocks asked for.

    Holds the packed objects once (M objects x d floats), never an N x N matrix.

    Args:
        detections: N images.
        score_threshold: As for :func:`similarity_matrix`; so are the other arguments.
        device: Where to compute.
        memory_gib: Bound on scratch memory for each call beside its result; None for the default tile size.
        metric: ``auto``, ``cosine`` or ``kl``.
        max_detections: Objects per image at most.

    Raises:
        ValueError: As for :func:`similarity_matrix`.
    """

    def __init__(
        self,
        detections: Sequence[Detections],
        score_threshold: float = 0.05,
        device: torch.device | str | None = None,
        memory_gib: float | None = None,
        *,
        metric: str = "auto",
        max_detections: int = MAX_DETECTIONS,
    ) -> None:
        if memory_gib is not None and not memory_gib > 0:
            raise ValueError(f"expected memory_gib > 0, got {memory_gib}")
        self._hold(pack_objects(detections, score_threshold, device, metric, max_detections), memory_gib)

    @classmethod
    def of(cls, packed: PackedObjects, memory_gib: float | None = None) -> LazySimilarity:
        """The same from objects that are packed already."""
        made = cls.__new__(cls)
        made._hold(packed, memory_gib)
        return made

    def _hold(self, packed: PackedObjects, memory_gib: float | None) -> None:
        self.device = packed.left.device
        self._side = _tile_side(packed, memory_gib, 0, _LAZY_CPU_TILE)
        counts = torch.bincount(packed.images, minlength=packed.num_images)
        self._starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        self._objects, self._tiles = _arrange(packed, self._side)

    def __len__(self) -> int:
        return self._objects.num_images

    def rows(self, indices: Any) -> torch.Tensor:
        """Similarity of some images with all images.

        Args:
            indices: ``[k]`` distinct positions 0..N-1.

        Returns:
            ``[k, N]`` float32 on the object's device; ``[0, N]`` for no indices.
        """
        index = self._index(indices)
        result = torch.zeros(len(index), len(self), device=self.device)
        self._add(result, self._row_tiles(index), self._tiles)
        result.clamp_(0.0, 2.0)
        result[torch.arange(len(index)), index] = 2.0
        return result

    def against(self, others: PackedObjects) -> torch.Tensor:
        """Similarity of images from elsewhere with all of these; none of them is taken for one of these.

        Args:
            others: k images, packed on the same device with the same metric.

        Returns:
            ``[k, N]`` float32 on the object's device.

        Raises:
            ValueError: Their features are of another width.
        """
        mine, theirs = self._objects.left.shape[1], others.left.shape[1]
        if len(self._objects) and len(others) and mine != theirs:
            raise ValueError(
                f"expected features of width {mine} for all images, got {theirs}; take both from one detector"
            )
        result = torch.zeros(others.num_images, len(self), device=self.device)
        tiles = {
            cls: [gather_tile(others, plan) for plan in plan_tiles(others, rows, self._side)]
            for cls, rows in class_rows(others)
        }
        self._add(result, tiles, self._tiles)
        return result.clamp_(0.0, 2.0)

    def block(self, rows: Any, columns: Any) -> torch.Tensor:
        """Similarity of some images with some others.

        Args:
            rows: ``[k]`` distinct positions.
            columns: ``[l]`` distinct positions.

        Returns:
            ``[k, l]`` float32; 2 where row and column are the same image.
        """
        return self.panel(columns)(rows)

    def panel(self, columns: Any) -> Callable[[Any], torch.Tensor]:
        """Prepare some columns for many calls: ``panel(columns)(rows)`` equals ``block(rows, columns)``.

        Holds a copy of the features of the images in ``columns``.
        """
        others = self._index(columns)
        column_tiles = self._row_tiles(others)

        def block(rows: Any) -> torch.Tensor:
            index = self._index(rows)
            result = torch.zeros(len(index), len(others), device=self.device)
            same = len(index) == len(others) and bool((index == others).all())
            self._add(result, column_tiles if same else self._row_tiles(index), column_tiles)
            result.clamp_(0.0, 2.0)
            return result.masked_fill_((index[:, None] == others[None, :]).to(self.device), 2.0)

        return block

    def _index(self, indices: Any) -> torch.Tensor:
        index = as_tensor(indices).long().cpu().reshape(-1)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise ValueError(f"expected positions in 0..{len(self) - 1}, got {int(index.min())}..{int(index.max())}")
        return index

    def _row_tiles(self, index: torch.Tensor) -> dict[int, list[Tile]]:
        """Tiles of some images by class; their image positions count within ``index``."""
        lengths = self._starts[index + 1] - self._starts[index]
        firsts = torch.repeat_interleave(self._starts[index] - (lengths.cumsum(0) - lengths), lengths)
        subset = firsts + torch.arange(len(firsts))
        local = torch.zeros(len(self), dtype=torch.long)
        local[index] = torch.arange(len(index))
        tiles = {}
        for cls, rows in class_rows(self._objects, subset):
            plans = plan_tiles(self._objects, rows, self._side)
            tiles[cls] = [gather_tile(self._objects, replace(p, images=local[p.images])) for p in plans]
        return tiles

    def _add(self, result: torch.Tensor, tiles: dict[int, list[Tile]], others: dict[int, list[Tile]]) -> None:
        """Add all classes that both have: one product per group of row tiles and column tile."""
        common = [cls for cls in tiles if cls in others]

        def pairs() -> Iterator[tuple[list[Tile], torch.Tensor, Tile]]:
            for cls in common:
                for group in _groups(tiles[cls], self._side):
                    left = group[0].left if len(group) == 1 else torch.cat([t.left for t in group])
                    yield from ((group, left, b) for b in others[cls])

        def shares(
            unit: tuple[list[Tile], torch.Tensor, Tile], space: Workspace
        ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
            group, left, b = unit
            parts = multiply(left, b.right, self._objects.metric, space).split([len(t.left) for t in group])
            found = []
            for k, (a, part) in enumerate(zip(group, parts, strict=True)):
                out = space.get(f"share {k}", len(a.images), len(b.images))
                found.append((a.images, b.images, reduce_product(part, a.weights, b.weights, space, out)))
            return found

        cells = float(sum(_objects_of(tiles[cls]) * _objects_of(others[cls]) for cls in common))
        for found in in_order(shares, pairs(), self.device, cells):
            for rows, columns, values in found:
                _scatter_add(result, rows, columns, values)


def _objects_of(tiles: list[Tile]) -> int:
    return sum(len(tile.left) for tile in tiles)


def _groups(tiles: list[Tile], side: int) -> list[list[Tile]]:
    """Join tiles to groups of at most ``side`` objects (or of one tile)."""
    groups: list[list[Tile]] = []
    held = 0
    for tile in tiles:
        if not groups or held + len(tile.left) > side:
            groups.append([])
            held = 0
        groups[-1].append(tile)
        held += len(tile.left)
    return groups


def _arrange(packed: PackedObjects, side: int) -> tuple[PackedObjects, dict[int, list[Tile]]]:
    """Store the features once, in tile order, so that the tiles of all images are views."""
    plans: dict[int, list[TilePlan]] = {c: plan_tiles(packed, rows, side) for c, rows in class_rows(packed)}
    flat = [plan for tiles in plans.values() for plan in tiles]
    if not flat:
        return packed, {}
    number = torch.cat([plan.objects.reshape(-1) for plan in flat])
    real = torch.cat([plan.real.reshape(-1) for plan in flat])
    storage = torch.zeros(len(packed), dtype=torch.long)
    storage[number[real]] = torch.nonzero(real)[:, 0]
    stored = number.to(packed.left.device)
    left = packed.left[stored]
    right = left if packed.right is packed.left else packed.right[stored]
    arranged = replace(packed, left=left, right=right, storage=storage)
    tiles: dict[int, list[Tile]] = {}
    start = 0
    for cls, members in plans.items():
        tiles[cls] = []
        for plan in members:
            rows = slice(start, start + plan.objects.numel())
            images = plan.images.to(left.device)
            tiles[cls].append(Tile(images, left[rows], right[rows], tile_weights(packed, plan)))
            start = rows.stop
    return arranged, tiles
