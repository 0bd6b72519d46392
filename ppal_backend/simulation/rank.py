"""``ppal rank``: order a pool of images with a trained detector, without Label Studio."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppal_backend.datasets.coco import CocoCategory, CocoDataset
from ppal_backend.datasets.ground_truth import read_user_coco
from ppal_backend.engines.foreign import adopt_checkpoint
from ppal_backend.engines.local import LocalEngine
from ppal_backend.errors import DatasetError, SettingsError
from ppal_backend.files import atomic_file, read_json, sha256_of, write_json
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import Engine, PoolEntry, Ports, PreparedData
from ppal_backend.rounds.run import run_round
from ppal_backend.settings import load_settings
from ppal_backend.simulation.oracle import Discard
from ppal_backend.simulation.plan import SCORE_THRESHOLD
from ppal_backend.simulation.variants import Variant, parse_variants
from ppal_backend.structures.round import ModelRef, OnProgress, Progress, RoundSpec

CSV, JSON = "ranking.csv", "ranking.json"
_COLUMNS = ("rank", "image_id", "file_name", "chosen", "utility", "utility_rank", "classes", "cluster_size",
            "nearest_chosen", "nearest_similarity")  # fmt: skip


@dataclass(frozen=True)
class RankOptions:
    """What to order and with what.

    Args:
        data: COCO file of the pool; only its ``images`` are read.
        checkpoint: Trained detector: ours, or an mmdetection checkpoint of yours.
        budget: Images to choose (or boxes, with ``unit=boxes`` among the strategy's options).
        out: Folder for ``ranking.csv`` and ``ranking.json``.
        images: Folder of relative file names; ``images`` beside the file, else the file's folder, by default.
        strategy: A strategy with its options, such as ``ppal:delta=2``.
        labelled: COCO file of images labelled already; they leave the pool, and strategies may look at them.
        detector: Name in the zoo, for checkpoints that do not say.
        config: mmdetection config, for detectors that are not in the zoo.
        classes: Labels in the order of the class indices, for checkpoints that do not say.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        seed: Of strategies that draw.
    """

    data: Path
    checkpoint: Path
    budget: int
    out: Path
    images: Path | None = None
    strategy: str = "ppal"
    labelled: Path | None = None
    detector: str | None = None
    config: Path | None = None
    classes: Sequence[str] = field(default_factory=tuple)
    device: str = "auto"
    seed: int = 0


def rank(
    options: RankOptions,
    on_progress: OnProgress | None = None,
    engine_of: Callable[[Path | None], Engine] | None = None,
) -> Path:
    """Order a pool and write the order with explanations.

    An interrupted call goes on where it stopped when it is given again.

    Args:
        options: What to order.
        on_progress: Told about inference.
        engine_of: Makes the engine for a zoo folder; this machine by default.

    Returns:
        Path of ``ranking.csv``.

    Raises:
        DatasetError: The pool has no images, files are missing, or the budget (in boxes) is too small for any image.
        SettingsError: The strategy does not exist, or an option of it is for simulations alone.
        CheckpointError: The checkpoint cannot be used.
    """
    variant = parse_variants([options.strategy])[0]
    if variant.changes_detector:
        raise SettingsError(
            f"strategy {variant.strategy!r} changes the detector and runs in simulations only (ppal simulate); choose "
            f"another"
        )
    beside = sorted({*variant.as_dict()} - {"strategy", *variant.options, *variant.inference})
    if beside:
        raise SettingsError(
            f"strategy {variant.strategy!r}: expected options of the choice itself, got {', '.join(beside)} beside; "
            f"leave them out"
        )
    if options.budget < 1:
        raise DatasetError(f"expected a budget of at least 1, got {options.budget}; ask for more")
    out, work = Path(options.out), Path(options.out) / ".work"
    settings = load_settings()
    model, zoo = adopt_checkpoint(
        options.checkpoint,
        out / ".model",
        detector=options.detector,
        config=options.config,
        classes=options.classes,
        zoo_root=settings.model_zoo,
    )
    source = _source(options, model)
    spec = _spec(options, variant, model)
    _claim(
        work,
        {
            "spec": spec.as_dict(),
            "images": [e.image_id for e in source.pool],
            "model": sha256_of(Path(options.checkpoint)),
            "labelled": None if options.labelled is None else sha256_of(Path(options.labelled)),
        },
    )
    engine = engine_of(zoo) if engine_of else LocalEngine(zoo, settings.threads, weights_dir=settings.weights_dir)
    folder = RoundFolder(work)
    run_round(spec, folder, Ports(source, engine, Discard(), _Silent(on_progress)))
    if not folder.read("query_set.json")["image_ids"]:
        raise DatasetError(
            f"expected to choose at least one image, got none: each of the {len(source.pool)} in the pool has more "
            f"predicted boxes than the budget of {options.budget}; give a larger --budget"
        )
    _write(folder, source.pool, model.labels, out)
    shutil.rmtree(work)
    shutil.rmtree(out / ".model", ignore_errors=True)
    return out / CSV


@dataclass(frozen=True)
class _FileSource:
    """Task source: a pool and labelled images from files."""

    pool: tuple[PoolEntry, ...]
    labelled: CocoDataset

    def export(self, folder: Path) -> Sequence[int]:
        folder.mkdir(parents=True, exist_ok=True)
        return [row.id for row in self.labelled.annotations]

    def prepare(self, folder: Path, on_progress: OnProgress) -> PreparedData:
        return PreparedData(self.labelled, self.pool, self.labelled.labels, {})


class _Silent:
    """Observer that passes progress on."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress

    def report_problem(self, topic: str, problem: str) -> None:
        """Nobody to tell."""

    def fence(self) -> None:
        """Nobody else runs this round."""

    def exported(self, annotation_ids: Sequence[int]) -> None:
        """Nothing to remember."""

    def step_started(self, step: str) -> None:
        """Nothing to tell."""

    def progress(self, progress: Progress) -> None:
        if self._on_progress is not None:
            self._on_progress(progress)

    def should_stop(self) -> bool:
        return False


def _source(options: RankOptions, model: ModelRef) -> _FileSource:
    categories = tuple(CocoCategory(number, label) for number, label in enumerate(model.labels, start=1))
    labelled = CocoDataset((), (), categories)
    if options.labelled is not None:
        labelled = read_user_coco(options.labelled, options.images, keep_crowd=True).dataset
    known = {image.file_name for image in labelled.images}
    everything = read_user_coco(options.data, options.images, labels=model.labels).dataset
    pool = [image for image in everything.images if image.file_name not in known]
    shared = sorted({image.id for image in pool} & set(labelled.image_ids))
    if shared:
        raise DatasetError(
            f"expected ids of labelled images to be theirs alone, got {shared[:5]} in the pool; renumber"
        )
    if not pool:
        raise DatasetError(f"expected unlabelled images in {options.data}, got none; use another file")
    entries = sorted((PoolEntry(i.id, i.file_name, i.width, i.height) for i in pool), key=lambda e: e.image_id)
    return _FileSource(tuple(entries), labelled)


def _spec(options: RankOptions, variant: Variant, model: ModelRef) -> RoundSpec:
    settings = dict(variant.options)
    return RoundSpec(
        project_id=0,
        project_key="rank",
        number=1,
        kind="rank",
        detector=model.detector,
        strategy=variant.strategy,
        budget=options.budget,
        delta=float(settings.pop("delta", 4.0)),
        seed=options.seed,
        score_threshold=SCORE_THRESHOLD,
        holdout_fraction=0.0,
        device=options.device,
        model=model,
        strategy_options=settings,
        **variant.inference,
        look_at_labelled=variant.looks_at_labelled and options.labelled is not None,
    )


def _claim(work: Path, request: Mapping[str, Any]) -> None:
    """Go on with what an interrupted call left, if it was asked for the same."""
    note = work / "request.json"
    plain = json.loads(json.dumps(request))
    if note.is_file() and read_json(note) == plain:
        return
    shutil.rmtree(work, ignore_errors=True)
    write_json(note, plain)


def _write(folder: RoundFolder, pool: Sequence[PoolEntry], labels: Sequence[str], out: Path) -> None:
    found = folder.read("query_set.json")
    paths = {entry.image_id: entry.path for entry in pool}
    utilities = {int(i): u for i, u in found["utilities"]}
    rows, chosen = [], set(found["image_ids"])
    for place, image_id in enumerate(found["queue"]):
        why = found["explanations"].get(str(image_id), {})
        classes = [{**c, "label": labels[c["class_index"]]} for c in why.get("classes", ())]
        boxes = [{**b, "label": labels[b["class_index"]]} for b in why.get("boxes", ())]
        row = {"rank": place, "image_id": image_id, "file_name": paths[image_id], "chosen": image_id in chosen}
        more = {"classes": classes, "boxes": boxes} if why else {}
        rows.append({**why, **more, **row, "utility": utilities.get(image_id)})
    write_json(
        out / JSON, {"strategy": found["strategy"], "budget": len(chosen), "labels": list(labels), "queue": rows}
    )
    with atomic_file(out / CSV, "w") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            shares = " ".join(f"{c['label']}:{c['contribution']:.3f}" for c in row.get("classes", ()))
            writer.writerow({**row, "classes": shares, "chosen": int(row["chosen"])})
