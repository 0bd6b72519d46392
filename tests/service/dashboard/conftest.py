"""A project whose rounds ran through the real step line, with a world that learns; and the app that shows it."""

from dataclasses import replace

import numpy as np
import pytest

from ppal_backend.datasets.coco import CocoAnnotation, CocoDataset, CocoImage, result_row, write_predictions
from ppal_backend.service.app import create_app
from ppal_backend.structures.quality import FEWEST_IMAGES
from tests.place import Place
from tests.rounds.fakes import FakeWorld, detections_of
from tests.service.conftest import FakeImages, FakePredictor, RecordingJobs

TOKEN, PASSWORD = "t0ken" * 8, "correct horse battery"
COUNTS = {"tasks": 2, "kept": 3, "moved": 1, "relabelled": 1, "removed": 1, "added": 2}
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8ffff3f0005fe02fea1399e4b"
    "0000000049454e44ae426082"
)


class LearningWorld(FakeWorld):
    """Ten more labelled images in each training, and an mAP that grows with them; images lie in the cache."""

    def __init__(self, cache):
        super().__init__(labelled=10)
        self.values, self.evaluated = {}, 12
        self.cache = cache
        cache.mkdir(parents=True)

    def prepare(self, folder, on_progress):
        data = super().prepare(folder, on_progress)
        pool = [replace(e, path=self.file(e.image_id)) for e in data.pool]
        labelled = replace(data.labelled, images=[replace(i, file_name=self.file(i.id)) for i in data.labelled.images])
        return replace(data, pool=pool, labelled=labelled)

    def file(self, image_id):
        path = self.cache / f"{image_id}.png"
        path.write_bytes(PIXEL)
        return str(path)

    def evaluate(self, spec, model, ann_json, earlier=None, folder=None):
        found = self.measured(self.labelled)
        if folder is None:
            return {"map": found["map"], "map50": found["map"] + 0.2, "per_class": found["classes"], "images": 12}
        self.values[spec.number] = self.labelled
        self.keep_predictions(CocoDataset.read(ann_json), folder / f"{spec.number}.npz", model.labels)
        others = {n: self.measured(self.values[n]) for n in earlier if n in self.values}
        gains = {n: found["map"] - o["map"] for n, o in others.items()}
        differences = {n: {"map": gain, "interval": [gain - 0.03, gain + 0.03]} for n, gain in gains.items()}
        return {"map": found["map"], "map50": found["map"] + 0.2, "per_class": found["classes"], "images": 12,
                "instances": 19, "measured": found, "earlier": others, "differences": differences,
                "problems": {}}  # fmt: skip

    def keep_predictions(self, evaluation, path, labels):
        """Of five images in a row: found, found under another label, missed, found beside, found twice; each with a
        box where nothing is, and one too weak to be shown."""
        kept = {}
        for image in evaluation.images:
            truth = image.id % 2
            box = [10.0, 10.0, 20.0, 20.0]
            rows = [(box, 0.9, truth)], [(box, 0.8, 1 - truth)], [], [([22.0, 10.0, 20.0, 20.0], 0.7, truth)], [
                (box, 0.9, truth), (box, 0.6, truth)]  # fmt: skip
            found = [*rows[image.id % 5], ([60.0, 50.0, 20.0, 20.0], 0.4, 0), ([70.0, 5.0, 9.0, 9.0], 0.1, 0)]
            kept[image.id] = [result_row(image.id, np.array(b), score, c) for b, score, c in found]
        write_predictions(path, kept, labels)

    def measured(self, labelled):
        value = 0.7 - 1.2 * labelled**-0.5
        few = self.evaluated < FEWEST_IMAGES
        return {"map": value, "interval": None if few else [value - 0.05, value + 0.04], "images": self.evaluated,
                "classes": {"cat": value + 0.1, "dog": value - 0.1}, "too_few": {"emu": 2}}  # fmt: skip


class ReviewedWorld(LearningWorld):
    """From the second round on, pool images are labelled as the model sees them but for its surest box's label."""

    def prepare(self, folder, on_progress):
        data = super().prepare(folder, on_progress)
        if self.labelled <= 10:
            return data
        coco, rows, images = data.labelled, list(data.labelled.annotations), list(data.labelled.images)
        for entry in data.pool[:20]:
            found = detections_of(entry.image_id)
            surest = max(range(len(found)), key=found.scores.__getitem__, default=0)
            images.append(CocoImage(entry.image_id, entry.path, entry.width, entry.height))
            for number, (box, c) in enumerate(zip(found.boxes_xyxy, found.class_indices, strict=True)):
                x1, y1, x2, y2 = box.tolist()
                label = 1 + (int(c) + (number == surest)) % 2
                rows.append(CocoAnnotation(len(rows) + 1, entry.image_id, label, (x1, y1, x2 - x1, y2 - y1)))
        labelled = replace(coco, images=tuple(images), annotations=tuple(rows))
        report = {
            **data.report,
            "agreement": {"ppal-r1-x": COUNTS, "ppal-r0-y": {**dict.fromkeys(COUNTS, 0), "added": 9}},
        }
        report["conversion"] = {"images": 30, "boxes": 61, "negatives": 2, "unannotated": 3, "missing_images": 4,
                                "unknown_labels": {"<zebra>": 5}, "rotated": 6, "clipped": 7, "degenerate": 8,
                                "malformed": 9, "other_regions": {"polygonlabels": 10}}  # fmt: skip
        counts = {"same": 6, "other_label": 2, "alone": 2}
        report["people"] = {
            "tasks": 3, "worst": [{"task": 4, "agreement": 0.25, "people": [1, 2]}], "by_task": [[4, 0.25]],
            "classes": {"<dog>": counts}, "pairs": [{"people": [1, 2], "tasks": 3, **counts}],
        }  # fmt: skip
        return replace(data, labelled=labelled, pool=data.pool[20:], report=report)


class ShownPlace(Place):
    """A data folder with rounds, and the app over it."""

    def __init__(self, root, world=LearningWorld, **settings):
        super().__init__(root, LABEL_STUDIO_API_KEY=TOKEN, **settings)
        self.world = world(self.settings.model_dir.resolve() / "images")
        self.jobs = RecordingJobs()

    def train(self, times=1):
        for _ in range(times):
            self.round()
            self.world.labelled += 10

    def app(self, **changes):
        settings = self.settings.model_copy(update=changes)
        app = create_app(settings, store=self.store, jobs=self.jobs, predictor=FakePredictor(), images=FakeImages(None))
        self.jobs.notifiers.append(app.extensions["ppal"].notifier)
        return app


@pytest.fixture
def place(make_place):
    return make_place(ShownPlace)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Five trainings; for tests that only look."""
    place = ShownPlace(tmp_path_factory.mktemp("trained") / "data")
    place.train(5)
    yield place
    place.store.close()


@pytest.fixture
def client(trained):
    return trained.app().test_client()
