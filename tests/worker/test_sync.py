"""From events and polls to rounds, against a real store and a scripted Label Studio."""

import threading
from datetime import datetime

import pytest
from sqlalchemy import event

from ppal_backend.errors import LabelStudioUnavailable
from ppal_backend.operations.control import cancel
from ppal_backend.settings import Settings
from ppal_backend.store import Database, Lease, SeenAnnotation, Store
from ppal_backend.worker.sync import ProjectState, Synchroniser, TaskUpdate
from ppal_backend.worker.watch import Watch
from tests.servers import wait_for

BUDGET = 3


class Remote:
    """A Label Studio that answers polls from a list; remembers since when it was asked."""

    def __init__(self):
        self.changed, self.asked, self.error, self.tasks, self.config = [], [], None, 100, "<View/>"
        self.checked = {}
        self.late = []  # tasks that show only after later changes, with times from before them
        self.annotated = None  # ids of the tasks that have annotations; None: those of ``changed`` and ``late``
        self.only_ground_truth = set()  # those that Label Studio leaves out of the project's own count
        self.listed = 0

    def state(self, project_id):
        if self.error:
            raise self.error
        counted = [task for task in self._annotated() if task not in self.only_ground_truth]
        annotations = sum(a.usable for u in self.changed + self.late for a in u.annotations)
        return ProjectState(self.tasks, len(counted), self.config, annotations=annotations)

    def updates(self, project_id, since):
        self.asked.append(since)
        return [u for u in self.changed + self.late if u.updated_at >= since]

    def check(self, project_id):
        if isinstance(self.checked, Exception):
            raise self.checked
        return self.checked

    def annotated_tasks(self, project_id):
        self.listed += 1
        return self._annotated()

    def annotated_count(self, project_id):
        return len(self._annotated())

    def exported(self, project_id, task_ids):
        return [u for u in self.changed + self.late if u.task_id in set(task_ids) and u.annotations]

    def _annotated(self):
        if self.annotated is not None:
            return self.annotated
        return [u.task_id for u in self.changed + self.late if any(a.usable for a in u.annotations)]


def at(hour):
    """A time as Label Studio writes it."""
    return f"2026-01-{1 + hour // 24:02d}T{hour % 24:02d}:00:00Z"


@pytest.fixture
def world(tmp_path):
    class World:
        store = Store(Database(f"sqlite:///{tmp_path}/ppal.db"))
        enqueued: list[int]

        def annotate(self, *ids, action="ANNOTATION_CREATED", usable=True, hour=0):
            for i in ids:
                seen = {"id": i, "task_id": i * 10, "usable": usable, "changed_at": at(hour)}
                body = {"annotations": [seen]}
                self.store.events.add(1, action, body)
            self.sync(1)

        def poll_now(self):
            self.sync.poll(1)

        def import_tasks(self, count, how):
            """Tasks come, and an event or a poll tells of them."""
            self.remote.tasks += count
            if how == "event":
                self.store.events.add(1, "TASKS_CREATED", {"tasks": count})
                self.sync(1)
            else:
                self.poll_now()

        def rounds(self):
            return [(r.kind, r.state) for r in self.store.rounds.of_project(1)]

        def finish_first(self):
            record = self.store.rounds.claim(1, Lease.mine())
            self.store.ledger.used_by(1, record.number, range(1, 100))
            self.store.rounds.report(record.id, "dataset", {})
            return record

    world = World()
    world.enqueued, world.remote = [], Remote()
    settings = Settings(START_TRAINING_EACH_N_UPDATES=BUDGET, MODEL_DIR=tmp_path, poll_interval_s=1000)
    world.sync = Synchroniser(world.store, settings, world.remote, world.enqueued.append)
    world.store.projects.connect(1, "1.1", "<View/>", "http://ls", {})
    return world


def test_connecting_orders_the_pool_once(world):
    world.sync(1)
    world.sync(1)
    assert world.rounds() == [("rank", "pending")]
    assert set(world.enqueued) == {1}


def test_training_starts_with_the_budget_and_not_before(world):
    world.annotate(1, 2)
    assert world.rounds() == [("rank", "pending")]
    world.annotate(3)
    assert world.rounds() == [("train", "pending")]


def test_two_webhooks_of_one_annotation_count_once(world):
    world.annotate(1, 1, 1, 2)
    assert world.rounds() == [("rank", "pending")]


def test_what_webhooks_lose_the_poll_finds(world):
    world.remote.changed = [TaskUpdate(i, f"2026-01-0{i}", (SeenAnnotation(i, i),)) for i in (1, 2, 3)]
    assert world.sync.poll_in_background(1)
    wait_for(lambda: world.rounds() == [("train", "pending")])
    assert world.store.projects.get(1).polled_until == "2026-01-03"
    assert not world.sync.poll_in_background(1) and world.remote.asked == [""], "the interval was not over"


def test_a_poll_shows_deletions_that_no_webhook_told(world):
    world.annotate(1, 2)
    world.remote.changed = [TaskUpdate(10, "2026-01-01", ()), TaskUpdate(30, "2026-01-02", (SeenAnnotation(3, 30),))]
    world.remote.annotated = [20, 30]
    world.poll_now()
    assert world.store.ledger.new_count(1) == 2, "annotation 1 of task 10 is gone"


def test_a_poll_that_fails_is_told_and_loses_nothing(world):
    world.remote.error = LabelStudioUnavailable("Label Studio does not answer")
    world.annotate(1, 2, 3)
    world.poll_now()
    assert world.rounds() == [("train", "pending")]
    assert world.store.projects.get(1).problems == {"poll": "Label Studio does not answer"}
    world.remote.error, world.remote.annotated = None, [10, 20, 30]
    world.poll_now()
    assert world.store.projects.get(1).problems == {}


def test_a_poll_tells_what_is_wrong_with_queue_and_webhook(world):
    world.remote.checked = {"queue": "it is random; publish again", "webhook": ""}
    world.poll_now()
    assert world.store.projects.get(1).problems == {"queue": "it is random; publish again"}
    world.remote.checked = LabelStudioUnavailable("down")
    world.poll_now()
    assert world.store.projects.get(1).problems == {"queue": "it is random; publish again"}, "nothing new was seen"
    world.remote.checked = {"queue": ""}
    world.poll_now()
    assert world.store.projects.get(1).problems == {}


def test_a_poll_holds_a_batch_at_a_time_and_goes_on_where_it_was_cut_off(world, monkeypatch):
    monkeypatch.setattr("ppal_backend.worker.sync.POLL_BATCH", 10)
    read = []

    def updates(project_id, since):
        for i in range(25):
            if i == 15 and not since:
                raise LabelStudioUnavailable("the connection broke")
            if f"2026-01-{i + 1:02d}" >= since:
                read.append(i)
                yield TaskUpdate(i, f"2026-01-{i + 1:02d}", (SeenAnnotation(i, i),))

    world.remote.updates, world.remote.annotated = updates, range(25)
    world.poll_now()
    assert world.store.projects.get(1).polled_until == "2026-01-10", "a whole batch is kept"
    assert world.store.ledger.new_count(1) == 10
    world.poll_now()
    assert read == [*range(15), *range(9, 25)]
    assert (world.store.ledger.new_count(1), world.store.projects.get(1).polled_until) == (25, "2026-01-25")


def test_annotations_that_the_running_export_will_take_ask_for_no_second_round(world):
    world.annotate(1, 2, 3)
    record = world.store.rounds.claim(1, Lease.mine())
    world.annotate(4, 5, 6)
    assert world.rounds() == [("train", "running")]
    world.store.rounds.report(record.id, "export", {})
    world.annotate(7)
    assert world.rounds() == [("train", "running")]


def test_a_running_rank_round_does_not_hold_up_training(world):
    world.sync(1)
    assert world.store.rounds.claim(1, Lease.mine()).kind == "rank"
    world.annotate(1, 2, 3)
    assert world.rounds() == [("rank", "running"), ("train", "pending")]


def test_annotations_after_the_export_make_one_following_round(world):
    world.annotate(1, 2, 3)
    record = world.finish_first()
    world.annotate(101, 102, 103, 104, 105)
    assert world.rounds() == [("train", "running")], "whether it fails decides when the next one is due"
    world.store.rounds.finish(record.id, {})
    world.sync(1)
    assert world.rounds() == [("train", "done"), ("train", "pending")]


def test_skips_do_not_count_and_deletions_are_taken_back(world):
    world.annotate(1, 2)
    world.annotate(3, usable=False)
    world.annotate(2, action="ANNOTATIONS_DELETED", usable=False)
    world.annotate(4)
    assert world.rounds() == [("rank", "pending")]
    world.annotate(5)
    assert world.rounds() == [("train", "pending")]


def test_start_training_asks_for_a_round_whatever_the_count(world):
    world.store.events.add(1, "START_TRAINING", {})
    world.sync(1)
    assert world.rounds() == [("train", "pending")]


def test_new_tasks_are_ranked(world):
    world.sync(1)
    record = world.store.rounds.claim(1, Lease.mine())
    world.store.rounds.finish(record.id, {})
    world.store.events.add(1, "TASKS_CREATED", {"tasks": 5})
    world.sync(1)
    assert world.rounds() == [("rank", "done"), ("rank", "pending")]


@pytest.mark.parametrize("how", ["event", "poll"])
def test_tasks_that_come_while_a_training_exports_are_ranked_after_it(world, how):
    world.annotate(1, 2, 3)
    world.poll_now()
    record = world.store.rounds.claim(1, Lease.mine())
    world.import_tasks(500, how)
    assert world.rounds() == [("train", "running")], "its export will list them"
    world.store.rounds.report(record.id, "export", {})
    world.import_tasks(500, how)
    world.store.ledger.used_by(1, record.number, range(1, 100))
    world.store.rounds.finish(record.id, {})
    world.sync(1)
    assert world.rounds() == [("train", "done"), ("rank", "pending")], "it may have listed the tasks before"


@pytest.mark.parametrize("how", ["event", "poll"])
def test_a_crash_before_the_decision_loses_no_new_tasks(world, how, monkeypatch):
    world.sync(1)
    world.poll_now()
    world.store.rounds.finish(world.store.rounds.claim(1, Lease.mine()).id, {})
    world.remote.tasks += 5
    if how == "event":
        world.store.events.add(1, "TASKS_CREATED", {"tasks": 5})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(world.sync, "_decide", interrupted)
        world.sync(1) if how == "event" else world.poll_now()
    world.poll_now()
    world.sync(1)
    assert world.rounds() == [("rank", "done"), ("rank", "pending")]


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_changed_label_config_is_kept(world):
    world.store.events.add(1, "PROJECT_UPDATED", {"label_config": "<View><Image/></View>"})
    world.sync(1)
    assert world.store.projects.get(1).label_config == "<View><Image/></View>"


def test_an_event_with_a_body_nobody_expects_is_parked_and_holds_up_nothing(world):
    world.store.events.add(1, "ANNOTATION_CREATED", {"annotations": [{"task_id": 1}]})
    world.annotate(1, 2, 3)
    assert world.store.events.counts() == {"parked": 1, "done": 3}
    assert world.rounds() == [("train", "pending")]


def test_hundreds_of_events_are_a_few_transactions_and_end_as_one_by_one(world):
    created = [("ANNOTATION_CREATED", {"annotations": [{"id": i, "task_id": i}]}) for i in range(1, 241)]
    deleted = [("ANNOTATIONS_DELETED", {"annotations": [{"id": i, "usable": False}]}) for i in range(1, 240)]
    for action, body in created + deleted:
        world.store.events.add(1, action, body)
    world.store.events.add(1, "ANNOTATION_CREATED", {"annotations": [{"id": 5, "task_id": 5}]})
    begun = []
    event.listen(world.store.database.engine, "begin", begun.append)
    world.sync(1)
    assert len(begun) < 40
    assert world.store.events.counts() == {"done": 480}
    assert world.store.ledger.new_count(1) == 2 and world.store.ledger.tasks_after(1, 0) == [5, 240]


def test_an_event_that_was_begun_before_is_handled_alone(world, monkeypatch):
    ids = [world.store.events.add(1, "TASKS_CREATED", {"tasks": n}) for n in range(3)]
    world.store.events.begin(ids[1:2])
    together = []
    begin = world.store.events.begin
    monkeypatch.setattr(world.store.events, "begin", lambda batch: (together.append(len(batch)), begin(batch)))
    world.sync(1)
    assert together == [1, 1, 1] and world.store.events.counts() == {"done": 3}


def test_a_label_config_that_was_taken_back_is_the_one_in_force(world):
    for config in ("<View>new</View>", "<View/>"):
        world.store.events.add(1, "PROJECT_UPDATED", {"label_config": config})
    world.sync(1)
    assert world.store.projects.get(1).label_config == "<View/>"


def test_a_job_for_a_project_that_is_gone_does_nothing(world):
    world.sync(99)
    assert world.store.rounds.of_project(99) == []


def test_deleted_tasks_take_their_annotations_along(world):
    """They stayed new for ever, and trainings followed each other without end."""
    world.annotate(1, 2, 3)
    world.store.events.add(1, "TASKS_DELETED", {"deleted_tasks": [10, 20]})
    world.sync(1)
    assert world.store.ledger.new_count(1) == 1


def test_an_export_settles_what_it_does_not_hold_and_nothing_that_came_meanwhile(world):
    world.annotate(1, 2, 3)
    record = world.store.rounds.claim(1, lease := Lease.mine())
    watch = Watch(world.store, record, lease)
    watch.step_started("export")
    world.annotate(4)
    watch.exported([2, 3])
    assert world.store.ledger.new_count(1) == 1, "4 came while the export was written; 1 was gone before"
    assert world.store.ledger.usable(1) == {2: 20, 3: 30, 4: 40}


def test_the_poll_notices_tasks_that_were_deleted_without_a_word(world):
    world.annotate(1, 2)
    world.remote.annotated = [10, 20]
    world.poll_now()
    assert world.store.ledger.new_count(1) == 2
    world.remote.annotated, world.remote.tasks = [20], 99
    world.poll_now()
    assert world.store.ledger.usable(1) == {2: 20}


def test_a_task_that_has_only_a_ground_truth_does_not_pass_for_a_deleted_one(world):
    """The project's own count leaves it out: every poll listed all annotated tasks."""
    world.annotate(1, 2, 3)
    world.remote.annotated, world.remote.only_ground_truth = [10, 20, 30], {20}
    for _ in range(3):
        world.poll_now()
    assert world.remote.listed == 0 and world.store.ledger.usable(1) == {1: 10, 2: 20, 3: 30}
    world.remote.annotated = [20, 30]
    world.poll_now()
    assert world.remote.listed == 1 and world.store.ledger.usable(1) == {2: 20, 3: 30}, "one is deleted"


@pytest.mark.parametrize("how", ["tasks deleted", "fewer annotated"])
def test_a_counter_that_is_too_low_does_not_pass_for_a_deletion(world, how):
    """Label Studio lists annotated tasks by a counter in each, which it corrects later or never. The annotations of
    such a task were taken as deleted as soon as another task was."""
    world.annotate(1, 2, 3)
    world.remote.annotated = [10, 20, 30]
    world.poll_now()
    world.remote.changed = [TaskUpdate(i, at(0), (SeenAnnotation(i // 10, i),)) for i in (20, 30)]
    world.remote.annotated = [30]  # 10 is gone; the counter of 20 says 0
    if how == "tasks deleted":
        world.remote.tasks = 99
    world.store.projects.polled(1, at(1))
    world.poll_now()
    assert world.store.ledger.usable(1) == {2: 20, 3: 30}


def submit(world, task_id, hour):
    """Somebody annotates a task, and a poll sees it."""
    world.remote.changed.append(TaskUpdate(task_id, at(hour), (SeenAnnotation(task_id, task_id),)))
    world.poll_now()


def test_an_import_that_ends_after_a_later_submit_was_seen_counts_in_full(world, monkeypatch):
    """Label Studio stamps its tasks when it begins and shows them when it ends; no poll asked for that time again."""
    monkeypatch.setattr("ppal_backend.worker.sync.POLL_BATCH", 10)
    submit(world, 7, hour=5)
    world.remote.late = [TaskUpdate(i, at(2), (SeenAnnotation(i, i),)) for i in range(100, 125)]
    world.remote.only_ground_truth = set(range(100, 125))  # as imported annotations are unless they say otherwise
    world.poll_now()
    assert world.store.ledger.labelled_tasks(1) == {7, *range(100, 125)} and world.rounds() == [("train", "pending")]
    world.poll_now()
    assert world.remote.listed == 1, "it adds up"


def test_an_import_is_found_though_as_many_tasks_were_deleted(world):
    submit(world, 7, hour=5)
    submit(world, 8, hour=6)
    world.remote.changed.pop()
    world.remote.late, world.remote.tasks = [TaskUpdate(100, at(2), (SeenAnnotation(100, 100),))], 99
    world.poll_now()
    assert world.store.ledger.usable(1) == {7: 7, 100: 100}


def test_what_cannot_be_found_is_looked_for_once_and_again_when_it_becomes_more(world):
    """Otherwise each poll would list all annotated tasks."""
    submit(world, 7, hour=5)
    hidden, found = (TaskUpdate(i, at(2), (SeenAnnotation(i, i),)) for i in (100, 101))
    world.remote.late, world.remote.annotated = [hidden], [7, 8, 9]  # the counter of 100 says 0
    for hour in (8, 9):
        submit(world, hour, hour)
    assert world.remote.listed == 1 and world.store.ledger.labelled_tasks(1) == {7, 8, 9}
    world.remote.late, world.remote.annotated = [hidden, found], [7, 8, 9, 101]
    for _ in range(3):
        world.poll_now()
    assert world.remote.listed == 2 and world.store.ledger.labelled_tasks(1) == {7, 8, 9, 101}


def test_skips_and_annotations_of_several_people_pass_for_none_that_are_missing(world):
    skip = SeenAnnotation(1, 7, usable=False)
    several = SeenAnnotation(2, 8), SeenAnnotation(3, 8), SeenAnnotation(4, 8, usable=False)
    world.remote.changed = [TaskUpdate(7, at(1), (skip,)), TaskUpdate(8, at(2), several)]
    for _ in range(3):
        world.poll_now()
    assert world.remote.listed == 0


def test_tasks_of_one_time_are_read_again_by_the_next_poll_and_by_none_after_it(world):
    """A bulk action gives all its tasks one time: every poll read them all for as long as nothing newer changed."""
    read = []

    def updates(project_id, since):
        for update in Remote.updates(world.remote, project_id, since):
            if not since or datetime.fromisoformat(update.updated_at) >= datetime.fromisoformat(since):
                read.append(update.task_id)
                yield update

    world.remote.updates = updates
    world.remote.changed = [TaskUpdate(i, f"2026-01-02T00:00:00.0000{n:02d}Z", ()) for n, i in ((4, 1), (5, 2), (5, 3))]
    for _ in range(4):
        world.poll_now()
    assert read == [1, 2, 3, 2, 3], "a task may come late to its time"
    world.remote.changed.append(TaskUpdate(4, "2026-01-02T00:00:00.000006Z", ()))
    for _ in range(4):
        world.poll_now()
    assert read[5:] == [4, 4]


def test_a_poll_that_is_cut_off_within_a_time_reads_it_again(world, monkeypatch):
    monkeypatch.setattr("ppal_backend.worker.sync.POLL_BATCH", 2)
    same = [TaskUpdate(i, "2026-01-02T00:00:00.000000Z", (SeenAnnotation(i, i),)) for i in range(5)]

    def cut_off(project_id, since):
        yield from same[:2]
        raise LabelStudioUnavailable("the connection broke")

    for _ in range(3):
        world.remote.updates = cut_off
        world.poll_now()
    world.remote.changed, world.remote.updates = same, lambda *asked: Remote.updates(world.remote, *asked)
    world.poll_now()
    assert world.store.ledger.labelled_tasks(1) == {0, 1, 2, 3, 4}


def test_the_poll_notices_new_tasks_that_no_event_told_of_and_tells_of_none_twice(world):
    world.sync(1)
    world.poll_now()
    world.store.rounds.finish(world.store.rounds.claim(1, Lease.mine()).id, {})
    world.remote.tasks += 5
    world.poll_now()
    assert world.rounds() == [("rank", "done"), ("rank", "pending")]
    world.store.rounds.finish(world.store.rounds.claim(1, Lease.mine()).id, {})
    world.remote.tasks += 5
    world.store.events.add(1, "TASKS_CREATED", {"tasks": 5})
    world.sync(1)
    world.store.rounds.finish(world.store.rounds.claim(1, Lease.mine()).id, {})
    world.poll_now()
    assert world.rounds() == [("rank", "done")] * 3


def fail(world, error="bad labeling config"):
    record = world.store.rounds.claim(1, Lease.mine())
    world.store.rounds.fail(record.id, error)
    world.sync(1)


def test_a_training_that_failed_waits_for_as_many_annotations_again(world):
    world.annotate(1, 2, 3)
    fail(world)
    world.remote.annotated = [10, 20, 30]
    world.poll_now()
    assert world.rounds() == [("train", "failed")]
    problem = world.store.projects.get(1).problems["round"]
    assert "round 1 failed: bad labeling config" in problem and "after 3 more annotations" in problem
    world.annotate(4, 5)
    assert world.rounds() == [("train", "failed")]
    assert "after 1 more annotation," in world.store.projects.get(1).problems["round"]
    world.annotate(6)
    assert world.rounds() == [("train", "failed"), ("train", "pending")]
    world.sync(1)
    assert world.store.projects.get(1).problems == {}


@pytest.mark.parametrize("how", ["failed", "given up"])
@pytest.mark.parametrize("step", ["export", "train"])
def test_a_training_that_fails_every_time_is_tried_ever_more_seldom(world, how, step):
    """A detector that runs out of memory trained and failed at each annotation, for as long as people labelled."""
    annotated, tried_at = 0, []
    while annotated < 100:
        record = world.store.rounds.claim(1, Lease.mine())
        if record is not None and record.kind == "train":
            tried_at.append(annotated)
            world.store.rounds.report(record.id, step, {})
            if step == "train":
                world.store.ledger.used_by(1, record.number, range(1, annotated + 1))
            while how == "given up" and world.store.rounds.crashed(record.id, "killed by signal 9", 2, 0.0):
                pass
            if how == "failed":
                world.store.rounds.fail(record.id, "out of memory")
        elif record is not None:
            world.store.rounds.finish(record.id, {})
        annotated += 1
        world.annotate(annotated)
    assert tried_at == [3, 6, 12, 24, 48, 96], "each failure doubles the portion"
    world.store.rounds.request(1, "train", "by hand")
    world.store.rounds.finish(world.store.rounds.claim(1, Lease.mine()).id, {})
    world.store.ledger.used_by(1, 99, range(1, annotated + 1))
    world.annotate(101, 102, 103)
    assert world.rounds()[-1] == ("train", "pending"), "one that succeeds makes an end of it"


def test_what_is_annotated_while_a_training_fails_does_not_start_the_next_one_at_once(world):
    """Many people at a slow training: a whole portion came meanwhile, and the next round waited already."""
    world.annotate(1, 2, 3)
    for times, more in enumerate((range(4, 7), range(7, 13)), start=1):
        record = world.store.rounds.claim(1, Lease.mine())
        world.store.rounds.report(record.id, "train", {})
        world.store.ledger.used_by(1, record.number, range(1, more[0]))
        world.annotate(*more[:-1])
        world.store.rounds.fail(record.id, "out of memory")
        world.sync(1)
        assert world.rounds() == [("train", "failed")] * times
        world.annotate(more[-1])
        assert world.rounds() == [("train", "failed")] * times + [("train", "pending")]


def fail_after_export(world, annotations, meanwhile=lambda: None):
    """The next training reads the annotations and fails; what people do in between."""
    record = world.store.rounds.claim(1, lease := Lease.mine())
    assert record.kind == "train"
    watch = Watch(world.store, record, lease)
    watch.step_started("export")
    watch.exported(annotations)
    watch.step_started("dataset")
    meanwhile()
    world.store.rounds.fail(record.id, "annotation 2 cannot be used; correct it")
    world.sync(1)


def corrected_by_event(world):
    world.annotate(2, action="ANNOTATION_UPDATED", hour=5)


def deleted_by_event(world):
    world.store.events.add(1, "ANNOTATIONS_DELETED", {"annotations": [{"id": 2, "task_id": None, "usable": False}]})
    world.sync(1)


def deleted_with_its_task(world):
    world.store.events.add(1, "TASKS_DELETED", {"deleted_tasks": [20]})
    world.sync(1)


def corrected_without_a_word(world):
    world.remote.annotated = [10, 20, 30]
    world.remote.changed = [TaskUpdate(20, at(5), (SeenAnnotation(2, 20, changed_at=datetime(2026, 1, 1, 5)),))]
    world.poll_now()


def deleted_without_a_word(world):
    world.remote.annotated = [10, 30]
    world.remote.changed = [TaskUpdate(20, at(5), ())]
    world.poll_now()


def deleted_with_its_task_without_a_word(world):
    world.remote.annotated, world.remote.tasks = [10, 30], 99
    world.poll_now()


@pytest.mark.parametrize(
    "correct",
    [
        corrected_by_event, deleted_by_event, deleted_with_its_task, corrected_without_a_word, deleted_without_a_word,
        deleted_with_its_task_without_a_word,
    ],
)  # fmt: skip
def test_a_correction_of_what_a_failed_training_had_tries_it_again(world, correct):
    """Its error told which annotation to correct; who did so waited for a whole portion of new ones."""
    world.annotate(1, 2, 3)
    world.remote.annotated = [10, 20, 30]
    world.poll_now()
    fail_after_export(world, [1, 2, 3])
    problem = world.store.projects.get(1).problems["round"]
    assert "after 3 more annotations, or when 1 earlier annotation is corrected or deleted," in problem
    correct(world)
    assert world.rounds() == [("train", "failed"), ("train", "pending")]
    assert world.store.rounds.last(1).reason == "round 1 failed, and 1 annotation was corrected since"
    fail_after_export(world, sorted(world.store.ledger.usable(1)))
    correct(world)
    assert world.rounds() == [("train", "failed")] * 2, "the same correction told twice"
    problem = world.store.projects.get(1).problems["round"]
    assert "after 6 more annotations, or when 2 earlier annotations are corrected or deleted," in problem


def test_corrections_that_do_not_help_are_tried_ever_more_seldom(world):
    """People correct annotations all day; a detector that runs out of memory must not train at each of them."""
    everything = range(1, 41)
    world.annotate(*everything)
    fail_after_export(world, everything)
    tried_at = []
    for corrections in range(1, 80):
        world.annotate(1 + corrections % 40, action="ANNOTATION_UPDATED", hour=corrections)
        if world.rounds()[-1] == ("train", "pending"):
            tried_at.append(corrections)
            fail_after_export(world, everything)
    assert tried_at == [1, 3, 7, 15, 31, 63]


def test_a_storm_of_corrections_is_one_more_try_and_not_one_for_each(world):
    everything = range(1, 201)
    world.annotate(*everything)
    fail_after_export(world, everything)
    world.annotate(*everything, action="ANNOTATION_UPDATED", hour=1)
    assert world.rounds() == [("train", "failed"), ("train", "pending")]
    fail_after_export(world, everything)
    assert world.rounds() == [("train", "failed")] * 2, "its export held all of them"
    world.annotate(1, action="ANNOTATION_UPDATED", hour=2)
    assert world.rounds() == [("train", "failed")] * 2, "two are asked for now"
    world.annotate(201, 202, 203)
    assert world.rounds()[2:] == [("train", "pending")], "one portion each of corrections and of new annotations"


def test_what_is_corrected_after_the_export_counts_when_the_training_has_failed(world):
    world.annotate(1, 2, 3)
    fail_after_export(world, [1, 2, 3], meanwhile=lambda: corrected_by_event(world))
    assert world.rounds() == [("train", "failed"), ("train", "pending")]


def test_what_an_export_finds_gone_was_gone_for_its_training(world):
    world.annotate(1, 2, 3)
    fail_after_export(world, [1, 3])
    assert world.rounds() == [("train", "failed")], "it would only fail again"


def test_a_correction_is_no_reason_to_train_where_none_has_failed(world):
    world.annotate(1, 2, 3)
    record = world.finish_first()
    world.store.rounds.finish(record.id, {})
    corrected_by_event(world)
    assert world.rounds() == [("train", "done")]
    world.annotate(101, 102, 103)
    fail_after_export(world, [1, 2, 3, 101, 102, 103])
    assert world.rounds() == [("train", "done"), ("train", "failed")], "that one was in its export"


def test_what_is_new_since_a_failure_is_new_and_no_correction(world):
    world.annotate(1, 2, 3)
    fail_after_export(world, [1, 2, 3])
    world.annotate(4)
    world.annotate(4, action="ANNOTATION_UPDATED", hour=1)
    world.annotate(4, action="ANNOTATIONS_DELETED", usable=False)
    assert world.rounds() == [("train", "failed")]


def test_corrections_ask_for_none_after_somebody_cancelled_the_training_that_they_had_asked_for(world):
    world.annotate(1, 2, 3)
    fail_after_export(world, [1, 2, 3])
    corrected_by_event(world)
    cancel(world.store, 1)
    world.sync(1)
    world.annotate(3, action="ANNOTATION_UPDATED", hour=6)
    assert world.rounds() == [("train", "failed"), ("train", "cancelled")]


def test_a_correction_tries_a_training_again_though_a_ranking_failed_since(world):
    world.annotate(1, 2, 3)
    fail_after_export(world, [1, 2, 3])
    world.import_tasks(5, "event")
    fail(world)
    corrected_by_event(world)
    assert world.rounds()[2:] == [("train", "pending")]


def test_a_failed_training_is_told_though_the_pool_was_ordered_since(world):
    world.annotate(1, 2, 3)
    fail(world, "out of memory")
    world.import_tasks(5, "event")
    world.store.rounds.finish(world.store.rounds.claim(1, Lease.mine()).id, {})
    world.sync(1)
    assert world.rounds() == [("train", "failed"), ("rank", "done")]
    assert "round 1 failed: out of memory" in world.store.projects.get(1).problems["round"]
    world.remote.config = "<View><Image/></View>"
    world.poll_now()
    assert world.rounds()[2:] == [("train", "pending")]


@pytest.mark.parametrize("kind", ["train", "rank"])
def test_a_changed_config_or_option_tries_what_failed_again(world, kind):
    world.store.rounds.request(1, kind, "asked for")
    world.sync(1)
    fail(world)
    assert world.rounds() == [(kind, "failed")]
    world.remote.config = "<View><Image/></View>"
    world.poll_now()
    assert world.rounds() == [(kind, "failed"), (kind, "pending")]
    fail(world)
    assert world.rounds() == [(kind, "failed")] * 2
    world.store.projects.connect(1, "1.1", world.remote.config, "http://ls", {"budget": 4})
    world.sync(1)
    assert world.rounds() == [(kind, "failed")] * 2 + [(kind, "pending")]
    world.store.rounds.finish(world.store.rounds.claim(1, Lease.mine()).id, {})
    world.sync(1)
    assert "round" not in world.store.projects.get(1).problems


def test_settings_that_changed_before_a_round_began_are_no_reason_to_try_it_again(world):
    """It ran with them: a second training that failed followed at once."""
    world.store.rounds.request(1, "train", "by hand")
    world.sync(1)
    world.store.projects.connect(1, "1.1", world.remote.config, "http://ls", {"budget": 4})
    world.sync(1)
    fail(world, "out of memory")
    assert world.rounds() == [("train", "failed")]
    world.store.rounds.request(1, "train", "by hand")
    record = world.store.rounds.claim(1, Lease.mine())
    world.store.projects.connect(1, "1.1", world.remote.config, "http://ls", {"budget": 5})
    world.store.rounds.release(record.id)
    fail(world, "out of memory")
    assert world.rounds() == [("train", "failed")] * 2 + [("train", "pending")], "these came after it had begun"


def test_an_option_of_the_operator_counts_as_a_change(world, tmp_path):
    world.annotate(1, 2, 3)
    fail(world)
    settings = Settings(START_TRAINING_EACH_N_UPDATES=2, MODEL_DIR=tmp_path)
    Synchroniser(world.store, settings, world.remote, world.enqueued.append)(1)
    assert world.rounds() == [("train", "failed"), ("train", "pending")]


def test_a_project_that_trains_all_the_time_keeps_no_other_waiting(world):
    """The round queue holds wake-ups; which project is next is told by who asked first."""
    world.store.projects.connect(2, "2.1", "<View/>", "http://ls", {})
    ran, asked, annotations = [], False, []

    def annotate(count):
        for _ in range(count):
            annotations.append(len(annotations) + 1)
            world.annotate(annotations[-1])

    annotate(BUDGET)
    while ran[-1:] != [2] and len(ran) < 10:
        ran.append(world.store.rounds.claimable_projects()[0])
        record = world.store.rounds.claim(ran[-1], Lease.mine())
        world.store.rounds.report(record.id, "train", {})
        if ran[-1] == 1:
            world.store.ledger.used_by(1, record.number, annotations)
        annotate(2 * BUDGET)  # people go on while it trains
        if not asked:
            asked = True
            world.store.events.add(2, "START_TRAINING", {})
            world.sync(2)
        annotate(BUDGET)
        world.store.rounds.finish(record.id, {})
        world.sync(1)
    assert ran == [1, 2], "project 1 asks again when its round has ended"


def test_a_label_studio_that_does_not_answer_holds_up_no_other_project(world):
    world.store.projects.connect(2, "2.1", "<View/>", "http://slow", {})
    asked, answer = threading.Event(), threading.Event()
    state = world.remote.state

    def slow(project_id):
        if project_id == 2:
            asked.set()
            assert answer.wait(30)
        return state(project_id)

    world.remote.state = slow
    world.sync.poll_in_background(2)
    assert asked.wait(10)
    world.annotate(1, 2, 3)
    world.remote.annotated = [10, 20, 30, 40]
    world.remote.changed = [TaskUpdate(40, "2026-01-02", (SeenAnnotation(4, 40),))]
    world.sync.poll_in_background(1)
    wait_for(lambda: world.store.projects.get(1).polled_until == "2026-01-02")
    assert world.rounds() == [("train", "pending")] and world.store.ledger.new_count(1) == 4
    world.sync._next_poll.clear()
    assert not world.sync.poll_in_background(2), "one poll of a project at a time"
    answer.set()


COCO_CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="cars"/><Label value="fish"/></RectangleLabels></View>'
)


@pytest.fixture
def known(world):
    """The world, with a detector that knows one of the labels."""
    world.store.projects.connect(1, "1.1", COCO_CONFIG, "http://ls", {"detector": "yolox_nano"})
    world.remote.config = COCO_CONFIG
    world.numbers = lambda: [(r.number, r.kind, r.state) for r in world.store.rounds.of_project(1)]
    return world


def finish(world, known=None):
    record = world.store.rounds.claim(1, Lease.mine())
    world.store.rounds.finish(record.id, {} if known is None else {"known": known})


def test_a_project_whose_labels_are_known_starts_with_round_0_once_it_was_polled(known):
    known.sync(1)
    assert known.numbers() == [], "whether it has annotations is not known yet"
    known.poll_now()
    known.poll_now()
    assert known.numbers() == [(0, "rank", "pending")]
    finish(known, {"cars": ["car"]})
    known.poll_now()
    assert known.numbers() == [(0, "rank", "done")]
    known.annotate(1, 2, 3)
    assert known.numbers()[1:] == [(1, "train", "pending")]


def test_a_project_with_annotations_trains_first(known):
    known.remote.changed = [TaskUpdate(i, f"2026-01-0{i}", (SeenAnnotation(i, i),)) for i in (1, 2, 3)]
    known.sync(1)
    known.poll_now()
    assert known.numbers() == [(1, "train", "pending")]


def test_a_training_that_comes_before_round_0_began_is_round_1(known):
    known.poll_now()
    known.annotate(1, 2, 3)
    assert known.numbers() == [(1, "train", "pending")]
    finish(known)
    known.annotate(11, 12, 13)
    assert known.numbers()[-1] == (2, "train", "pending")


def test_an_empty_project_waits_for_its_tasks(known):
    known.remote.tasks = 0
    known.poll_now()
    known.sync(1)
    assert known.numbers() == []
    known.remote.tasks = 50
    known.poll_now()
    assert known.numbers() == [(0, "rank", "pending")]


def test_a_failed_round_0_is_told_and_not_tried_again_until_something_changes(known):
    known.poll_now()
    record = known.store.rounds.claim(1, Lease.mine())
    known.store.rounds.fail(record.id, "the detector cannot be built")
    for _ in range(3):
        known.poll_now()
    assert known.numbers() == [(0, "rank", "failed")]
    assert "round 0 failed: the detector cannot be built" in known.store.projects.get(1).problems["round"]
    known.remote.config = COCO_CONFIG.replace("fish", "dogs")
    known.poll_now()
    assert known.numbers()[1:] == [(1, "rank", "pending")]


def test_labels_that_become_known_before_any_training_get_their_boxes(known):
    known.poll_now()
    finish(known, {"cars": ["car"]})
    known.remote.config = COCO_CONFIG.replace('"fish"', '"fish" predicted_values="bird"')
    known.poll_now()
    known.poll_now()
    assert known.numbers()[1:] == [(1, "rank", "pending")]
    finish(known, {"fish": ["bird"], "cars": ["car"]})
    known.poll_now()
    assert known.numbers()[1:] == [(1, "rank", "done")], "once"


def test_a_project_whose_labels_nobody_knows_has_no_round_0(known):
    known.store.projects.connect(
        2, "2.1", COCO_CONFIG.replace("cars", "corals"), "http://ls", {"detector": "yolox_nano"}
    )
    known.sync(2)
    assert [(r.number, r.kind) for r in known.store.rounds.of_project(2)] == [(1, "rank")]
