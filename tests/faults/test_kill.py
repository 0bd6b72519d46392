"""kill -9 of a round's process and of the worker in every step: the round goes on to the queue it would have had."""

import time

import pytest

from tests.faults.conftest import POOL, Rig, kill

pytestmark = pytest.mark.faults

STEPS = ("export", "dataset", "train", "training", "evaluate", "infer", "inferring", "candidates", "query", "publish",
         "publish-importing", "publish-imported", "publish-activating", "publish-done")  # fmt: skip
CALLED_ONCE = {"export", "prepare", "train", "evaluate"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One worker for all; every test has a project of its own in it."""
    rig = Rig(tmp_path_factory.mktemp("kill") / "rig")
    rig.project(1)
    rig.start_worker()
    first = rig.ask(1)
    rig.wait_done(first)
    yield rig
    rig.stop()


def check(rig, project_id, place):
    """The outcome is that of project 1, which nothing disturbed, and nothing was done twice without need."""
    fake = rig.label_studio.projects[project_id]
    assert fake.served() == rig.label_studio.projects[1].served() and sorted(fake.served()) == list(POOL)
    versions = rig.store.versions.of_project(project_id)
    assert [v.active for v in versions] == [True] and fake.project["model_version"] == versions[0].version
    assert fake.counts() == {versions[0].version: len(POOL)}, "a version was left half done in Label Studio"
    calls = [c for c in rig.calls(project_id) if c in CALLED_ONCE]
    assert calls == ["export", "prepare", "train", "evaluate"], f"killed at {place}"
    assert rig.store.ledger.new_count(project_id) == 0


@pytest.mark.parametrize("place", STEPS)
def test_a_killed_round_process(shared, place, recovered):
    project_id = 10 + STEPS.index(place)
    shared.project(project_id)
    shared.hold(project_id, place)
    round_id = shared.ask(project_id)
    moment = kill(shared.wait_at(project_id, place))
    shared.let_go(project_id, place)
    record = shared.wait_done(round_id)
    recovered(time.monotonic() - moment)
    assert record.attempts == 2
    check(shared, project_id, place)


@pytest.mark.parametrize("place", STEPS)
def test_a_killed_worker(shared, place, recovered):
    project_id = 40 + STEPS.index(place)
    shared.project(project_id)
    shared.hold(project_id, place)
    round_id = shared.ask(project_id)
    pid = shared.wait_at(project_id, place)
    moment = kill(shared.workers[-1].pid)
    shared.start_worker()
    shared.wait(lambda: not _alive(pid), "the orphaned round process leaves by itself")
    shared.let_go(project_id, place)
    record = shared.wait_done(round_id)
    recovered(time.monotonic() - moment)
    assert record.attempts == 2 and record.crashes == 0
    check(shared, project_id, place)


def test_a_round_that_kills_its_process_every_time_is_given_up_and_says_so(shared):
    project_id = 90
    shared.project(project_id)
    shared.hold(project_id, "train")
    round_id = shared.ask(project_id)
    for _ in range(4):
        pid = shared.wait_at(project_id, "train")
        (shared.folder / f"at-{project_id}-train").unlink()
        kill(pid)
    record = shared.wait_done(round_id, "failed")
    shared.let_go(project_id, "train")
    assert "killed by signal 9" in record.error and "given up after 4 times in step 'train'" in record.error


def _alive(pid):
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
