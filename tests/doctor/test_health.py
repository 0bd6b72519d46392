"""What every page and ``ppal status`` say is wrong: cause, what to do, when the next try is."""

import threading
from datetime import timedelta

import pytest

from ppal_backend.doctor.health import health, next_try
from ppal_backend.errors import LabelStudioAuthError, LabelStudioUnavailable
from ppal_backend.operations import control
from ppal_backend.settings import Settings
from ppal_backend.store import Database, Heartbeat, Lease, Store
from ppal_backend.store.tables import now
from ppal_backend.worker import sync
from ppal_backend.worker.sync import LabelStudioProbe, Synchroniser
from tests.doctor.conftest import CONFIG
from tests.label_studio.fake import FakeLabelStudio

DOWN = "cannot reach Label Studio at http://ls.test:8080; check that it is up"


@pytest.fixture
def world(tmp_path):
    class World:
        settings = Settings(
            MODEL_DIR=tmp_path, LABEL_STUDIO_API_KEY="k", LABEL_STUDIO_URL="http://ls.test:8080", min_free_gib=0
        )
        store = Store(Database(f"sqlite:///{tmp_path}/ppal.db"))

        def found(self, **changes):
            return health(self.settings.model_copy(update=changes), self.store, self.store.projects.get(1))

        def only(self):
            (finding,) = self.found()
            return finding

        def claimed(self, kind="train"):
            self.store.rounds.request(1, kind, "test")
            return self.store.rounds.claim(1, Lease.mine())

        def poll(self, error=None):
            class Remote:
                def state(self, project_id):
                    if error is not None:
                        raise error
                    return sync.ProjectState(3, 0, CONFIG, "Fish & chips")

                def updates(self, project_id, since):
                    return []

                def check(self, project_id):
                    return {}

            Synchroniser(self.store, self.settings, Remote(), lambda project_id: None).poll(1)

    world = World()
    world.store.projects.connect(1, "1.1", CONFIG, "http://ls.test:8080", {})
    Heartbeat(world.store.workers).beat()
    yield world
    world.store.close()


def test_nothing_is_wrong(world):
    world.poll()
    assert world.found() == [] and world.store.projects.get(1).title == "Fish & chips"


def test_label_studio_is_down_and_the_next_try_is_told(world):
    world.poll(LabelStudioUnavailable(DOWN))
    finding = world.only()
    assert (finding.title, finding.state, finding.can_try_again) == ("Waiting for Label Studio", "failed", True)
    assert (
        finding.seen == "cannot reach Label Studio at http://ls.test:8080" and finding.advice == "check that it is up"
    )
    assert next_try(finding, finding.next_try_at - timedelta(seconds=55)) == "Next try in 55 s."
    assert next_try(finding, finding.next_try_at - timedelta(seconds=125)) == "Next try in 2 min."
    assert next_try(finding, finding.next_try_at) == "Trying again now."
    assert 50 < (finding.next_try_at - now()).total_seconds() <= 60
    world.poll()
    assert world.found() == []


def test_a_round_that_waits_for_label_studio_is_no_second_finding(world):
    record = world.claimed()
    world.store.rounds.release(record.id, 20.0, DOWN)
    world.poll(LabelStudioUnavailable(DOWN))
    finding = world.only()
    assert finding.title == "Waiting for Label Studio" and 10 < (finding.next_try_at - now()).total_seconds() <= 20


def test_a_refused_token_is_told_as_such(world):
    world.poll(LabelStudioAuthError("Label Studio refused the personal access token (status 401); make a new one"))
    finding = world.only()
    assert finding.title == "Label Studio refuses the token" and finding.advice == "make a new one"


def test_a_round_that_waits_for_something_else(world):
    record = world.claimed()
    world.store.rounds.release(record.id, 300.0, "the bucket does not answer; check PPAL_ARTIFACTS")
    finding = world.only()
    assert (finding.title, finding.state) == ("Round 1 waits", "warning") and finding.can_try_again
    assert next_try(finding).startswith("Next try in 5 min") and finding.seen == "the bucket does not answer"
    assert world.store.rounds.get(record.id).is_waiting
    assert world.store.rounds.claimable_projects() == []
    assert control.try_again(world.store, 1) == "Round 1 goes on now."
    assert world.store.rounds.claimable_projects() == [1] and world.store.projects.get(1).poll_asked


def test_a_paused_round_has_no_next_try_and_is_no_alarm(world):
    record = world.claimed()
    world.store.rounds.release(record.id)
    control.pause(world.store, 1)
    finding = world.only()
    assert (finding.state, finding.title, finding.next_try_at) == ("note", "Paused", None)
    assert not world.store.rounds.get(record.id).is_waiting


@pytest.mark.parametrize(("kind", "command"), [("train", "`ppal round 1`"), ("rank", "`ppal round 1 --rank`")])
def test_a_failed_round_until_another_one_is_asked_for(world, kind, command):
    record = world.claimed(kind)
    world.store.rounds.fail(record.id, "training needs at least 2 annotated images, got 1; annotate more tasks")
    finding = world.only()
    corrected = ", or when 1 earlier annotation is corrected or deleted" if kind == "train" else ""
    assert finding.title == "Round 1 failed" and finding.can_try_again
    assert finding.seen == "training needs at least 2 annotated images, got 1"
    assert finding.advice == (
        f"Annotate more tasks. A training starts by itself after 50 more annotations{corrected}, and round 1 is tried "
        f"again when the labeling config or an option changes; Try again (or {command}) starts it at once"
    )
    assert control.try_again(world.store, 1) == "Round 2 is asked for."
    assert world.found() == [] and world.store.rounds.last(1).kind == kind


@pytest.mark.parametrize(
    ("topic", "title", "state"),
    [
        ("images", "Images cannot be used", "failed"),
        ("queue", "Tasks do not come in the order of the queue", "failed"),
        ("webhook", "Annotations are noticed late", "failed"),
        ("annotations", "Some of what was drawn is not learned from", "warning"),
    ],
)
def test_what_the_worker_met(world, topic, title, state):
    world.store.projects.set_problem(1, topic, "this and that; do something")
    finding = world.only()
    assert (finding.title, finding.state, finding.seen, finding.advice) == (
        title,
        state,
        "this and that",
        "do something",
    )


def test_a_full_disk_is_told_once(world):
    record = world.claimed()
    world.store.rounds.release(record.id, 60.0, "expected 9 GiB; free some")
    world.store.projects.set_problem(1, "disk", "step 'train' waits: expected 9 GiB; free some")
    assert [f.title for f in world.found()] == ["The disk is nearly full"] and world.only().can_try_again
    (finding,) = world.found(min_free_gib=1e9)
    assert "GiB are free for MODEL_DIR" in finding.seen


def test_without_a_worker_nothing_is_tried(world):
    world.poll(LabelStudioUnavailable(DOWN))
    Heartbeat(world.store.workers).end()
    found = world.found()
    assert [f.title for f in found] == ["No worker runs", "Waiting for Label Studio"]
    assert [next_try(f) for f in found] == ["", ""]


def test_settings_that_hold_no_more_and_events_put_by(world):
    world.store.projects.connect(1, "1.1", CONFIG, "http://ls.test:8080", {"budget": 0})
    event = world.store.events.add(1, "ANNOTATION_CREATED", {})
    world.store.events.settle(event, "odd")
    found = world.found()
    assert [f.title for f in found] == ["The project's settings cannot be used", "Some events could not be used"]
    assert found[1].seen == "1 event could not be used and was put by"


def test_the_worker_looks_at_label_studio_without_any_project(world, monkeypatch):
    server = FakeLabelStudio()
    server.project["title"] = "Fish & chips"
    server.others = [{"id": 2, "title": "Birds", "task_number": 7}]
    monkeypatch.setattr(sync, "open_client", lambda *args, **options: server.client(tries=1))
    LabelStudioProbe(world.settings, world.store).probe()
    note, _ = world.store.notes.get("label_studio")
    assert [(p["id"], p["title"]) for p in note["projects"]] == [(1, "Fish & chips"), (2, "Birds")]
    assert health(world.settings, world.store) == []

    def refused(*args, **options):
        raise LabelStudioAuthError("the token was refused; make a new one")

    monkeypatch.setattr(sync, "open_client", refused)
    LabelStudioProbe(world.settings, world.store).probe()
    (finding,) = health(world.settings, world.store)
    assert finding.title == "Label Studio refuses the token" and finding.advice == "make a new one"
    kept, _ = world.store.notes.get("label_studio")
    assert len(kept["projects"]) == 2, "what was known stays"


def test_nothing_is_looked_at_without_an_address(world, monkeypatch):
    monkeypatch.setattr(sync, "open_client", None)
    LabelStudioProbe(world.settings.model_copy(update={"label_studio_url": ""}), world.store).probe()
    assert world.store.notes.get("label_studio") == ({}, None)


def test_a_poll_that_is_asked_for_does_not_wait_for_its_time(world):
    polled = threading.Event()

    class Remote:
        def state(self, project_id):
            polled.set()
            raise LabelStudioUnavailable(DOWN)

    synchronise = Synchroniser(world.store, world.settings, Remote(), lambda project_id: None)
    synchronise._next_poll[1] = float("inf")
    assert not synchronise.poll_in_background(1)
    world.store.projects.ask_poll(1)
    assert synchronise.poll_in_background(1, world.store.projects.get(1).poll_asked)
    synchronise._polling[1].join(10)
    assert polled.is_set() and not world.store.projects.get(1).poll_asked, "once"
