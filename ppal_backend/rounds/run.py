"""The step line of a round. Each step reads what the ones before it left on disk and leaves its own."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.acquisition.difficulty import difficulty_coefficients
from ppal_backend.acquisition.quotas import Constrained, hold_quotas
from ppal_backend.acquisition.strategies import USES_LABELLED, get_strategy
from ppal_backend.datasets.coco import CocoDataset
from ppal_backend.errors import CheckpointError, RoundCancelled, TooFewAnnotations, WeightsUnavailable
from ppal_backend.files import numbered_before, read_json, write_json
from ppal_backend.rounds import evaluation_set
from ppal_backend.rounds.attention import keep_places, last_round, order_of_looking
from ppal_backend.rounds.detections_store import DetectionsWriter, StoredDetections, read_queue
from ppal_backend.rounds.evaluation_set import EVALUATION, FEWEST_TO_TRAIN, SPLIT, TRAINING, position
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.labelled import labelled_entries, mark_true_positives, truth_by_image
from ppal_backend.rounds.pool_map import FEATURE, MAP, labelled_to_draw, map_of, pool_to_draw
from ppal_backend.rounds.ports import PoolEntry, Ports, PreparedData, TrainingFiles
from ppal_backend.rounds.reuse import FINGERPRINTS, fingerprint_of, stamp_of, take_over
from ppal_backend.rounds.review import QUALITY, review_of
from ppal_backend.structures.detections import Detections
from ppal_backend.structures.quality import Quality, count, listed
from ppal_backend.structures.query import CandidatePool, QueryContext, QuerySet
from ppal_backend.structures.round import ModelRef, RoundSpec
from ppal_backend.structures.steering import Steering

log = logging.getLogger(__name__)

TRAIN_STEPS = ("export", "dataset", "train", "evaluate", "infer", "candidates", "query", "publish")
RANK_STEPS = ("export", "dataset", "infer", "candidates", "query", "publish")
AS_IS_STEPS = ("export", "dataset", "adopt", "infer", "candidates", "query", "publish")
FIRST_BOXES = "first boxes"
"""Topic of why a project whose labels are known gets no boxes before its first labels."""
PINS, QUOTAS = "pins", "quotas"
"""Topics of what became of what people ask of the queue."""
HELD_OUT = "dataset/held_out.json"
VALIDATION = "dataset/validation.json"
UNLABELLED = "dataset/unlabelled.json"
VALIDATION_SHARE = 0.1
STEERING = "export/steering.json"
"""What people asked of the queue when the export began."""
PREDICTIONS = "evaluation"
UNTRAINED = "untrained"
NOTE_EACH_S = 5.0


@dataclass(frozen=True)
class RoundResult:
    """What a finished round achieved. ``model`` is None when there was none to order the pool by."""

    version: str
    model: ModelRef | None
    metrics: dict[str, Any]
    queue: tuple[int, ...]
    seconds: dict[str, float]


def steps_of(spec: RoundSpec) -> tuple[str, ...]:
    """The steps this round goes through, in order."""
    if spec.kind == "train":
        return TRAIN_STEPS
    return AS_IS_STEPS if spec.is_as_is else RANK_STEPS


def run_round(spec: RoundSpec, folder: RoundFolder, ports: Ports) -> RoundResult:
    """Run the steps that are not done yet.

    Raises:
        TooFewAnnotations: nothing to train on.
        RoundCancelled: the observer asked to stop; finished steps stay, the next run goes on from there.
        PPALError: a step failed; its message says why.
    """
    folder.write("spec.json", spec.as_dict())
    run = _Run(spec, folder, ports)
    for step in steps_of(spec):
        if folder.is_done(step):
            continue
        if ports.observer.should_stop():
            raise RoundCancelled(f"round {spec.number} was stopped before its step {step!r}")
        ports.observer.step_started(step)
        started = time.perf_counter()
        action: Callable[[], dict[str, Any]] = getattr(run, f"step_{step}")
        facts = action()
        seconds = time.perf_counter() - started
        folder.mark_done(step, seconds, facts)
        log.info("round %d of project %d: %s done in %.1f s", spec.number, spec.project_id, step, seconds)
    return run.result()


@dataclass(frozen=True)
class _Looked:
    """Images that something is known of, that were looked at now, and that the time did not suffice for."""

    known: int
    now: int
    left: int


class _Clock:
    """Minutes that a pass over the pool may take, over all its attempts; None for no limit."""

    def __init__(self, path: Path, minutes: float | None) -> None:
        self._path, self._limit_s = path, None if minutes is None else 60.0 * minutes
        self._before_s = float(read_json(path)["seconds"]) if minutes is not None and path.is_file() else 0.0
        self._started = self._noted = time.monotonic()

    def is_over(self) -> bool:
        """Whether the time is used up; what was used is noted every few seconds."""
        now = time.monotonic()
        if self._limit_s is not None and now - self._noted >= NOTE_EACH_S:
            self.note()
        return self._limit_s is not None and self._before_s + now - self._started >= self._limit_s

    def note(self) -> None:
        """Leave for a resumed pass how long this one took."""
        if self._limit_s is not None:
            self._noted = time.monotonic()
            write_json(self._path, {"seconds": self._before_s + self._noted - self._started})


class _Run:
    """One round at work; ``step_*`` methods return the facts for the step's mark."""

    def __init__(self, spec: RoundSpec, folder: RoundFolder, ports: Ports) -> None:
        self.spec, self.folder, self.ports = spec, folder, ports

    def step_export(self) -> dict[str, Any]:
        asked = self.ports.steering.read()  # first: the snapshot holds the task of every pin that is set by now
        ids = list(self.ports.source.export(self.folder / "export"))
        self.folder.write(STEERING, asked.as_dict())
        self.ports.observer.exported(ids)
        return {"annotations": len(ids)}

    def step_dataset(self) -> dict[str, Any]:
        data = self.ports.source.prepare(self.folder / "export", self.ports.observer.progress)
        for topic, problem in {FIRST_BOXES: "", **data.problems}.items():
            self.ports.observer.report_problem(topic, problem)
        split = self._split(data)
        held_out, kept = split[EVALUATION], split[TRAINING]
        if self.spec.train_on_everything:
            held_out, kept = [], [*kept, *held_out]
        validation = self._to_validate_on(kept)
        data.labelled.subset(set(kept) - validation).write(self.folder / "dataset" / "train.json")
        if held_out:
            data.labelled.subset(held_out).write(self.folder / HELD_OUT)
        if validation:
            data.labelled.subset(validation).write(self.folder / VALIDATION)
        evaluation = data.labelled.subset(held_out) if data.evaluation is None else data.evaluation
        evaluation.write(self.folder / "dataset" / "val.json")
        self.folder.write("dataset/pool.json", [entry.as_dict() for entry in data.pool])
        self.folder.write("dataset/data.json", list(data.data.items()))
        if data.unlabelled:
            self.folder.write(UNLABELLED, list(data.unlabelled))
        self.folder.write("dataset/unreadable.json", list(data.unreadable))
        self.folder.write("dataset/labels.json", list(data.labels))
        if data.evaluation is None:  # a simulation's oracle makes no mistakes to look for
            self.folder.write(QUALITY, review_of(self.folder.path, data.labelled, data.annotators))
        return {
            "labelled_images": len(data.labelled.images),
            "labelled_boxes": len(data.labelled.annotations),
            "approved_images": len(self._approved(data)),
            "held_out_images": len(held_out),
            "pool_images": len(data.pool),
            "unreadable_images": len(data.unreadable),
            "labelled_per_class": dict(zip(data.labels, data.labelled.class_counts(), strict=True)),
            **self._report(data, split[EVALUATION]),
        }

    @staticmethod
    def _report(data: PreparedData, evaluation: Collection[int]) -> dict[str, Any]:
        """The report of the data, which tells of single tasks how far people agree only where they measure: there may
        be tens of thousands."""
        report, measuring = dict(data.report), set(evaluation)
        if people := report.get("people"):
            by_task = [row for row in people["by_task"] if row[0] in measuring]
            report["people"] = {**people, "by_task": by_task}
        return report

    def _approved(self, data: PreparedData) -> list[int]:
        """Labelled tasks whose annotation is the model's own, approved in bulk: they never measure it."""
        approved = set(self.ports.approved())
        return [i for i in data.labelled.image_ids if i in approved]

    def _split(self, data: PreparedData) -> dict[str, Any]:
        """Give every labelled image its side for good, and note the split."""
        spec, assignments = self.spec, self.ports.assignments
        labelled = data.labelled
        assigned = dict(assignments.all())
        if not assigned:
            old = assignments.trained_before(labelled.image_ids)
            assigned = evaluation_set.earlier_sides(self.folder.path, labelled.image_ids, old)
        assigned = {**{i: TRAINING for i in self._approved(data)}, **assigned}
        given = spec.project_key, labelled, assigned, spec.holdout_fraction, spec.evaluation_images
        self.ports.observer.fence()
        assignments.add({**assigned, **evaluation_set.assign(*given)})
        pool = [entry.image_id for entry in data.pool]
        split = evaluation_set.split_facts(
            spec.project_key, labelled, assignments.all(), pool, spec.holdout_fraction, spec.evaluation_images
        )
        self.folder.write(SPLIT, split)
        return split

    def _to_validate_on(self, image_ids: Sequence[int]) -> set[int]:
        """Images that a training which may end early keeps back to choose its end by."""
        if self.spec.patience is None or len(image_ids) <= FEWEST_TO_TRAIN:
            return set()
        ranked = sorted(image_ids, key=lambda i: position(f"{self.spec.project_key}/validation", i))
        return set(ranked[: max(1, int(VALIDATION_SHARE * len(ranked)))])

    def step_adopt(self) -> dict[str, Any]:
        """Take the zoo's detector as it is. Without its weights the pool is ordered as where no label is known."""
        known = {label: names for label, names in self.spec.known.items() if label in self.labels}
        model, problem = None, ""
        if known and self.pool:
            try:
                model = self.ports.engine.as_is(replace(self.spec, known=known), self.labels, self.folder / "adopt")
            except (WeightsUnavailable, CheckpointError) as error:
                problem = (
                    f"no boxes before the first labels, though {self.spec.detector} knows {', '.join(known)}: {error}; "
                    f"then run ppal round {self.spec.project_id} --rank"
                )
                log.warning("%s", problem)
        self.ports.observer.report_problem(FIRST_BOXES, problem)
        self.folder.write("adopt/model.json", None if model is None else asdict(model))
        return {"known": known if model is not None else {}, "problem": problem}

    def step_train(self) -> dict[str, Any]:
        train_json = self.folder / "dataset" / "train.json"
        train = CocoDataset.read(train_json)
        if len(train.images) < FEWEST_TO_TRAIN or not train.annotations:
            raise TooFewAnnotations(self._too_few(len(train.images), len(train.annotations)))
        observer = self.ports.observer
        validation = self.folder / VALIDATION
        unlabelled = [entry.path for entry in self.pool]
        if (self.folder / UNLABELLED).is_file():
            unlabelled += self.folder.read(UNLABELLED)
        files = TrainingFiles(train_json, validation if validation.is_file() else None, unlabelled)
        trained = self.ports.engine.train(
            self.spec, self.labels, files, self.folder / "train", observer.progress, observer.should_stop
        )
        self.folder.write("train/model.json", asdict(trained.model))
        unmatched = _without_positives(trained.model, train)
        observer.report_problem("classes", _unmatched_problem(unmatched))
        return {**trained.facts, **({"without_positives": unmatched} if unmatched else {})}

    def _too_few(self, images: int, boxes: int) -> str:
        """Why there is nothing to train on: too little was annotated, or what was cannot be used."""
        facts = self.folder.facts("dataset")
        got = f"got {images} images with {boxes} boxes"
        if more := facts["labelled_images"] - images:
            theirs = facts["labelled_boxes"] - boxes
            got += f" beside {more} images with {theirs} boxes that are set aside for measuring"
        wanted = f"training needs at least {FEWEST_TO_TRAIN} annotated images and one box, {got}"
        missing = facts.get("conversion", {}).get("missing_images", 0)
        if not missing:
            return f"{wanted}; annotate more tasks"
        reasons = facts.get("image_problems") or ["the log has the reasons"]
        return (
            f"{wanted}: the images of {missing} annotated tasks cannot be used ({reasons[0]}); make these images "
            "readable, annotating more does not help"
        )

    def step_evaluate(self) -> dict[str, Any]:
        model = self._need_model()
        metrics = self._measure_versions(model) if self._has_evaluation_set else self._evaluate(model)
        self.folder.write("metrics.json", metrics)
        return {"map": metrics.get("map")}

    @property
    def _has_evaluation_set(self) -> bool:
        """Whether the round is measured on images of the project (a simulation brings a test set)."""
        held_out = self.folder / HELD_OUT
        return held_out.is_file() and (self.folder / SPLIT).is_file()

    def _evaluate(self, model: ModelRef) -> dict[str, Any]:
        return dict(self.ports.engine.evaluate(self.spec, model, self.folder / "dataset" / "val.json"))

    def _measure_versions(self, model: ModelRef) -> dict[str, Any]:
        """The model and those of earlier rounds, on the same images and now."""
        folder, earlier = self.folder / PREDICTIONS, self.ports.earlier()
        for number in earlier.models:
            self._take_over(folder / f"{number}.npz")
        found = dict(
            self.ports.engine.evaluate(self.spec, model, self.folder / "dataset" / "val.json", earlier.models, folder)
        )
        told = {"image_set": self._set_name(), "images_wanted": self.folder.read(SPLIT)["images"]}
        metrics = {**found, **told, "active": earlier.active}
        active = earlier.models.get(earlier.active) if earlier.active is not None else None
        if self.spec.keep_better and active is not None and _is_worse(metrics):
            metrics["in_force"] = asdict(active)
        return metrics

    def _take_over(self, path: Path) -> None:
        """Copy the predictions that an earlier round has kept, the newest that has them."""
        for earlier in numbered_before(self.folder.path):
            kept = earlier / PREDICTIONS / path.name
            if kept.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(kept, path)
                return

    def _set_name(self) -> str:
        """What tells the images of this evaluation from others."""
        ids = sorted(CocoDataset.read(self.folder / "dataset" / "val.json").image_ids)
        return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]

    def step_infer(self) -> dict[str, Any]:
        model = self.model
        if model is None:
            return self._cold_start()
        entries = self.pool
        if self.spec.pool_minutes is not None:
            known_ids = [entry.image_id for entry in self._labelled]
            entries = order_of_looking(self.pool, known_ids, last_round(self.folder), self.spec.seed)
        looked = self._infer("detections", entries, model, minutes=self.spec.pool_minutes)
        known = labelled_entries(self.train_set) if self.looks_at_labelled else []
        ids = {entry.image_id for entry in known}
        labelled = known + [entry for entry in self._drawn() if entry.image_id not in ids]
        if self.pool and labelled:
            self._infer("labelled_detections", labelled, model)  # with boxes: people look for images like labelled ones
        return {
            "images": looked.known,
            "unreadable_images": len(self.pool) - looked.known - looked.left,
            "looked_at": looked.now,
            "not_looked_at": looked.left,
            FINGERPRINTS: {
                "detections": fingerprint_of(self.spec, model, True),
                "labelled_detections": fingerprint_of(self.spec, model, True),
            },
        }

    def _cold_start(self) -> dict[str, Any]:
        """Before any training: features of the images at best, and no detections."""
        untrained = None
        if self.spec.cold_start == "typical" and self.pool:
            untrained = self.ports.engine.untrained(self.spec, self.labels, self.folder / UNTRAINED)
        if untrained is None:
            shutil.rmtree(self.folder / "detections", ignore_errors=True)
            writer = DetectionsWriter(self.folder / "detections")
            for entry in self.pool:
                writer.add(Detections.empty(entry.image_id), {})
            writer.flush()
            return {"images": len(self.pool), "unreadable_images": 0, "strategy": "random"}
        seen = self._infer("detections", self.pool, untrained, keep_boxes=False).known
        shutil.rmtree(self.folder / UNTRAINED)
        return {"images": seen, "unreadable_images": len(self.pool) - seen, "strategy": "typiclust"}

    def _infer(
        self,
        name: str,
        entries: Sequence[PoolEntry],
        model: ModelRef,
        keep_boxes: bool = True,
        minutes: float | None = None,
    ) -> _Looked:
        """What the model says of these images into the folder ``name``, in their order and no longer than ``minutes``.

        Not looked at are images that this round, or an earlier one with the same model, has looked at.
        """
        take_over(self.folder, name, fingerprint_of(self.spec, model, keep_boxes))
        writer = DetectionsWriter(self.folder / name)
        stamps = {entry.image_id: stamp_of(entry) for entry in entries}
        todo = [e for e in entries if writer.stamps.get(e.image_id, -1) not in (0, stamps[e.image_id])]
        observer, clock = self.ports.observer, _Clock(self.folder / name / "spent.json", minutes)
        place = {entry.image_id: number for number, entry in enumerate(todo, start=1)}
        now, reached = 0, 0 if todo and clock.is_over() else len(todo)
        found = self.ports.engine.infer(self.spec, model, todo[:reached], observer.progress, observer.should_stop)
        for item in found:
            detections = item.detections if keep_boxes else Detections.empty(item.detections.image_id)
            writer.add(detections, item.features, stamps[detections.image_id])
            now += 1
            if clock.is_over():
                reached = place[detections.image_id]
                break
        writer.flush()
        clock.note()
        return _Looked(len(StoredDetections(self.folder / name, stamps)), now, len(todo) - reached)

    def step_candidates(self) -> dict[str, Any]:
        candidates = self.strategy.candidates(self.context, self._budget, self._rng())
        self.folder.write(
            "candidates.json",
            {
                "image_ids": list(candidates.image_ids),
                "utilities": list(candidates.utilities.items()),
                "steering": self.steering.as_dict(),
            },
        )
        return {"candidates": len(candidates.image_ids), **self._class_weights()}

    def _class_weights(self) -> dict[str, Any]:
        """Weights of the classes (Eq. 4) by label, for people; none where difficulties were not followed."""
        model = self.model
        if model is None or model.difficulty is None:
            return {}
        options = self.strategy.options
        weights = difficulty_coefficients(np.asarray(model.difficulty), options.alpha, options.beta)
        return {"class_weights": dict(zip(model.labels, weights.tolist(), strict=True))}

    def step_query(self) -> dict[str, Any]:
        stored = self.folder.read("candidates.json")
        candidates = CandidatePool(tuple(stored["image_ids"]), {int(i): u for i, u in stored["utilities"]})
        first, last = self.pins.first, self.pins.last
        room = self.spec.budget - len(first)
        chosen = self.strategy.query(self.context, self._budget, self._rng(), candidates=candidates)
        picked = chosen.image_ids[: max(0, room - len(self.to_evaluate))]
        reserve = self.to_evaluate
        if len(picked) < self._budget:
            reserve = self.reserve[: max(len(reserve), room - len(picked))]
        quotas = self._hold_quotas(chosen, picked, (*first, *reserve))
        if quotas is not None:
            chosen = quotas.query
            picked = chosen.image_ids
        image_ids = (*first, *evaluation_set.spread(picked, reserve))
        ranked = set(image_ids)
        queue = image_ids + tuple(i for i in chosen.queue(self.context.pool_ids) if i not in ranked)
        ranked.update(queue)
        queue += tuple(i for i in self.reserve if i not in ranked)
        ranked.update((*self.reserve, *last))
        others = [e.image_id for e in self.pool if e.image_id not in ranked]
        older = others if self.folder.facts("infer").get("not_looked_at") else []
        past = last_round(self.folder).queue if older else ()
        queue = (*keep_places(queue, older, past, len(image_ids)), *([] if older else others), *last)
        queue += tuple(self.folder.read("dataset/unreadable.json"))
        report = [] if quotas is None else self._quota_report(quotas, (*first, *reserve))
        self.folder.write(
            "query_set.json",
            {
                "strategy": self.strategy.name,
                "options": {"delta": self.spec.delta, **self.spec.strategy_options},
                "image_ids": list(image_ids),
                "to_evaluate": list(reserve),
                "reserve": self.reserve,
                "older": older,
                "first": list(first),
                "last": list(last),
                "quotas": report,
                "without_quotas": {} if quotas is None else _distance(quotas),
                "candidate_ids": list(chosen.candidate_ids),
                "utilities": list(chosen.utilities.items()),
                "explanations": {str(i): e.as_dict() for i, e in chosen.explanations.items() if i in set(picked)},
                "queue": list(queue),
            },
        )
        self._drop_done_pins()
        self.ports.observer.report_problem(QUOTAS, _quota_problem(report))
        self._draw_map(image_ids)
        return {"query_set": len(image_ids), "to_evaluate": len(reserve), "queue": len(queue)}

    def _hold_quotas(self, chosen: QuerySet, picked: Sequence[int], given: Sequence[int]) -> Constrained | None:
        """The picks under the quotas; None without any. ``given`` are images of the query set that stay as they are."""
        if not self.steering.quotas:
            return None
        needed = [
            max(0, quota.needed(len(picked) + len(given)) - len(group & set(given)))
            for quota, group in zip(self.steering.quotas, self._quota_groups, strict=True)
        ]
        kept = {i: e for i, e in chosen.explanations.items() if i in set(picked)}
        query = QuerySet(tuple(picked), chosen.utilities, chosen.candidate_ids, kept)
        return hold_quotas(self.strategy, self.context, query, self._quota_groups, needed, self._rng())

    def _quota_report(self, held: Constrained, given: Sequence[int]) -> list[dict[str, Any]]:
        """Each quota: its words, the images of the query set that it needs and has, and those that it is held by."""
        there = (*given, *held.query.image_ids)
        return [
            {
                "text": quota.text,
                "needed": quota.needed(len(there)),
                "reached": sum(i in group for i in there),
                "in_pool": len(group),
                "image_ids": [i for i in there if i in group],
                "entered": [i for i in held.entered if i in group],
            }
            for quota, group in zip(self.steering.quotas, self._quota_groups, strict=True)
        ]

    @cached_property
    def _quota_groups(self) -> list[frozenset[int]]:
        """For each quota the images of the pool that count for it."""
        labels = self.labels if self.model is None else self.model.labels
        path = self.folder / "dataset/data.json"
        data = {int(i): of for i, of in self.folder.read("dataset/data.json")} if path.is_file() else {}
        seen: dict[int, set[str]] = {}
        if any(quota.kind == "label" for quota in self.steering.quotas):
            for detections in self._stored().without_embeddings():
                sure = np.asarray(detections.scores) >= self.spec.score_threshold
                classes = np.unique(np.asarray(detections.class_indices)[sure]).tolist()
                seen[detections.image_id] = {labels[c] for c in classes}
        ids = [entry.image_id for entry in self.pool]
        return [
            frozenset(i for i in ids if quota.holds(seen.get(i, ()), data.get(i, {}))) for quota in self.steering.quotas
        ]

    def _drop_done_pins(self) -> None:
        """Forget pins of tasks that are labelled by now, and those of tasks that are gone, which people are told.

        Pins set after the export began wait for the ranking that they asked for: their tasks may be newer."""
        known = self.folder.read(STEERING) if (self.folder / STEERING).is_file() else None  # None: an earlier release's
        pins = self.steering.pins_of(Steering.from_dict(known))
        there = {*(e.image_id for e in self.pool), *self.folder.read("dataset/unreadable.json")}
        over = {i: at for i, at in pins.items() if i not in there}
        labelled = {entry.image_id for entry in self._labelled}
        gone = [i for i in over if i not in labelled]
        if over:
            self.ports.observer.fence()
            self.ports.steering.drop(over)
        self.ports.observer.report_problem(PINS, _dropped_pins_problem(gone))

    @cached_property
    def steering(self) -> Steering:
        """What people ask of the queue, read when candidates are chosen and kept for the steps after."""
        if self.folder.is_done("candidates"):
            return Steering.from_dict(self.folder.read("candidates.json").get("steering"))
        return self.ports.steering.read()

    @cached_property
    def pins(self) -> Steering:
        """The pinned tasks of the pool."""
        there = {entry.image_id for entry in self.pool}
        first, last = (tuple(i for i in ids if i in there) for ids in (self.steering.first, self.steering.last))
        return Steering(first, last)

    def _draw_map(self, chosen: Sequence[int]) -> None:
        """Leave the map, where it is asked for and images were described."""
        pool = self._stored()
        features = pool.features(FEATURE) if self.spec.draw_map else None
        if features is None:
            return
        drawn = {entry.image_id for entry in self._drawn()}
        seen = StoredDetections(self.folder / "labelled_detections", drawn, embeddings=False)
        known = seen.features(FEATURE)
        labelled = {} if known is None else dict(zip(seen.image_ids, known, strict=True))
        rows = pool_to_draw(pool.image_ids, chosen)
        shown = {pool.image_ids[row]: features[row] for row in rows}
        self.folder.write(MAP, map_of(shown, labelled, self._labelled, len(pool)))

    def _drawn(self) -> list[PoolEntry]:
        """The labelled images on the map; none where no map is asked for."""
        return labelled_to_draw(self._labelled, len(self.pool)) if self.spec.draw_map else []

    @cached_property
    def _labelled(self) -> list[PoolEntry]:
        """All labelled images, those that no training sees included."""
        others = [path for path in (self.folder / VALIDATION, self.folder / HELD_OUT) if path.is_file()]
        sets = [self.train_set, *(CocoDataset.read(path) for path in others)]
        return [entry for one in sets for entry in labelled_entries(one)]

    def step_publish(self) -> dict[str, Any]:
        queue = read_queue(self.folder)
        state = self.folder.read("publish.json") if (self.folder / "publish.json").is_file() else None
        last = state or {}

        def on_state(new: dict[str, Any]) -> None:
            nonlocal last
            self.ports.observer.fence()
            self.folder.write("publish.json", new)
            last = new

        version = self.ports.publisher.publish(self.spec, self.model, queue, state, on_state)
        published = int(last.get("expected", len(queue))) + len(last.get("gone", ()))
        return {"version": version, "tasks": len(queue), "published": published}

    def result(self) -> RoundResult:
        metrics = self.folder.read("metrics.json") if self.spec.kind == "train" else {}
        facts = self.folder.facts("dataset")
        counts = {k: facts[k] for k in ("labelled_images", "labelled_boxes", "held_out_images", "pool_images")}
        return RoundResult(
            version=str(self.folder.facts("publish")["version"]),
            model=self.model,
            metrics={
                **metrics,
                **counts,
                **self._slicing(),
                "trained_on_everything": self.spec.train_on_everything,
                "known": {label: list(names) for label, names in self.spec.known.items()},
            },
            queue=tuple(self.queue),
            seconds=self.folder.seconds(),
        )

    def _slicing(self) -> dict[str, Any]:
        """Whether the training learned from tiles, and why, where it was asked to or to decide."""
        facts = self.folder.facts("train") if self.spec.kind == "train" else {}
        return {key: facts[key] for key in ("slices", "why_slices") if key in facts}

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.folder.read("dataset/labels.json"))

    @property
    def queue(self) -> list[int]:
        return list(self.folder.read("query_set.json")["queue"])

    @property
    def model(self) -> ModelRef | None:
        """The model that ranks: the one this round trained or adopted (or a better one, see ``keep_better``), or for a
        ``rank`` round the one it was given."""
        if self.spec.kind == "rank":
            return self._own_model("adopt") if self.spec.is_as_is else self.spec.model
        metrics = self.folder.read("metrics.json") if self.folder.is_done("evaluate") else {}
        if metrics.get("in_force"):
            stayed = ModelRef.from_dict(metrics["in_force"])
            return stayed if Path(stayed.checkpoint).is_file() else self.ports.earlier().models[metrics["active"]]
        return self._own_model("train")

    def _own_model(self, step: str) -> ModelRef | None:
        stored = self.folder.read(f"{step}/model.json")
        if stored is None:
            return None
        model = ModelRef.from_dict(stored)
        return replace(model, checkpoint=self.folder.checkpoint(model.checkpoint))

    def _need_model(self) -> ModelRef:
        model = self.model
        if model is None:
            raise ValueError("expected a trained model at this step, got none")
        return model

    @property
    def strategy(self) -> Any:
        if self.model is None:
            return get_strategy(self.folder.facts("infer").get("strategy", "random"))
        given = {"delta": self.spec.delta, **self.spec.strategy_options, "similarity": self.ports.similarity}
        return get_strategy(self.spec.strategy, **given)

    @property
    def looks_at_labelled(self) -> bool:
        """Whether the strategy is to see the model's detections on labelled images."""
        return self.spec.look_at_labelled or self.spec.strategy in USES_LABELLED

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng([self.spec.seed, self.spec.number])

    @cached_property
    def pool(self) -> list[PoolEntry]:
        return [PoolEntry(**entry) for entry in self.folder.read("dataset/pool.json")]

    @cached_property
    def reserve(self) -> list[int]:
        """Tasks of the pool that are kept for the evaluation set, in the order in which they are to be labelled, but
        for pinned ones: these come where people put them, and their side stays what the hash draws."""
        drawn = [int(i) for i in self.folder.read(SPLIT)["reserve"]] if (self.folder / SPLIT).is_file() else []
        pinned = {*self.pins.first, *self.pins.last}
        return [i for i in drawn if i not in pinned]

    @cached_property
    def to_evaluate(self) -> list[int]:
        """Those of them that belong to this round's query set."""
        if not self.reserve:
            return []
        split, spec = self.folder.read(SPLIT), self.spec
        members = len(split[EVALUATION])
        labelled = members + len(split[TRAINING])
        wanted = evaluation_set.wanted(members, labelled, split["full"], spec.budget, spec.holdout_fraction)
        pinned = len(set(split["reserve"]) & set(self.pins.first))
        return self.reserve[: max(0, wanted - pinned)]

    @property
    def _budget(self) -> int:
        """Images that the strategy is to choose."""
        return max(1, self.spec.budget - len(self.to_evaluate) - len(self.pins.first))

    @cached_property
    def train_set(self) -> CocoDataset:
        """The labelled images that the round trains on."""
        return CocoDataset.read(self.folder / "dataset" / "train.json")

    @cached_property
    def context(self) -> QueryContext:
        """What the strategy sees: images in the order they were looked at, which stay on disk until they are read."""
        model, needs = self.model, self.strategy.needs
        labels = self.labels if model is None else model.labels
        truth = truth_by_image(self.train_set, labels) if self.looks_at_labelled else {}
        pool = self._stored({*self.reserve, *self.pins.first, *self.pins.last})
        labelled = StoredDetections(
            self.folder / "labelled_detections",
            truth,
            embeddings="embeddings" in needs,
            mark=lambda d: mark_true_positives(d, truth[d.image_id]),
        )
        return QueryContext(
            pool=pool,
            num_classes=len(labels),
            difficulty=None if model is None else _difficulty(model),
            class_counts=np.asarray(self.train_set.class_counts(labels)),
            labelled=labelled,
            image_features=_features(pool, needs),
            labelled_features=_features(labelled, needs),
        )

    def _stored(self, left_out: Collection[int] = ()) -> StoredDetections:
        """What was detected on the pool."""
        ids = {entry.image_id for entry in self.pool if entry.image_id not in left_out}
        return StoredDetections(self.folder / "detections", ids, embeddings="embeddings" in self.strategy.needs)


def _features(images: StoredDetections, needs: Iterable[str]) -> dict[str, np.ndarray]:
    """The image features among ``needs`` that there are, mapped from disk."""
    found = {name: images.features(name) for name in needs if name != "embeddings"}
    return {name: value for name, value in found.items() if value is not None}


def _without_positives(model: ModelRef, train: CocoDataset) -> dict[str, int]:
    """Labelled boxes of classes that training never found a positive for: their difficulty is still what it began
    with. Nothing where difficulties were not followed."""
    boxes = dict(zip(train.labels, train.class_counts(), strict=True))
    difficulties = zip(model.labels, model.difficulty or (), strict=False)
    return {label: boxes[label] for label, d in difficulties if d >= 1.0 and boxes.get(label)}


def _unmatched_problem(boxes: Mapping[str, int]) -> str:
    """One sentence about classes that the training learned nothing of, "" when there are none."""
    if not boxes:
        return ""
    named = ", ".join(f"{label} ({boxes[label]})" for label in list(boxes)[:5])
    classes = count(len(boxes), "labelled class", "labelled classes")
    return (
        f"the training learned nothing of {classes}: {named}; the boxes may be too small for the detector: set slices "
        "to auto, or choose one with a larger input"
    )


def _distance(held: Constrained) -> dict[str, Any]:
    """How far a query set is from the one that the strategy chose without quotas."""
    return {"entered": list(held.entered), "left": list(held.left), "utility_share": held.utility_share}


def _quota_problem(report: Sequence[Mapping[str, Any]]) -> str:
    """One sentence about quotas that the query set does not hold, "" when it holds all."""
    short = [
        f"{q['text']}: {q['reached']} of {q['needed']}, the pool has {q['in_pool']}"
        for q in report
        if q["reached"] < q["needed"]
    ]
    if not short:
        return ""
    return f"the query set misses {count(len(short), 'quota')} ({' | '.join(short)}); lower it, or take it back"


def _dropped_pins_problem(task_ids: Sequence[int]) -> str:
    """One sentence about pins that were dropped, "" when none was."""
    if not task_ids:
        return ""
    pins, tasks = count(len(task_ids), "pin"), listed(task_ids)
    return f"{pins} dropped: no task to label is {tasks} any more; pin others where they matter"


def _is_worse(metrics: Mapping[str, Any]) -> bool:
    difference = Quality.of(metrics).comparison
    return difference is not None and difference.verdict == "worse"


def _difficulty(model: ModelRef) -> np.ndarray:
    """``[C]`` difficulties; where they were not followed all are 0, which Eq. 4 turns into a weight of 1."""
    return np.zeros(len(model.labels)) if model.difficulty is None else np.asarray(model.difficulty)
