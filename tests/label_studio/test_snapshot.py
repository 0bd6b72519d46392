"""A snapshot put together from an earlier one is the one that reading everything gives, or everything is read."""

import json

import pytest

from ppal_backend.label_studio.client import read_export
from ppal_backend.label_studio.snapshot import SNAPSHOT, earlier_snapshot, take_snapshot
from ppal_backend.label_studio.source import LabelStudioSource
from tests.label_studio.fake import FakeLabelStudio
from tests.place import CONFIG


def annotation(number, skipped=False, x=10):
    return {"id": number, "was_cancelled": skipped, "result": [{"value": {"x": x}}]}


def stamped(hour, second=0):
    return f"2026-01-01T{hour:02d}:00:{second:02d}.000000Z"


@pytest.fixture
def fake():
    """Thirty tasks, the last one changed at three, the others before one: four annotated, one of them only skipped."""
    fake = FakeLabelStudio(tasks=30)
    fake.project["label_config"] = CONFIG
    for i in (3, 7, 11):
        fake.add_task(i, [annotation(100 + i)])
    fake.add_task(15, [annotation(115, skipped=True)])
    fake.tasks[30]["updated_at"] = stamped(3)
    return fake


class Rounds:
    """Rounds of a project, each with its snapshot."""

    def __init__(self, root, fake):
        self.root, self.fake = root, fake

    def take(self, number, takes_over=True):
        """Ids of the annotations."""
        source = LabelStudioSource(self.fake.client(), None, 1, takes_over=takes_over)
        return sorted(source.export(self.folder(number)))

    def folder(self, number):
        return self.root / str(number) / "export"

    def content(self, number):
        folder = self.folder(number)
        tasks = {t["id"]: t for t in read_export(folder / "annotated.json")}
        return tasks, (folder / "pool.jsonl").read_text(), (folder / "label_config.xml").read_text()

    def taken_over(self, number):
        return json.loads((self.folder(number) / SNAPSHOT).read_text())["taken_over"]

    def check(self, number):
        """Whatever was taken over, the snapshot is that of reading everything now."""
        ids = self.take(number)
        assert ids == self.take(900 + number, takes_over=False)
        assert self.content(number) == self.content(900 + number)
        pool = [json.loads(line)[0] for line in self.content(number)[1].splitlines()]
        assert pool == sorted(set(pool))


@pytest.fixture
def rounds(tmp_path, fake):
    rounds = Rounds(tmp_path, fake)
    assert rounds.take(1) == [103, 107, 111, 115] and rounds.taken_over(1) is None
    return rounds


def change(fake, task_id, annotations, hour=5):
    fake.add_task(task_id, annotations)
    fake.tasks[task_id]["updated_at"] = stamped(hour, task_id % 60)


def test_what_changed_is_asked_for_and_the_rest_is_taken_over(rounds, fake):
    change(fake, 4, [annotation(104)])  # labelled
    change(fake, 7, [annotation(107, x=90)])  # edited
    change(fake, 11, [])  # its annotation was deleted
    change(fake, 40, [])  # imported
    change(fake, 41, [annotation(141)])  # imported with an annotation
    fake.requests.clear()
    ids = rounds.take(2)
    assert ids == [103, 104, 107, 115, 141] and rounds.taken_over(2) == 32 - 6
    exports = [r.url.params.get_list("ids[]") for r in fake.requests if r.url.path.endswith("/export")]
    assert exports == [["4", "7", "41"]], "annotations that did not change were read"
    columns = [
        json.loads(r.url.params["query"])["filters"]["items"] for r in fake.requests if r.url.path == "/api/tasks"
    ]
    assert all(items and items[0]["filter"].endswith("updated_at") for items in columns), "all tasks were listed"
    tasks, pool, _ = rounds.content(2)
    assert tasks[7]["annotations"][0]["result"][0]["value"]["x"] == 90
    listed = [json.loads(line)[0] for line in pool.splitlines()]
    assert listed == [1, 2, 5, 6, *range(8, 31), 40]
    rounds.check(3)
    assert rounds.taken_over(3) is not None, "what was put together can be gone on from"


def test_nothing_new_is_taken_over_whole(rounds, fake):
    for number in (2, 3):
        rounds.check(number)
        assert rounds.taken_over(number) == 29, "the last change comes again"


@pytest.mark.parametrize("what", ["task", "annotation in bulk", "skip in bulk", "config", "much"])
def test_what_label_studio_does_not_tell_of_is_found_by_its_counts_and_everything_is_read(rounds, fake, what):
    if what == "task":
        del fake.tasks[9]
    elif what == "annotation in bulk":
        fake.tasks[9]["annotations"] = [annotation(109)]  # without a new time
    elif what == "skip in bulk":
        fake.tasks[9]["annotations"] = [annotation(109, skipped=True)]
    elif what == "config":
        fake.project["label_config"] = CONFIG.replace("$image", "$photo")
    else:
        for i in range(1, 9):
            change(fake, i, [])
    rounds.check(2)
    assert rounds.taken_over(2) is None


@pytest.mark.parametrize("damage", ["not json", "{}", None])
def test_a_damaged_or_missing_snapshot_is_not_gone_on_from(rounds, fake, damage):
    note = rounds.folder(1) / SNAPSHOT
    if damage is None:
        note.unlink()
    else:
        note.write_text(damage)
    rounds.check(2)
    assert rounds.taken_over(2) is None


def test_a_cut_off_snapshot_is_not_gone_on_from(rounds, fake):
    (rounds.folder(1) / "annotated.json").write_text("[")
    rounds.check(2)
    assert rounds.taken_over(2) is None


def test_the_newest_earlier_round_counts_and_later_ones_do_not(tmp_path, fake):
    for number in (1, 4, 9):
        take_snapshot(fake.client(), 1, tmp_path / str(number) / "export", None)
    assert earlier_snapshot(tmp_path / "5" / "export") == tmp_path / "4" / "export"
    assert earlier_snapshot(tmp_path / "1" / "export") is None
    assert earlier_snapshot(tmp_path / "somewhere" / "export") is None


def test_a_training_reads_everything(rounds, fake):
    fake.tasks[3]["annotations"][0]["result"] = []  # changed without a trace
    assert rounds.take(2, takes_over=False) and rounds.content(2)[0][3]["annotations"][0]["result"] == []


def test_a_task_whose_counter_says_annotated_and_that_is_not_is_in_the_pool(rounds, fake):
    """Label Studio's counters drift; such a task was in no training and in no pool, without a word."""
    fake.stale = {5: {"total_annotations": 1}, 11: {"total_annotations": 0}, 29: {"total_annotations": 2}}
    rounds.take(2, takes_over=False)
    tasks, pool, _ = rounds.content(2)
    assert sorted(tasks) == [3, 7, 11, 15]
    assert [json.loads(line)[0] for line in pool.splitlines()] == [i for i in range(1, 31) if i not in (3, 7)]
    assert json.loads(pool.splitlines()[3])[1] == "/data/upload/1/5.jpg"


def test_tasks_that_come_while_everything_is_read_are_in_the_pool(rounds, fake):
    def fault(request):
        if request.url.path.endswith("/export"):
            fake.add_task(31)
        return None

    fake.fault = fault
    rounds.take(2, takes_over=False)
    assert [json.loads(line)[0] for line in rounds.content(2)[1].splitlines()][-2:] == [30, 31]
