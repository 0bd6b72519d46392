"""A round's queue as predictions of a Label Studio project."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.predictions import detections_to_result
from ppal_backend.label_studio.queue import PREFIX, QueueItem, publish
from ppal_backend.label_studio.schema import LabelSchema, parse_label_config
from ppal_backend.label_studio.views import keep_queue_tab
from ppal_backend.rounds.ports import QueueEntry
from ppal_backend.structures.round import ModelRef, RoundSpec


class LabelStudioPublisher:
    """Writes queue and pre-annotations to Label Studio.

    Args:
        client: the project's Label Studio.
        keep: published versions to leave there.
        set_sampling: whether to set the project's task sampling; False once its people insist on another.
    """

    def __init__(self, client: LabelStudioClient, keep: int = 3, set_sampling: bool = True) -> None:
        self._client, self._keep, self._set_sampling = client, keep, set_sampling

    def publish(
        self, spec: RoundSpec, model: ModelRef | None, queue: Sequence[QueueEntry],
        state: dict[str, Any] | None, on_state: Callable[[dict[str, Any]], None],
    ) -> str:  # fmt: skip
        """Publish; the labeling config is read now, so a label removed during the round is left out."""
        config = str(self._client.project(spec.project_id)["label_config"])
        items = list(_items(queue, model, parse_label_config(config, spec.from_name), spec.score_threshold))
        result = publish(
            self._client,
            spec.project_id,
            f"r{spec.number}",
            items,
            keep=self._keep,
            resume_state=state,
            on_state=on_state,
            set_sampling=self._set_sampling,
        )
        if result.version is not None:
            keep_queue_tab(self._client, spec.project_id)
        return result.version or f"{PREFIX}p{spec.project_id}-r{spec.number}-empty"


def _items(
    queue: Iterable[QueueEntry], model: ModelRef | None, schema: LabelSchema, threshold: float
) -> Iterator[QueueItem]:
    for entry in queue:
        found = entry.detections
        if model is None or found is None or len(found) == 0:
            yield QueueItem(entry.task_id)
        else:
            result = detections_to_result(schema, model.labels, found, entry.width, entry.height, threshold)
            yield QueueItem(entry.task_id, result)
