"""Rounds under leases. Each test names the accident it stands for."""

import subprocess
import sys
import threading

import psutil
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
    dead = Lease(ME.host, child.pid, psutil.Process(child.pid).create_time())
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
