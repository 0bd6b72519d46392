"""What a round needs from the outside. People and the simulation's oracle plug in here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ppal_backend.rounds.evaluation_set import Assignments, NewAssignments
from ppal_backend.structures.steering import Steering

if TYPE_CHECKING:
    from ppal_backend.datasets.coco import CocoDataset
    from ppal_backend.structures.detections import Detections
    from ppal_backend.structures.round import ModelRef, OnProgress, RoundSpec


@dataclass(frozen=True, slots=True)
class PoolEntry:
    """One unlabelled image: its task id, file and size in pixels; ``checksum`` of its content where it is known."""

    image_id: int
    path: str
    width: int
    height: int
    checksum: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The entry for JSON."""
        return {
            "image_id": self.image_id,
            "path": self.path,
            "width": self.width,
            "height": self.height,
            "checksum": self.checksum,
        }


@dataclass(frozen=True)
class PreparedData:
    """Labelled images as COCO, the pool, the labels in class order, and counts worth telling.

    ``unlabelled`` are files of further images that a training may learn from and nobody is to choose among.
    """

    labelled: CocoDataset
    pool: Sequence[PoolEntry]
    labels: tuple[str, ...]
    report: Mapping[str, Any]
    unreadable: Sequence[int] = ()  # pool tasks whose image cannot be used; they go to the end of the queue
    evaluation: CocoDataset | None = None  # evaluate on these, instead of on held-out labelled images
    problems: Mapping[str, str] = field(default_factory=dict)  # by topic; "" where there is none (any more)
    unlabelled: Sequence[str] = ()
    annotators: Mapping[int, int] = field(default_factory=dict)  # Label Studio's user by labelled task
    data: Mapping[int, Mapping[str, str]] = field(default_factory=dict)  # fields of pool tasks that quotas can go by


@dataclass(frozen=True)
class TrainingFiles:
    """What a training reads: COCO files with absolute paths; ``unlabelled`` are the image files of the pool.

    ``validation`` are images that a training does not learn from and may choose among its weights by; they are never
    those that the result is measured on.
    """

    train: Path
    validation: Path | None = None
    unlabelled: Sequence[str] = ()


@dataclass(frozen=True)
class Trained:
    """A trained detector and what training said about itself."""

    model: ModelRef
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Inferred:
    """One image of the pool after inference: its detections and its image features by name."""

    detections: Detections
    features: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QueueEntry:
    """One place in the labeling queue."""

    task_id: int
    detections: Detections | None
    width: int = 0
    height: int = 0


class TaskSource(Protocol):
    """Where annotated and unlabelled images come from."""

    def export(self, folder: Path) -> Sequence[int]:
        """Write a snapshot of the project into ``folder``; the ids of the annotations in it."""

    def prepare(self, folder: Path, on_progress: OnProgress) -> PreparedData:
        """Turn the snapshot in ``folder`` into data, fetching the images."""


class Engine(Protocol):
    """Where the detector runs."""

    def train(
        self,
        spec: RoundSpec,
        labels: tuple[str, ...],
        files: TrainingFiles,
        folder: Path,
        on_progress: OnProgress,
        should_stop: Callable[[], bool],
    ) -> Trained:
        """Train a detector, resuming what ``folder`` holds."""  # fmt: skip

    def untrained(self, spec: RoundSpec, labels: tuple[str, ...], folder: Path) -> ModelRef | None:
        """A model that can describe images but detect nothing yet, written to ``folder``; None where that would
        need a download or take too long."""

    def as_is(self, spec: RoundSpec, labels: tuple[str, ...], folder: Path) -> ModelRef:
        """The zoo's detector as published, written to ``folder``: it predicts the labels that ``spec.known`` names.

        Raises:
            WeightsUnavailable: its weights cannot be had.
            CheckpointError: they cannot be used.
        """

    def evaluate(
        self,
        spec: RoundSpec,
        model: ModelRef,
        ann_json: Path,
        earlier: Mapping[int, ModelRef] | None = None,
        folder: Path | None = None,
    ) -> Mapping[str, Any]:
        """COCO metrics of a model on labelled images: ``map``, ``map50``, ``per_class``, and what is ``measured``
        (``map``, its ``interval``, the ``classes`` with their AP, those with ``too_few`` boxes). With a ``folder`` that
        keeps predictions, ``earlier`` models by round number are measured on the same images too: ``earlier``, the
        ``differences`` of the model to them (``map``, ``interval``), and ``problems``."""  # fmt: skip

    def infer(
        self,
        spec: RoundSpec,
        model: ModelRef,
        images: Iterable[PoolEntry],
        on_progress: OnProgress,
        should_stop: Callable[[], bool],
    ) -> Iterator[Inferred]:
        """One pass over images, in order; an unreadable image yields no entry."""  # fmt: skip


class Publisher(Protocol):
    """Who takes the new queue."""

    def publish(
        self,
        spec: RoundSpec,
        model: ModelRef | None,
        queue: Sequence[QueueEntry],
        state: dict[str, Any] | None,
        on_state: Callable[[dict[str, Any]], None],
    ) -> str:
        """Publish ``queue`` (first = label first; entries are read when they are gone through); the version's name.
        ``state`` is what ``on_state`` was given last by an attempt that was cut off. ``on_state`` is called before
        each effect, which must not happen when it raises."""  # fmt: skip


class Observer(Protocol):
    """Who watches a round."""

    def exported(self, annotation_ids: Sequence[int]) -> None:
        """These annotations are in the snapshot."""

    def step_started(self, step: str) -> None:
        """A step begins."""

    def progress(self, progress: Any) -> None:
        """A step came further."""

    def report_problem(self, topic: str, problem: str) -> None:
        """What people have to be told about their project, by topic; an empty text takes it back."""

    def should_stop(self) -> bool:
        """Whether the round is to stop now; it can be resumed later."""

    def fence(self) -> None:
        """Called right before each effect outside the round's folder.

        Raises:
            LeaseLost: somebody else may be at this round by now; the effect must not happen.
        """


class QueueSteering(Protocol):
    """Where people's pins and quotas are kept."""

    def read(self) -> Steering:
        """As they are now."""

    def drop(self, pins: Mapping[int, str]) -> None:
        """Forget pins (task id -> when it was set) of tasks that need none any more, but for those set anew since."""


class NoSteering:
    """Nobody asks for anything: a simulation."""

    def read(self) -> Steering:
        """Nothing."""
        return Steering()

    def drop(self, pins: Mapping[int, str]) -> None:
        """There is none."""


@dataclass(frozen=True)
class EarlierModels:
    """Models of earlier rounds that can be measured again, by the number of the round that trained them; the newest of
    those in force is ``active``."""

    models: Mapping[int, ModelRef] = field(default_factory=dict)
    active: int | None = None


@dataclass(frozen=True)
class Ports:
    """Everything a round is plugged into."""

    source: TaskSource
    engine: Engine
    publisher: Publisher
    observer: Observer
    assignments: Assignments = field(default_factory=NewAssignments)  # which images measure and which train
    earlier: Callable[[], EarlierModels] = EarlierModels
    steering: QueueSteering = field(default_factory=NoSteering)
    approved: Callable[[], Collection[int]] = frozenset  # tasks whose annotation people approved in bulk
    similarity: Callable[..., Any] | None = None  # computes CCMS of pools whose matrix does not fit; None: here
