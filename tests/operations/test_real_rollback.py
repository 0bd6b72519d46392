"""Rolling back in a real Label Studio: the earlier queue is served again, in seconds."""

import json
import time

import pytest

from ppal_backend.label_studio.publish import LabelStudioPublisher
from ppal_backend.operations.control import roll_back
from ppal_backend.rounds.ports import PoolEntry, Ports, PreparedData
from ppal_backend.settings import load_settings
from ppal_backend.store import open_store
from ppal_backend.worker.round_process import run_next_round
from tests.label_studio.test_real_label_studio import Project
from tests.rounds.fakes import FakeWorld

pytestmark = pytest.mark.e2e


class World(FakeWorld):
    """The pool are the tasks of a real project."""

    def __init__(self, tasks):
        super().__init__()
        self.tasks = tasks

    def prepare(self, folder, on_progress):
        made = super().prepare(folder, on_progress)
        pool = [PoolEntry(i, f"/images/{i}.jpg", 100, 80) for i in self.tasks]
        return PreparedData(made.labelled, pool, ("c1", "Dog"), made.report)


def test_the_earlier_queue_is_served_again(label_studio, tmp_path, record_property):
    project = Project(label_studio, 40)
    settings = load_settings(MODEL_DIR=tmp_path, min_free_gib=0, START_TRAINING_EACH_N_UPDATES=5)
    store = open_store(settings)
    store.projects.connect(project.id, f"{project.id}.1", "<View/>", label_studio.url, {})
    world = World(project.tasks)

    def ports(settings, store, record, spec, observer):
        return Ports(world, world, LabelStudioPublisher(project.client, settings.keep_versions), observer)

    for seed in (0, 1):  # another seed, another random order
        changed = settings.model_copy(update={"seed": seed})
        store.rounds.request(project.id, "rank", "x")
        run_next_round(changed, project.id, ports)
        record = store.rounds.of_project(project.id)[-1]
        assert record.state == "done", record.error
    first, second = (v.version for v in store.versions.of_project(project.id))
    started = time.monotonic()
    done = roll_back(settings, store, project.client, project.id, first)
    seconds = time.monotonic() - started
    record_property("seconds_to_roll_back", round(seconds, 2))
    print(f"rolled back in {seconds:.2f} s")
    assert (done.version, done.predictions) == (first, 40) and seconds < 10
    assert project.client.project(project.id)["model_version"] == first
    rows = label_studio.session.get("/api/predictions", params={"project": project.id})
    order = [r["task"] for r in sorted((r for r in rows if r["model_version"] == first), key=lambda r: r["score"])]
    told = (settings.project_folder(project.id) / "rounds" / "1" / "query_set.json").read_text()
    assert order == json.loads(told)["queue"] and second in {r["model_version"] for r in rows}
    store.close()
