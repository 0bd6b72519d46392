"""Rivals of PPAL that change the detector: in simulations only, each a training extension of detectors of the zoo.

A rival is a file beside this one with a class that satisfies :class:`Rival`, and its line in :func:`find_rival`. A
training that was given one says so in its checkpoint (``rival`` in the facts), so that whoever loads it builds the
same detector again, and inference leaves the rival's utility of each image beside the image's features, under the
rival's name. The strategy of that name orders the pool by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from mmengine.hooks import Hook

from ppal_backend.detector.heads.base import Restore
from ppal_backend.errors import DetectorError

Read = Callable[[Sequence[Any]], torch.Tensor]
"""From the predicted data samples of a batch to ``[N, d]`` float32, what the rival's strategy reads of each image."""


class Rival(Protocol):
    """What a method that changes the detector adds to its configuration, its modules, its training and inference."""

    name: str
    reads_difficulty: bool
    """Whether the changed head still trains as its family does, so that class difficulties can be followed."""
    learns_from_unlabelled: bool
    """Whether its training takes an unlabelled image with each labelled one, where there are any."""

    def change(self, model: dict[str, Any]) -> None:
        """Change a detector's configuration before it is built, in place.

        Raises:
            DetectorError: The rival does not fit this detector.
        """

    def attach(self, detector: Any) -> None:
        """Add modules to a built detector; their weights lie in its state dict."""

    def hooks(self, batch_size: int) -> list[Hook]:
        """Hooks of a training.

        Raises:
            DetectorError: Steps of ``batch_size`` images are too small.
        """

    def watch(self, detector: Any) -> tuple[Restore, Read]:
        """Follow one prediction of a batch: what undoes that, and what then reads its images."""


def find_rival(name: str) -> Rival:
    """The rival of that name.

    Raises:
        DetectorError: There is none.
    """
    from ppal_backend.detector.rivals.learnloss import LearnLoss
    from ppal_backend.detector.rivals.mdn import MDN
    from ppal_backend.detector.rivals.mial import MIAL

    made: tuple[Rival, ...] = (LearnLoss(), MDN(), MIAL())
    rivals = {rival.name: rival for rival in made}
    if name not in rivals:
        raise DetectorError(f"expected a rival of {', '.join(rivals)}, got {name!r}; correct the name")
    return rivals[name]
