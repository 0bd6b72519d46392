"""Several workers on PostgreSQL, jobs there or in Redis: projects train side by side, every round runs once; Redis may
go."""

import itertools
import time

import pytest

from ppal_backend.worker.queue import JobQueue
from tests.faults.conftest import WAIT_S
from tests.servers import new_database, postgresql, redis_server, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.servers]


_numbers = itertools.count()


@pytest.fixture(scope="module")
def servers():
    with postgresql() as dsn, redis_server() as (url, server):
        yield dsn, url, server


@pytest.fixture(params=["redis", "postgresql"])
def rig(servers, make_rig, request):
    dsn, url, _ = servers
    state = new_database(dsn, f"rig{next(_numbers)}")
    return make_rig(PPAL_DATABASE_URL=state, PPAL_QUEUE_URL=url if request.param == "redis" else state)


def test_two_workers_train_two_projects_at_once_and_each_round_once(rig):
    assert not rig.store.database.is_sqlite and not (rig.data / "jobs.db").exists()
    for project_id in (1, 2):
        rig.project(project_id)
        rig.hold(project_id, "training")
    rounds = {project_id: rig.ask(project_id) for project_id in (1, 2)}
    for _ in range(2):
        rig.start_worker()
    pids = {rig.wait_at(project_id, "training") for project_id in (1, 2)}
    assert len(pids) == 2, "both are in training at this moment, in processes of their own"
    for project_id in (1, 2):
        rig.let_go(project_id, "training")
    for project_id, round_id in rounds.items():
        record = rig.wait_done(round_id)
        assert record.attempts == 1 and record.crashes == 0
        assert [c for c in rig.calls(project_id) if not c.startswith("progress")] == [
            "export", "prepare", "train", "evaluate", "infer", "infer", "publish"]  # fmt: skip
    assert rig.label_studio.projects[1].served() == rig.label_studio.projects[2].served()
    assert not (rig.data / "ppal.db").exists() and not (rig.data / "jobs.db").exists()


def test_many_rounds_on_two_workers_each_run_once(rig):
    projects = range(11, 16)
    for project_id in projects:
        rig.project(project_id)
    rounds = {project_id: rig.ask(project_id, "rank") for project_id in projects}
    for _ in range(2):
        rig.start_worker(parallel=2)
    for project_id, round_id in rounds.items():
        record = rig.wait_done(round_id, timeout_s=2 * WAIT_S)  # they share the machine's cores
        assert record.attempts == 1
        assert rig.calls(project_id).count("export") == rig.calls(project_id).count("publish") == 1


@pytest.mark.parametrize("rig", ["redis"], indirect=True)
def test_redis_restarted_while_a_round_runs(rig, servers, recovered):
    _, url, redis = servers
    rig.project(1)
    rig.hold(1, "training")
    rig.start_worker()
    first = rig.ask(1)
    rig.wait_at(1, "training")
    JobQueue(url).sync(1)
    redis.kill()
    rig.store.events.add(1, "START_TRAINING", {})  # a webhook's event, whose notice no queue takes
    time.sleep(3)  # the worker's tick meets the dead Redis
    redis.start()
    moment = time.monotonic()
    wait_for(lambda: JobQueue(url).pending() >= 0, "Redis answers")
    rig.let_go(1, "training")
    rig.wait_done(first)
    rig.wait(lambda: len(rig.store.rounds.of_project(1)) == 2, "the event becomes a round")
    second = rig.wait_done(rig.store.rounds.of_project(1)[1].id)
    recovered(time.monotonic() - moment)
    assert second.attempts == 1 and rig.store.rounds.get(first).attempts == 1
    assert rig.workers[0].poll() is None, "the worker survived"
