"""A project with a few finished rounds: their files on disk, their versions in the store and in Label Studio."""

from functools import partial

from ppal_backend.label_studio.publish import LabelStudioPublisher
from ppal_backend.rounds.ports import Ports
from ppal_backend.settings import load_settings
from ppal_backend.store import ProjectSides, ProjectSteering, open_store
from ppal_backend.worker.round_process import earlier_models, run_next_round
from tests.label_studio.fake import FakeLabelStudio
from tests.rounds.fakes import FakeWorld

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="cat"/><Label value="dog"/></RectangleLabels></View>'
)


class Place:
    """A data folder, its store, and a Label Studio in memory that rounds publish to."""

    def __init__(self, root, **settings):
        self.settings = load_settings(MODEL_DIR=root, START_TRAINING_EACH_N_UPDATES=5, min_free_gib=0, **settings)
        self.store = open_store(self.settings)
        self.store.projects.connect(1, "1.1", CONFIG, "http://ls.test:8080", {})
        self.label_studio = FakeLabelStudio(tasks=0)
        self.label_studio.project["label_config"] = CONFIG
        for i in range(30):
            self.label_studio.add_task(1000 + i)
        self.client = self.label_studio.client()
        self.world = FakeWorld()

    def ports(self, settings, store, project, spec, observer):
        return Ports(
            self.world,
            self.world,
            LabelStudioPublisher(self.client, settings.keep_versions, most=settings.publish_tasks),
            observer,
            ProjectSides(store.sides, project.id, spec.number),
            partial(earlier_models, settings, store, project, spec.number),
            ProjectSteering(store.steering, project.id),
            partial(store.approvals.annotations, project.id),
        )

    def round(self, kind="train", reason="test"):
        """Run one round; its record."""
        record = self.store.rounds.request(1, kind, reason)
        self.run()
        return self.store.rounds.get(record.id)

    def run(self):
        return run_next_round(self.settings, 1, partial(self.ports))

    def versions(self):
        return [v.version for v in self.store.versions.of_project(1)]

    def folder(self, number):
        return self.settings.project_folder(1) / "rounds" / str(number)
