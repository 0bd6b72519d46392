"""One round in a process of its own (``python -m ppal_backend.worker.round_process PROJECT``).

It claims the project's next round, composes what the round is plugged into, runs it, and leaves it as its error asks.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ppal_backend.engines.local import LocalEngine, yield_while_waiting
from ppal_backend.errors import (
    ArtifactsUnavailable,
    EngineUnavailable,
    LabelStudioAuthError,
    LabelStudioUnavailable,
    LeaseLost,
    OutOfSpace,
    PPALError,
    RoundCancelled,
    StateError,
    StoreUnavailable,
)
from ppal_backend.files import is_full
from ppal_backend.label_studio.publish import LabelStudioPublisher
from ppal_backend.label_studio.source import LabelStudioSource, image_cache, open_client
from ppal_backend.logs import configure_logging, log_context
from ppal_backend.operations import upkeep
from ppal_backend.operations.detectors import detector_for_round, known_or_none
from ppal_backend.operations.pruning import move_lost_away, prune_images, prune_project
from ppal_backend.rounds.folder import RoundFolder, Rounds, need_intact, need_space
from ppal_backend.rounds.ports import EarlierModels, Observer, Ports
from ppal_backend.service.auth import webhook_token
from ppal_backend.settings import Settings, load_settings
from ppal_backend.store import (
    CRASH_LIMIT,
    Lease,
    ModelVersion,
    ProjectRecord,
    ProjectSides,
    ProjectSteering,
    RoundRecord,
    Store,
    open_store,
)
from ppal_backend.structures.round import ModelRef, RoundSpec
from ppal_backend.worker.supervisor import RETRY_AFTER_CRASH_S
from ppal_backend.worker.watch import Watch

if TYPE_CHECKING:
    from ppal_backend.engines.ray import RayEngine
    from ppal_backend.rounds.run import RoundResult

log = logging.getLogger(__name__)

LONGEST_RETRY_S = 600.0
SPACE_RETRY_S = 60.0
MEASURED_AGAIN = 5
"""Models of earlier rounds that are measured on the evaluation set of today."""

PortsOf = Callable[[Settings, Store, ProjectRecord, RoundSpec, Observer], Ports]


def run_next_round(settings: Settings, project_id: int, ports_of: PortsOf | None = None) -> bool:
    """Claim and run the project's next round in this process; False when there was none to claim.

    Args:
        settings: the operator's settings.
        project_id: the project.
        ports_of: what the round is plugged into; Label Studio and the engine of the settings by default.
    """
    store = open_store(settings)
    try:
        lease = Lease.mine()
        record = store.rounds.claim(project_id, lease)
        if record is None:
            return False
        watch = Watch(store, record, lease, partial(_need_space, settings, store, project_id))
        watch.start()
        try:
            _attempt(settings, store, record, lease, watch, ports_of or label_studio_ports)
        finally:
            watch.stop()
        left = next((r for r in store.rounds.of_project(project_id) if r.id == record.id), None)
        if left is not None and left.finished_at is not None:  # however it ended; the project may be gone
            prune_project(settings, store, project_id)
            if left.state == "done":  # the images of one that failed are wanted again
                prune_images(settings, store)
        return True
    finally:
        store.close()


def _attempt(
    settings: Settings, store: Store, record: RoundRecord, lease: Lease, watch: Watch, ports_of: PortsOf
) -> None:
    """Run a claimed round to its end, or leave it as its error asks for."""
    project_id, rounds = record.project_id, store.rounds
    try:
        project = store.projects.get(project_id)
        result = _run(settings, store, project, record, watch, ports_of)
        metrics = {**result.metrics, "version": result.version, "seconds": result.seconds}
        with store.database.transaction():  # the version comes into force with the round's end, or not at all
            if not rounds.finish(record.id, metrics, lease):
                raise LeaseLost(f"round {record.number} of project {project_id} ended without this process")
            _record_version(settings, store, project_id, record.number, result)
    except LeaseLost as reason:
        log.error("%s", reason)
    except RoundCancelled as reason:
        if rounds.get(record.id).cancel_asked:
            rounds.cancel(record.id, str(reason), lease)
        else:
            rounds.release(record.id, lease=lease)
    except StoreUnavailable:
        raise  # nothing can be told to the store now; once it is back the round is taken up as after a crash
    except (LabelStudioUnavailable, LabelStudioAuthError, EngineUnavailable, ArtifactsUnavailable) as error:
        _wait(store, record, lease, min(LONGEST_RETRY_S, 5.0 * 2 ** min(record.attempts - 1, 10)), str(error))
    except OutOfSpace as error:
        _wait(store, record, lease, SPACE_RETRY_S, str(error))
    except PPALError as error:
        log.error("round %d of project %d failed: %s", record.number, project_id, error)
        rounds.fail(record.id, str(error), lease)
    except Exception as error:
        if is_full(error):
            text = f"the disk was full in step {watch.step!r} ({error}); free some, the round goes on by itself"
            store.projects.set_problem(project_id, "disk", text)
            return _wait(store, record, lease, SPACE_RETRY_S, text)
        log.exception("round %d of project %d broke", record.number, project_id)
        text = f"unexpected {type(error).__name__} in step {watch.step!r}: {error}; the worker's log has the details"
        rounds.crashed(record.id, text, CRASH_LIMIT, RETRY_AFTER_CRASH_S, lease)


def _wait(store: Store, record: RoundRecord, lease: Lease, delay_s: float, error: str) -> None:
    log.warning("round %d of project %d waits %.0f s: %s", record.number, record.project_id, delay_s, error)
    store.rounds.release(record.id, delay_s, error, lease)


def _need_space(settings: Settings, store: Store, project_id: int, step: str) -> None:
    """Before each step: enough space, or a round that waits and a problem that people see."""
    try:
        need_space(settings.project_folder(project_id), settings.min_free_gib)
    except OutOfSpace as error:
        store.projects.set_problem(project_id, "disk", f"step {step!r} waits: {error}")
        raise
    store.projects.set_problem(project_id, "disk", "")


def _run(
    settings: Settings,
    store: Store,
    project: ProjectRecord,
    record: RoundRecord,
    watch: Watch,
    ports_of: PortsOf,
) -> RoundResult:
    from ppal_backend.rounds.run import run_round  # imports torch, which the worker itself never needs

    key, number, is_first = project.key, record.number, record.attempts == 1
    rounds = Rounds(settings)
    folder = rounds.open(key, project.id, number, record.identity, is_first, watch.fence)
    move_lost_away(settings, store, project.id)
    spec = _spec(settings, store, project, record, folder)
    with log_context(project=project.id, round=record.number):
        return run_round(spec, folder, ports_of(settings, store, project, spec, watch))


def _spec(
    settings: Settings, store: Store, project: ProjectRecord, record: RoundRecord, folder: RoundFolder
) -> RoundSpec:
    """What the round was to do when it first started, or what the options in force say now."""
    if (folder / "spec.json").is_file():  # opening has taken away one that cannot be read
        spec = RoundSpec.from_dict(folder.read("spec.json"))
        return spec if spec.model is None else replace(spec, model=_model_here(settings, project, spec.model))
    options = settings.project_options(project.options)
    current = store.versions.active(project.id, with_model=True)
    if current is not None and not current.is_trained:
        current = None  # the zoo's detector as it is: taken anew, with the labels as they are now
    model = None
    if (record.kind == "rank" or options.init_weights == "last") and current is not None:
        if record.kind == "train" and current.metrics.get("trained_on_everything"):
            log.warning("training starts from the zoo's weights: %s has seen the evaluation set", current.version)
        else:
            model = _intact_model(settings, project, current, record.kind)
    kind: Literal["train", "rank"] = "train" if record.kind == "train" else "rank"

    def device() -> str:
        return _engine(settings).kind_of(settings.device)

    detector = detector_for_round(settings, store, project, kind, model, device)
    return RoundSpec(
        project_id=project.id,
        project_key=project.key,
        number=record.number,
        kind=kind,
        device=settings.device,
        model=model,
        draw_map=True,
        known=known_or_none(settings, project, detector).plain,
        **{**options.model_dump(), "detector": detector},
    )


def _model_here(settings: Settings, project: ProjectRecord, model: ModelRef) -> ModelRef:
    """A model that a round was given, perhaps on another machine, with its checkpoint on this one."""
    relative = Path(*Path(model.checkpoint).parts[-6:])
    rounds = Rounds(settings)
    if rounds.bucket is None or Path(model.checkpoint).is_file():
        return model
    return replace(model, checkpoint=str(rounds.fetch_checkpoint(project.key, str(relative))))


def _intact_model(settings: Settings, project: ProjectRecord, version: ModelVersion, kind: str) -> ModelRef | None:
    """The version's model. Ranking is impossible with a damaged one; a training starts from the zoo's weights then."""
    try:
        checkpoint = Rounds(settings).fetch_checkpoint(project.key, version.checkpoint)
        need_intact(checkpoint, version.version)
    except StateError as error:
        if kind == "rank":
            raise
        log.warning("training starts from the zoo's weights: %s", error)
        return None
    return ModelRef(version.detector, str(checkpoint), version.labels, version.difficulty)


def earlier_models(settings: Settings, store: Store, project: ProjectRecord, number: int) -> EarlierModels:
    """The model in force and the newest before it, as far as their checkpoints are there.

    Left out is what was trained on the evaluation set; a model that several rounds ranked with counts once, as that of
    the round that trained it.
    """
    trained = {v.checkpoint: v for v in reversed(store.versions.of_project(project.id)) if v.checkpoint}
    fair = sorted(
        (v for v in trained.values() if not v.metrics.get("trained_on_everything") and v.round_number < number),
        key=lambda v: v.round_number,
    )
    active = store.versions.active(project.id, with_model=True)
    in_force = [v for v in fair if active is not None and v.checkpoint == active.checkpoint]
    models = {}
    for version in {v.round_number: v for v in [*fair[-MEASURED_AGAIN:], *in_force]}.values():
        try:
            checkpoint = Rounds(settings).fetch_checkpoint(project.key, version.checkpoint)
            need_intact(checkpoint, version.version)
        except StateError as error:
            log.info("%s is not measured again: %s", version.version, error)
            continue
        models[version.round_number] = ModelRef(version.detector, str(checkpoint), version.labels, version.difficulty)
    return EarlierModels(models, next((v.round_number for v in in_force if v.round_number in models), None))


def _record_version(settings: Settings, store: Store, project_id: int, number: int, result: RoundResult) -> None:
    model, metrics = result.model, result.metrics
    root = settings.model_dir.resolve()
    if metrics.get("in_force"):  # the figures of the version are those of the model that stayed
        stayed = metrics["earlier"][str(metrics["active"])]
        metrics = {**metrics, "map": stayed["map"], "measured": stayed, "earlier": {}, "differences": {}}
    store.versions.activate(
        ModelVersion(
            project_id=project_id,
            version=result.version,
            round_number=number,
            detector=model.detector if model else "",
            checkpoint=os.path.relpath(model.checkpoint, root) if model else "",
            labels=model.labels if model else (),
            difficulty=model.difficulty if model else None,
            metrics=metrics,
        )
    )


def label_studio_ports(
    settings: Settings, store: Store, project: ProjectRecord, spec: RoundSpec, observer: Observer
) -> Ports:
    """A round of people: tasks from and predictions to Label Studio, the detector in this process."""
    client = open_client(settings, project.url, project.hostname)
    token = webhook_token(settings, project.id)
    for topic, problem in upkeep.keep_webhook(settings, store, client, project, token).items():
        store.projects.set_problem(project.id, topic, problem)
    engine = _engine(settings)
    return Ports(
        source=LabelStudioSource(
            client,
            image_cache(settings, client),
            spec.project_id,
            spec.from_name,
            settings.times_by_annotator,
            lambda: store.approvals.annotations(project.id).values(),
            takes_over=spec.kind == "rank",
            other_shapes=spec.other_shapes,
        ),
        engine=engine,
        publisher=LabelStudioPublisher(
            client, settings.keep_versions, not upkeep.keeps_own_sampling(project), settings.publish_tasks
        ),
        observer=observer,
        assignments=ProjectSides(store.sides, project.id, spec.number),
        earlier=partial(earlier_models, settings, store, project, spec.number),
        steering=ProjectSteering(store.steering, project.id),
        approved=partial(store.approvals.annotations, project.id),
        similarity=getattr(engine, "similarity", None),  # a cluster has one
    )


def _engine(settings: Settings) -> LocalEngine | RayEngine:
    """Where the detector runs, as the operator chose."""
    options = (settings.model_zoo, settings.threads, settings.gpus, settings.tracking or None, settings.weights_dir)
    if settings.engine == "local":
        return LocalEngine(*options)
    from ppal_backend.engines.ray import RayEngine

    return RayEngine(settings.ray_address, *options)


def main(arguments: Sequence[str]) -> int:
    """Entry of the round process: run the next round of the project named by its id."""
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format, settings.secrets)
    yield_while_waiting()
    os.nice(5)  # people's requests come before training
    try:
        with log_context(project=int(arguments[0])):
            run_next_round(settings, int(arguments[0]))
    except StoreUnavailable as error:
        log.error("the round of project %s is left for now: %s", arguments[0], error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
