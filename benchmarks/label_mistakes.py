"""Whether planted mistakes come first among what is worth a second look, and how many shown boxes are right.

    python -m benchmarks.label_mistakes --data DIR --trained FOLDER [--projects 20] [--work DIR] [--json]

``DIR`` holds ``images/``, ``pool.json`` and ``test.json`` (COCO), ``FOLDER`` is one that ``benchmarks.photographs
--work`` left: ``train.json`` and ``work/final.pth``. Nothing is trained. The detector looks once at every image that it
was not trained on (kept in ``--work``). Each project draws ``--images`` of them: 40 measure, the others are reviewed.
In all of them 5 % of the boxes are taken away, 5 % moved (by a third to a half of their sides) and 5 % given another
label. A doubt is right when it is about a planted mistake: the box that was moved or relabelled, or the place (IoU 0.5)
of one that was taken away.

The second part asks on the images that do not measure which share of the boxes that annotators would be shown they
could keep (the right label at IoU 0.5, as COCO matches), with the threshold of the settings alone and with those of the
classes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.acquisition.label_quality import Compared, disputes_of, sure_from
from ppal_backend.datasets.coco import (
    CocoAnnotation,
    CocoDataset,
    CocoImage,
    Predicted,
    read_prediction_arrays,
    result_row,
)
from ppal_backend.detector.data import read_coco
from ppal_backend.detector.infer.evaluation import coco_metrics, kept_predictions
from ppal_backend.rounds.labelled import Truth, truth_by_image
from ppal_backend.rounds.model_errors import Judgement, judge
from ppal_backend.rounds.review import LEAST_AP, LISTED_SHARE, strongest_first
from ppal_backend.settings import ProjectDefaults
from ppal_backend.simulation.data import DataSource
from ppal_backend.structures.detections import pairwise_iou
from ppal_backend.structures.round import ModelRef

SHARE = 0.05
MEASURING = 40
FIRST = 20
FLOOR: float = ProjectDefaults.model_fields["score_threshold"].default


KEPT_SHARE = 0.5
"""Share of the boxes shown to annotators that should be right."""
FEWEST_DETECTIONS = 10


@dataclass(frozen=True)
class Threshold:
    """From which score on a class's boxes are shown to annotators.

    Args:
        score: In [0, 1]; above 1 for none at all.
        right: How many of the ``shown`` detections of the evaluation set with such a score are right.
        shown: See there.
        of: Detections of the class from the floor on.
    """

    score: float
    right: int
    shown: int
    of: int


NEVER = 1.01


def thresholds_of(judgement: Judgement, labels: Sequence[str], floor: float) -> dict[str, Threshold]:
    """The lowest score, but not below the floor, from which at least half of a class's detections are right.

    Args:
        judgement: Of the evaluation set, with all detections from ``floor`` on.
        labels: Of the detector, by class index.
        floor: What people have set.

    Returns:
        By label, for classes with ``FEWEST_DETECTIONS`` detections or more; too little is known of the others.
    """
    found: dict[str, Threshold] = {}
    for index, label in enumerate(labels):
        rows = [(i.score, i.kind == "right") for i in judgement.items if i.detected == index and i.score is not None]
        if len(rows) < FEWEST_DETECTIONS:
            continue
        rows.sort(key=lambda row: -row[0])
        right = np.cumsum([is_right for _, is_right in rows])
        enough = np.flatnonzero(right >= KEPT_SHARE * np.arange(1, len(rows) + 1))
        shown = int(enough[-1]) + 1 if len(enough) else 0
        score = floor if shown == len(rows) else rows[shown - 1][0] if shown else NEVER
        found[label] = Threshold(max(floor, score), int(right[shown - 1]) if shown else 0, shown, len(rows))
    return found


@dataclass(frozen=True)
class Planted:
    """Annotations with mistakes: rows of wrong boxes by image id, and boxes that are missing (x1, y1, x2, y2 in px)."""

    data: CocoDataset
    wrong: Mapping[int, frozenset[int]]
    missing: Mapping[int, np.ndarray]

    @property
    def count(self) -> int:
        """How many mistakes there are."""
        return sum(map(len, self.wrong.values())) + sum(map(len, self.missing.values()))


def plant(data: CocoDataset, rng: np.random.Generator) -> Planted:
    """Take away, move and relabel boxes, a share of ``SHARE`` each."""
    fates = rng.choice(4, len(data.annotations), p=[1 - 3 * SHARE, SHARE, SHARE, SHARE])
    sides = {image.id: (image.width, image.height) for image in data.images}
    kept: list[CocoAnnotation] = []
    wrong: dict[int, set[int]] = {i: set() for i in data.image_ids}
    missing: dict[int, list[tuple[float, ...]]] = {i: [] for i in data.image_ids}
    place = dict.fromkeys(data.image_ids, 0)
    for row, fate in zip(data.annotations, fates, strict=True):
        if fate == 1:
            x, y, w, h = row.bbox_xywh
            missing[row.image_id].append((x, y, x + w, y + h))
            continue
        if fate:
            wrong[row.image_id].add(place[row.image_id])
        kept.append(
            row if not fate else _moved(row, *sides[row.image_id], rng) if fate == 2 else _other(row, data, rng)
        )
        place[row.image_id] += 1
    boxes = {i: np.array(found, np.float64).reshape(-1, 4) for i, found in missing.items()}
    return Planted(
        CocoDataset(data.images, tuple(kept), data.categories), {i: frozenset(r) for i, r in wrong.items()}, boxes
    )


def _moved(row: CocoAnnotation, width: int, height: int, rng: np.random.Generator) -> CocoAnnotation:
    x, y, w, h = row.bbox_xywh
    dx, dy = rng.uniform(1 / 3, 1 / 2, 2) * (w, h)
    x = x + dx if x + dx + w <= width else max(0.0, x - dx)
    y = y + dy if y + dy + h <= height else max(0.0, y - dy)
    return replace(row, bbox_xywh=(float(x), float(y), w, h))


def _other(row: CocoAnnotation, data: CocoDataset, rng: np.random.Generator) -> CocoAnnotation:
    return replace(row, category_id=int(rng.choice([c.id for c in data.categories if c.id != row.category_id])))


def compared(truth: Truth, predicted: Predicted) -> Compared:
    """Annotations beside detections."""
    boxes, scores, classes = predicted
    return Compared(*truth, np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), classes, scores)


@dataclass(frozen=True)
class Seen:
    """Images that the detector was not trained on, and what it predicts there."""

    data: CocoDataset
    file: Path
    labels: tuple[str, ...]


def look(data: Path, trained: Path, work: Path) -> Seen:
    """Let the detector look at every image that it was not trained on, once."""
    source = DataSource("folder", data).load(work)
    known = set(CocoDataset.read(trained / "train.json").image_ids)
    pool = source.pool.subset([i for i in source.pool.image_ids if i not in known])
    both = {"pool": pool, "test": source.test}
    images: list[CocoImage] = []
    rows: list[CocoAnnotation] = []
    for part in both.values():  # numbered anew: both parts may have the same ids
        new = {image.id: len(images) + n for n, image in enumerate(part.images, start=1)}
        images += [replace(image, id=new[image.id]) for image in part.images]
        rows += [
            replace(row, id=len(rows) + n, image_id=new[row.image_id]) for n, row in enumerate(part.annotations, 1)
        ]
    joined, labels = CocoDataset(tuple(images), tuple(rows), source.test.categories), tuple(source.labels)
    truth, file = work / "unseen.json", work / f"{trained.name}.npz"
    joined.write(truth)
    name = str(json.loads((trained / "work" / "request.json").read_text())["detector"])
    model = ModelRef(name, str(trained / "work" / "final.pth"), labels)
    kept_predictions(file, model, read_coco(truth, labels), "cpu", None)
    return Seen(joined, file, labels)


def project(seen: Seen, images: int, rng: np.random.Generator, work: Path) -> dict[str, float]:
    """One project: what comes first on the page, and how many shown boxes are right."""
    chosen = rng.permutation(seen.data.image_ids)[:images].tolist()
    predicted = read_prediction_arrays(seen.file, seen.labels)
    planted = plant(seen.data.subset(chosen), rng)
    measuring, reviewed = chosen[:MEASURING], chosen[MEASURING:]
    rows = [row for i in measuring for row in _as_results(i, predicted[i])]
    measured = coco_metrics(
        _records(planted.data.subset(measuring), seen.labels, work), rows, seen.labels, True
    ).measured
    ap = measured.classes if measured is not None and measured.is_reportable else {}
    truth = truth_by_image(planted.data, seen.labels)
    pairs = {i: compared(truth[i], predicted[i]) for i in reviewed}
    sure = sure_from(pairs.values(), len(seen.labels))
    sure[[ap.get(label, 0.0) < LEAST_AP for label in seen.labels]] = np.inf
    doubts = {i: found for i, pair in pairs.items() if (found := disputes_of(pair, sure))}
    order = strongest_first(doubts)
    right = {i: [_is_planted(planted, pairs[i], i, d) for d in doubts[i]] for i in order}
    first, quarter = order[:FIRST], order[: round(LISTED_SHARE * len(reviewed))]
    mistakes = {i: len(planted.wrong[i]) + len(planted.missing[i]) for i in reviewed}
    total = sum(mistakes.values())
    clean = {i: predicted[i] for i in chosen}
    floor = [FLOOR] * len(seen.labels)
    thresholds = thresholds_of(judge(planted.data.subset(measuring), clean, seen.labels, floor), seen.labels, FLOOR)
    least = [thresholds[label].score if label in thresholds else FLOOR for label in seen.labels]
    shown = {
        name: judge(seen.data.subset(reviewed), clean, seen.labels, low)
        for name, low in (("floor", floor), ("class", least))
    }
    kept = {
        name: judged.count("right") / max(1, judged.count("right") + judged.count("wrong"))
        for name, judged in shown.items()
    }
    return {
        "images": len(reviewed), "planted": total, "with_mistakes": float(np.mean([n > 0 for n in mistakes.values()])),
        "disputed": len(order), "classes": sum(ap.get(label, 0.0) >= LEAST_AP for label in seen.labels),
        "precision_at_20": float(np.mean([any(right[i]) for i in first])) if first else 0.0,
        "strongest_right_at_20": float(np.mean([right[i][0] for i in first])) if first else 0.0,
        "in_first_quarter": sum(mistakes[i] for i in quarter) / total,
        "pointed_at_in_first_quarter": sum(sum(right[i]) for i in quarter) / total,
        "kept_floor": kept["floor"], "kept_class": kept["class"],
        "shown_floor": float(sum(shown["floor"].count(k) for k in ("right", "wrong"))),
        "shown_class": float(sum(shown["class"].count(k) for k in ("right", "wrong"))),
        "right_floor": float(shown["floor"].count("right")), "right_class": float(shown["class"].count("right")),
    }  # fmt: skip


def _as_results(image_id: int, predicted: Predicted) -> list[dict[str, Any]]:
    return [result_row(image_id, box, float(score), int(c)) for box, score, c in zip(*predicted, strict=True)]


def _records(data: CocoDataset, labels: Sequence[str], work: Path) -> Any:
    return read_coco(data.write(work / "measuring.json"), labels)


def _is_planted(planted: Planted, pair: Compared, image_id: int, dispute: Any) -> bool:
    if dispute.annotated is not None:
        return dispute.annotated in planted.wrong[image_id]
    missing = planted.missing[image_id]
    return bool(len(missing)) and bool((pairwise_iou(pair.detected[[dispute.detected]], missing) >= 0.5).any())


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks label_mistakes", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with images/, pool.json and test.json")
    parser.add_argument(
        "--trained", type=Path, nargs="+", required=True, help="folders of benchmarks.photographs --work"
    )
    parser.add_argument("--projects", type=int, default=10, help="how many for each (default: %(default)s)")
    parser.add_argument("--images", type=int, default=200, help="of a project (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="where predictions are kept (default: nowhere)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rows = []
        for trained in options.trained:
            seen = look(options.data, trained, work)
            rng = np.random.default_rng(0)
            found = [project(seen, options.images, rng, work) for _ in range(options.projects)]
            rows.append({"trained": trained.name, **{k: float(np.mean([f[k] for f in found])) for k in found[0]}})
    for row in rows:
        text = (
            json.dumps(row)
            if options.json
            else "  ".join(f"{k} {v if isinstance(v, str) else f'{v:.3g}'}" for k, v in row.items())
        )
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
