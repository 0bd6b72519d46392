"""A project whose rounds ran through the real step line, with a world that learns; and the app that shows it."""

from dataclasses import replace

import pytest

from ppal_backend.service.app import create_app
from tests.operations.conftest import Place
from tests.rounds.fakes import FakeWorld
from tests.service.conftest import FakeImages, FakePredictor, RecordingJobs

TOKEN, PASSWORD = "t0ken" * 8, "correct horse battery"
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8ffff3f0005fe02fea1399e4b"
    "0000000049454e44ae426082"
)


class LearningWorld(FakeWorld):
    """Ten more labelled images in each training, and an mAP that grows with them; images lie in the cache."""

    def __init__(self, cache):
        super().__init__(labelled=10)
        self.cache = cache
        cache.mkdir(parents=True)

    def prepare(self, folder, on_progress):
        data = super().prepare(folder, on_progress)
        pool = [replace(e, path=str(self.cache / f"{e.image_id}.png")) for e in data.pool]
        for entry in pool:
            (self.cache / f"{entry.image_id}.png").write_bytes(PIXEL)
        return replace(data, pool=pool)

    def evaluate(self, spec, model, ann_json):
        value = 0.7 - 1.2 * self.labelled**-0.5
        per_class = {"cat": value + 0.1, "dog": value - 0.1}
        return {"map": value, "map50": value + 0.2, "per_class": per_class, "images": 6, "instances": 9}


class ShownPlace(Place):
    """A data folder with rounds, and the app over it."""

    def __init__(self, root):
        super().__init__(root, LABEL_STUDIO_API_KEY=TOKEN)
        self.world = LearningWorld(self.settings.model_dir.resolve() / "images")
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
def place(tmp_path):
    place = ShownPlace(tmp_path / "data")
    yield place
    place.store.close()


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
