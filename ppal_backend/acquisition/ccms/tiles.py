"""Tiles of same-class objects and the similarity of two tiles from one matrix product.

A tile holds whole images that have the same number n of objects of one class, slot-major: the first objects of all
its images, then the second ones, and so on. The maximum over an image's objects is then an elementwise maximum of n
contiguous slabs, and one product of two tiles gives both directions of Eq. 6.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ppal_backend.acquisition.ccms.objects import PackedObjects

_MIN_BUCKET_IMAGES = 8
_WORTH_THREADS = 1 << 23

Unit = TypeVar("Unit")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Tile:
    """Objects of one class of g images with n slots each.

    Args:
        images: ``[g]`` int64 positions of the images, on the device of the features.
        left: ``[n * g, e]`` features, slot-major. Missing slots repeat an object of the same image.
        right: ``[n * g, e]``, the other factor.
        weights: ``[n, g]`` object weights; 0 for repeated objects.
    """

    images: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    weights: torch.Tensor


class Workspace:
    """Scratch memory that grows to the largest tile product and is used again for every pair of tiles."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[str, torch.Tensor] = {}

    def get(self, name: str, *shape: int) -> torch.Tensor:
        """Return an uninitialised float32 buffer; the content of an earlier one of that name is lost."""
        size = 1
        for length in shape:
            size *= length
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = torch.empty(size, device=self._device)
            self._flat[name] = flat
        return flat[:size].view(shape)


def in_order(
    work: Callable[[Unit, Workspace], Result], units: Iterable[Unit], device: torch.device, cells: float
) -> Iterator[Result]:
    """Results of ``work`` in the order of ``units``; on a CPU, several units at a time.

    Each thread takes the next unit when it is done with one and computes it alone. A product that all threads share
    waits for the slowest of them: where another program holds a core, two threads were slower than one. As results
    come in order, what is added up from them is the same to the bit on any number of threads.

    Args:
        work: Computes a unit in scratch memory that is its own until its result was used.
        units: What to compute.
        device: Where.
        cells: Numbers of all products together; few are not worth threads of their own.

    Yields:
        A result, valid until the next one is asked for.
    """
    threads = torch.get_num_threads() if device.type == "cpu" and cells >= _WORTH_THREADS else 1
    if threads == 1:
        space = Workspace(device)
        yield from (work(unit, space) for unit in units)
        return
    free = [Workspace(device) for _ in range(threads + 1)]
    under_way: deque[tuple[Future[Result], Workspace]] = deque()
    try:
        with ThreadPoolExecutor(threads, "ccms", torch.set_num_threads, (1,)) as pool:
            torch.set_num_threads(1)  # of this thread: it only adds up
            try:
                for unit in units:
                    if not free:
                        future, space = under_way.popleft()
                        yield future.result()
                        free.append(space)
                    under_way.append((pool.submit(work, unit, free[-1]), free.pop()))
                while under_way:
                    yield under_way.popleft()[0].result()
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(threads)


def _bucket_sizes(counts: np.ndarray, min_images: int) -> np.ndarray:
    """Slots for each image: its own count, or that of the next larger bucket where too few images share a count."""
    sizes = np.bincount(counts)
    slots_of = np.zeros(len(sizes), dtype=np.int64)
    current, held = -1, 0
    for value in np.flatnonzero(sizes)[::-1].tolist():
        if current < 0 or held >= min_images:
            current, held = value, 0
        held += int(sizes[value])
        slots_of[value] = current
    return slots_of[counts]


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Which objects a tile holds.

    Args:
        images: ``[g]`` int64 positions of the images (CPU).
        objects: ``[n, g]`` int64 numbers of the objects, slot-major (CPU).
        real: ``[n, g]`` bool, False where a missing slot repeats an object of the same image.
    """

    images: torch.Tensor
    objects: torch.Tensor
    real: torch.Tensor


def plan_tiles(
    objects: PackedObjects, rows: torch.Tensor, max_objects: int, min_images: int = _MIN_BUCKET_IMAGES
) -> list[TilePlan]:
    """Group objects of one class into tiles.

    Args:
        objects: Packed objects.
        rows: ``[m]`` int64 (CPU) numbers of objects, all of one class, an image's objects adjacent.
        max_objects: Slots per tile at most (an image with more gets a tile of its own).
        min_images: Images with different counts share a bucket until it holds this many.

    Returns:
        Tiles that together hold every object once.
    """
    numbers = rows.numpy()
    images = objects.images.numpy()[numbers]
    edges = np.concatenate(([0], np.flatnonzero(images[1:] != images[:-1]) + 1, [len(images)]))
    starts, counts = edges[:-1], edges[1:] - edges[:-1]
    slots = _bucket_sizes(counts, min_images)
    plans = []
    for n in np.unique(slots).tolist():
        members = np.flatnonzero(slots == n)
        offsets = np.arange(n)[:, None]
        size = max(1, max_objects // n)
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            real = offsets < counts[chunk]
            held = numbers[starts[chunk] + np.where(real, offsets, 0)]
            plans.append(TilePlan(*(torch.from_numpy(v) for v in (images[starts[chunk]], held, real))))
    return plans


def gather_tile(objects: PackedObjects, plan: TilePlan) -> Tile:
    """Copy the features that a plan names."""
    device = objects.left.device
    number = plan.objects.reshape(-1)
    stored = (number if objects.storage is None else objects.storage[number]).to(device)
    left = objects.left[stored]
    right = left if objects.right is objects.left else objects.right[stored]
    return Tile(plan.images.to(device), left, right, tile_weights(objects, plan))


def tile_weights(objects: PackedObjects, plan: TilePlan) -> torch.Tensor:
    """``[n, g]`` object weights of a plan, 0 for repeated objects."""
    device = objects.weights.device
    return objects.weights[plan.objects.reshape(-1).to(device)].view(plan.objects.shape) * plan.real.to(device)


def class_rows(objects: PackedObjects, subset: torch.Tensor | None = None) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (class, object numbers) for every class that occurs, an image's objects adjacent.

    Args:
        objects: Packed objects.
        subset: Object numbers to look at, an image's objects adjacent; None for all.
    """
    classes = objects.classes if subset is None else objects.classes[subset]
    if not len(classes):
        return
    order = torch.argsort(classes, stable=True)
    values, counts = torch.unique_consecutive(classes[order], return_counts=True)
    for cls, part in zip(values.tolist(), order.split(counts.tolist()), strict=True):
        yield cls, part if subset is None else subset[part]


def _max_over(slabs: torch.Tensor, dim: int, space: Workspace, name: str) -> torch.Tensor:
    """Maximum of a ``[n_a, g_a, n_b, g_b]`` product over slot dimension ``dim`` (0 or 2)."""
    count = slabs.shape[dim]
    if count == 1:
        return slabs.select(dim, 0)
    out = space.get(name, *(length for k, length in enumerate(slabs.shape) if k != dim))
    torch.maximum(slabs.select(dim, 0), slabs.select(dim, 1), out=out)
    for k in range(2, count):
        torch.maximum(out, slabs.select(dim, k), out=out)
    return out


def multiply(left: torch.Tensor, right: torch.Tensor, metric: str, space: Workspace) -> torch.Tensor:
    """Object similarities in [0, 2] of ``[m, e]`` and ``[k, e]`` features; ``[m, k]``, valid until the next call.

    Cosine + 1, or 2 * exp(-(KL(p|q) + KL(q|p)) / 2).
    """
    product = torch.mm(left, right.T, out=space.get("product", len(left), len(right)))
    if metric == "cosine":
        return product.add_(1.0)
    return product.mul_(0.5).clamp_(max=0.0).exp_().mul_(2.0)


def reduce_product(
    product: torch.Tensor,
    weights_a: torch.Tensor,
    weights_b: torch.Tensor,
    space: Workspace,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add up both directions of Eq. 7 for one class.

    Args:
        product: ``[n_a * g_a, n_b * g_b]`` object similarities of two tiles.
        weights_a: ``[n_a, g_a]`` object weights.
        weights_b: ``[n_b, g_b]`` object weights.
        space: Scratch memory; without ``out`` the result lives in it until the next call.
        out: ``[g_a, g_b]`` tensor for the result, which may be a view.

    Returns:
        ``[g_a, g_b]`` share of this class in the similarity of each pair of images.
    """
    (na, ga), (nb, gb) = weights_a.shape, weights_b.shape
    slabs = product.view(na, ga, nb, gb)
    total = space.get("total", ga, gb) if out is None else out
    if na == 1 and nb == 1:
        both = torch.add(weights_a[0][:, None], weights_b[0][None, :], out=space.get("both", ga, gb))
        return torch.mul(slabs[0, :, 0], both, out=total)
    to_b = _max_over(slabs, 2, space, "to_b")
    torch.mul(to_b[0], weights_a[0][:, None], out=total)
    for k in range(1, na):
        total.addcmul_(to_b[k], weights_a[k][:, None])
    to_a = _max_over(slabs, 0, space, "to_a")
    for k in range(nb):
        total.addcmul_(to_a[:, k], weights_b[k][None, :])
    return total
