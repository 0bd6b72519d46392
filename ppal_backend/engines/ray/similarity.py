"""CCMS of pools whose matrix fits nowhere: rows computed on all nodes of a Ray cluster, a share of the pool each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from ppal_backend.acquisition.arrays import as_tensor
from ppal_backend.acquisition.ccms import LazySimilarity
from ppal_backend.acquisition.ccms.objects import PackedObjects
from ppal_backend.engines.ray.cluster import translate_errors
from ppal_backend.engines.ray.tasks import RETRIES
from ppal_backend.errors import DetectorError


class RaySimilarity:
    """The similarity of :class:`~ppal_backend.acquisition.ccms.LazySimilarity`, whose rows a cluster computes.

    Each process holds the objects of its share of the images; the images of the rows asked for are sent to all. A
    lost process is started anew with its share. Blocks among few images are computed here. Everything ends with the
    last reference to this object.

    Args:
        ray: The module, connected.
        start: Makes a remote process, from a class, with Ray's options for restarts.
        processes: How many; no more than images.
        device: ``cuda`` or ``cpu``: where the processes compute.
        packed: The objects of N >= 1 images, on the CPU.
        memory_gib: Bound on scratch memory of each call; None for the default.
    """

    def __init__(
        self,
        ray: Any,
        start: Callable[..., Any],
        processes: int,
        device: str,
        packed: PackedObjects,
        memory_gib: float | None = None,
    ) -> None:
        self._ray, self._packed, self._memory_gib = ray, packed, memory_gib
        self.device = packed.left.device
        options = {"max_restarts": RETRIES, "max_task_retries": RETRIES}
        shares = torch.arange(packed.num_images).tensor_split(min(max(1, processes), packed.num_images))
        self._shares = [ray.put(packed.of_images(share)) for share in shares]  # kept for processes started anew
        self._workers = [start(RowWorker, options).remote(share, device, memory_gib) for share in self._shares]

    def __len__(self) -> int:
        return self._packed.num_images

    def rows(self, indices: Any) -> torch.Tensor:
        """Similarity ``[k, N]`` of some images with all.

        Raises:
            DetectorError: A process was lost again and again.
        """
        index = as_tensor(indices).long().cpu().reshape(-1)
        result = self.against(self._packed.of_images(index))
        result[torch.arange(len(index)), index] = 2.0
        return result

    def against(self, others: PackedObjects) -> torch.Tensor:
        """Similarity ``[k, N]`` of k images from elsewhere with all.

        Raises:
            DetectorError: A process was lost again and again.
        """
        there = self._ray.put(others)
        answers = [worker.against.remote(there) for worker in self._workers]
        try:
            with translate_errors(self._ray):
                return torch.cat(self._ray.get(answers), 1)
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as error:
            raise DetectorError(
                f"expected similarities from the Ray cluster, got processes that were lost {1 + RETRIES} times "
                f"({str(error).splitlines()[0]}); they may lack memory, see Ray's log on the nodes"
            ) from error

    def block(self, rows: Any, columns: Any) -> torch.Tensor:
        """Similarity ``[k, l]`` of some images with some others."""
        return self._here.block(rows, columns)

    def panel(self, columns: Any) -> Callable[[Any], torch.Tensor]:
        """``block`` with the columns prepared for many calls."""
        return self._here.panel(columns)

    @cached_property
    def _here(self) -> LazySimilarity:
        return LazySimilarity.of(self._packed, self._memory_gib)


class RowWorker:
    """One process of the cluster with a share of the images.

    Args:
        share: Their objects.
        device: ``cuda`` or ``cpu``.
        memory_gib: Bound on scratch memory; None for the default.
    """

    def __init__(self, share: PackedObjects, device: str, memory_gib: float | None) -> None:
        self._device = device
        self._similarity = LazySimilarity.of(share.to(device), memory_gib)

    def against(self, others: PackedObjects) -> torch.Tensor:
        """Similarity ``[k, n]`` of k images with those of the share, on the CPU."""
        return self._similarity.against(others.to(self._device)).cpu()
