"""Rounds under leases. Each test names the accident it stands for."""

import subprocess
import sys
import threading
from datetime import timedelta

import pytest

from ppal_backend.errors import StateError
from ppal_backend.store import Lease

ME = Lease.mine()
STRANGER = Lease("another-host", 1, 1.0)


def test_triggers_while_one_is_pending_join_it(store, project):
    first = store.rounds.request(project, "train", "a")
    assert store.rounds.request(project, "train", "b").id == first.id
    assert [r.number for r in store.rounds.of_project(project)] == [1]


def test_a_train_request_upgrades_a_pending_rank_round_but_not_the_reverse(store, project):
    store.rounds.request(project, "rank", "connected")
    assert store.rounds.request(project, "train", "budget").kind == "train"
    assert store.rounds.request(project, "rank", "tasks").kind == "train"


def test_triggers_while_one_runs_become_exactly_one_following_round(store, project):
    store.rounds.request(project, "train", "a")
    running = store.rounds.claim(project, ME)
    for reason in "bcd":
        store.rounds.request(project, "train", reason)
    assert [(r.number, r.state) for r in store.rounds.of_project(project)] == [(1, "running"), (2, "pending")]
    assert store.rounds.claim(project, STRANGER) is None, "two rounds of one project at once"
    store.rounds.finish(running.id, {"map": 0.5})
    assert store.rounds.claim(project, STRANGER).number == 2
    assert store.rounds.of_project(project)[0].metrics == {"map": 0.5}


def test_concurrent_requests_make_one_round(store, project):
    threads = [threading.Thread(target=store.rounds.request, args=(project, "train", "x")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.rounds.of_project(project)) == 1


def test_concurrent_claims_give_the_round_to_one(store, project):
    store.rounds.request(project, "train", "x")
    got = []
    leases = [Lease(f"host{i}", i, 0.0) for i in range(8)]
    threads = [
        threading.Thread(target=lambda lease=lease: got.append(store.rounds.claim(project, lease))) for lease in leases
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(r is not None for r in got) == 1


def test_a_round_of_a_dead_process_is_taken_over_at_once(store, project):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = Lease.of(child.pid)
    store.rounds.request(project, "train", "x")
    assert store.rounds.claim(project, dead).attempts == 1
    assert store.rounds.claim(project, ME) is None, "taken while its process lived"
    assert store.rounds.claimable_projects() == []
    child.kill()
    child.wait()
    assert store.rounds.claimable_projects() == [project]
    assert store.rounds.claim(project, ME).attempts == 2


def test_a_reused_process_id_does_not_keep_a_lease_alive(store, project):
    store.rounds.request(project, "train", "x")
    store.rounds.claim(project, Lease(ME.host, ME.pid, ME.started - 1000))
    assert store.rounds.claim(project, ME) is not None


def test_a_silent_lease_of_another_host_runs_out(store, project):
    store.rounds.request(project, "train", "x")
    record = store.rounds.claim(project, STRANGER, lease_s=60)
    assert store.rounds.claim(project, ME) is None
    assert store.rounds.renew(record.id, STRANGER, lease_s=-1)
    assert store.rounds.claim(project, ME) is not None
    assert not store.rounds.renew(record.id, STRANGER), "the old owner must notice that it lost the round"


def test_a_released_round_waits_for_its_time(store, project):
    store.rounds.request(project, "train", "x")
    record = store.rounds.claim(project, ME)
    store.rounds.release(record.id, retry_after_s=60, error="Label Studio is down")
    assert store.rounds.claim(project, ME) is None
    assert store.rounds.running(project).error == "Label Studio is down"
    store.rounds.release(record.id)
    assert store.rounds.claim(project, ME).id == record.id


def test_a_round_that_keeps_crashing_is_given_up(store, project):
    store.rounds.request(project, "train", "x")
    for expected in (True, True, False):
        record = store.rounds.claim(project, ME)
        assert store.rounds.crashed(record.id, "killed", limit=3, retry_after_s=0) is expected
    assert store.rounds.get(record.id).state == "failed"
    assert not store.rounds.crashed(record.id, "killed", limit=3, retry_after_s=0)


def test_cancel_reaches_a_running_round_and_ends_a_pending_one(store, project):
    store.rounds.request(project, "train", "x")
    record = store.rounds.claim(project, ME)
    store.rounds.ask_cancel(record.id)
    assert not store.rounds.renew(record.id, ME)
    pending = store.rounds.request(project, "train", "y")
    store.rounds.ask_cancel(pending.id)
    assert store.rounds.get(pending.id).state == "cancelled"
    with pytest.raises(StateError, match="not pending or running"):
        store.rounds.ask_cancel(pending.id)


def test_a_request_for_an_unknown_project_says_so(store):
    with pytest.raises(StateError, match="project 9 is not connected"):
        store.rounds.request(9, "train", "x")
    with pytest.raises(ValueError, match="expected kind"):
        store.rounds.request(9, "guess", "x")


def test_a_process_that_dies_without_a_word_counts_as_a_crash_of_the_step(store, project):
    store.rounds.request(project, "train", "x")
    for crashes in (0, 1, 2):
        record = store.rounds.claim(project, Lease(ME.host, ME.pid, -float(crashes)), crash_limit=3)
        assert record.crashes == crashes
        store.rounds.report(record.id, "train", {})
    assert store.rounds.claim(project, ME, crash_limit=3) is None
    record = store.rounds.get(record.id)
    assert record.state == "failed" and "given up after 3 times in step 'train'" in record.error


def test_a_round_that_gets_further_is_not_given_up_for_old_crashes(store, project):
    store.rounds.request(project, "train", "x")
    for step in ("export", "train", "infer", "publish"):
        record = store.rounds.claim(project, Lease(ME.host, ME.pid, -float(len(step))), crash_limit=2)
        store.rounds.report(record.id, step, {})
    assert store.rounds.get(record.id).state == "running"


def test_whoever_lost_a_round_changes_nothing_of_it(store, project):
    store.rounds.request(project, "train", "x")
    record = store.rounds.claim(project, STRANGER, lease_s=-1)
    store.rounds.claim(project, ME)
    assert store.rounds.holds(record.id, ME) and not store.rounds.holds(record.id, STRANGER)
    rounds = store.rounds
    assert not rounds.report(record.id, "publish", {}, STRANGER) and not rounds.finish(record.id, {}, STRANGER)
    assert not rounds.fail(record.id, "x", STRANGER) and not rounds.cancel(record.id, "x", STRANGER)
    assert not rounds.release(record.id, 60, "x", STRANGER)
    assert not rounds.crashed(record.id, "x", limit=1, retry_after_s=60, lease=STRANGER)
    assert rounds.renew(record.id, ME) and rounds.get(record.id).error == f"its process {STRANGER} died"
    assert rounds.finish(record.id, {"map": 0.1}, ME) and rounds.get(record.id).state == "done"


@pytest.mark.parametrize("how", ["failed", "given up"])
def test_a_round_that_breaks_before_it_has_noticed_that_it_was_cancelled_is_cancelled(store, project, how):
    """It counted as failed: a later change of a setting started it again."""
    store.rounds.request(project, "train", "x")
    record = store.rounds.claim(project, ME)
    store.rounds.ask_cancel(record.id)
    if how == "failed":
        assert store.rounds.fail(record.id, "out of memory", ME)
    else:
        assert not store.rounds.crashed(record.id, "killed by signal 9", 1, 0.0, ME)
    ended = store.rounds.get(record.id)
    assert ended.state == "cancelled" and ended.finished_at is not None and store.rounds.failure(project) is None
    assert ("out of memory" if how == "failed" else "killed by signal 9") in ended.error


def test_a_round_of_a_project_that_was_set_up_afresh_is_lost_to_its_process(store, project):
    """Its process ended with a traceback: "there is no round"."""
    store.rounds.request(project, "train", "x")
    record = store.rounds.claim(project, ME)
    store.projects.connect(project, "another key", "<View/>", "http://ls", {})
    rounds = store.rounds
    assert not rounds.fail(record.id, "x", ME) and not rounds.cancel(record.id, "x", ME)
    assert not rounds.finish(record.id, {}, ME) and not rounds.release(record.id, 60, "x", ME)
    assert rounds.is_taken(record.id, ME) and not rounds.prolong(record.id, ME) and rounds.of_project(project) == []


def test_whoever_asks_for_a_round_may_have_a_clock_that_is_fast(store, project, monkeypatch):
    """A round was not due before its asker's time: it waited for as long as the clocks differed."""
    store.rounds.request(project, "train", "x")
    behind = store.database.now
    monkeypatch.setattr(store.database, "now", lambda session: behind(session) - timedelta(minutes=5))
    assert store.rounds.claimable_projects() == [project] and store.rounds.claim(project, ME).number == 1


def test_a_paused_project_keeps_its_round_and_starts_none(store, project):
    store.rounds.request(project, "train", "x")
    record = store.rounds.claim(project, ME)
    assert store.projects.set_paused(project, True) and not store.projects.set_paused(project, True)
    assert not store.rounds.renew(record.id, ME), "the running round must notice"
    store.rounds.release(record.id)
    assert store.rounds.claimable_projects() == [] and store.rounds.claim(project, ME) is None
    store.projects.set_paused(project, False)
    assert store.rounds.claimable_projects() == [project]
    assert store.rounds.claim(project, ME).number == 1


def test_cancel_ends_a_round_that_waits_and_one_whose_process_died(store, project):
    for lease, retry_after_s in ((ME, 600), (Lease(ME.host, ME.pid, -1.0), None)):
        store.rounds.request(project, "train", "x")
        record = store.rounds.claim(project, lease)
        if retry_after_s is not None:
            store.rounds.release(record.id, retry_after_s, "Label Studio is down")
        store.rounds.ask_cancel(record.id)
        assert store.rounds.get(record.id).state == "cancelled", "nobody is there to stop it"
        assert store.rounds.running(project) is None


def test_round_0_is_a_projects_first_ranking_by_the_detector_as_it_is(store, project):
    first = store.rounds.request(project, "rank", "known labels", as_is=True)
    assert (first.number, store.rounds.request(project, "rank", "again", as_is=True).number) == (0, 0)
    store.rounds.finish(store.rounds.claim(project, ME).id, {}, ME)
    assert store.rounds.request(project, "rank", "known labels", as_is=True).number == 1


def test_a_training_is_never_round_0(store, project):
    store.rounds.request(project, "rank", "known labels", as_is=True)
    assert [store.rounds.request(project, "train", "annotations").number for _ in range(2)] == [1, 1]
    store.rounds.finish(store.rounds.claim(project, ME).id, {}, ME)
    assert store.rounds.request(project, "train", "more", as_is=True).number == 2
