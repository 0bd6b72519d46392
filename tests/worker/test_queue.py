"""Jobs reach their handler, from another producer too, and quick work does not wait for a round."""

import contextlib
import itertools
import logging
import threading
import time

import psycopg
import pytest
from sqlalchemy import inspect

from ppal_backend.errors import QueueUnavailable, SettingsError
from ppal_backend.settings import load_settings
from ppal_backend.store import Database, Store
from ppal_backend.worker.queue import JobQueue, open_queue
from tests.servers import new_database, postgresql, redis_server, wait_for

_numbers = itertools.count()


@pytest.fixture(scope="module")
def redis():
    with redis_server() as (url, _):
        yield url


@pytest.fixture(scope="module")
def postgres():
    with postgresql() as dsn:
        yield dsn


KINDS = ["sqlite", *(pytest.param(kind, marks=pytest.mark.servers) for kind in ("redis", "postgresql"))]


@pytest.fixture(params=KINDS)
def location(request, tmp_path):
    """Where a queue lies; every test runs over every kind."""
    if request.param == "sqlite":
        return tmp_path / "jobs.db"
    if request.param == "postgresql":
        return new_database(request.getfixturevalue("postgres"), f"queue{next(_numbers)}")
    from redis import Redis

    url = request.getfixturevalue("redis")
    Redis.from_url(url).flushall()
    return url


@pytest.fixture
def running(location):
    synced, rounds, hold = [], [], threading.Event()

    def on_round(project_id):
        hold.wait(10)
        rounds.append(project_id)

    queue = JobQueue(location, synced.append, on_round)
    consumers = queue.consumers()
    for consumer in consumers:
        consumer.start()
    yield location, synced, rounds, hold
    hold.set()
    for consumer in consumers:
        consumer.stop(graceful=True)


def test_quick_jobs_overtake_a_long_round(running):
    location, synced, rounds, hold = running
    producer = JobQueue(location)
    producer.run_round(7)
    for project_id in (1, 2, 3):
        producer.sync(project_id)
    wait_for(lambda: synced == [1, 2, 3])
    assert rounds == []
    hold.set()
    wait_for(lambda: rounds == [7])


def test_jobs_wait_for_a_worker(location):
    JobQueue(location).sync(5)
    got = []
    queue = JobQueue(location, got.append, got.append)
    assert queue.pending() == 1
    consumer = queue.consumers()[0]
    consumer.start()
    try:
        wait_for(lambda: got == [5])
    finally:
        consumer.stop(graceful=True)


def test_each_job_goes_to_one_of_several_workers(location):
    got = []
    queues = [JobQueue(location, got.append, got.append) for _ in range(2)]
    consumers = [consumer for queue in queues for consumer in queue.consumers()]
    for consumer in consumers:
        consumer.start()
    try:
        for project_id in range(20):
            JobQueue(location).sync(project_id)
        wait_for(lambda: len(got) >= 20)
        wait_for(lambda: queues[0].pending() == 0)
        assert sorted(got) == list(range(20))
    finally:
        for consumer in consumers:
            consumer.stop(graceful=True)


def test_jobs_taken_at_once_by_several_threads_are_each_taken_once(location):
    queue = JobQueue(location)
    for project_id in range(60):
        queue.sync(project_id)
    taken, barrier = [], threading.Barrier(4)

    def take():
        light = JobQueue(location)._light
        barrier.wait(30)
        while (job := light.dequeue()) is not None:
            taken.append(job.args[0])

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(taken) == list(range(60))


def test_waiting_jobs_do_not_pile_up(location, monkeypatch):
    monkeypatch.setattr("ppal_backend.worker.queue.MOST_ROUNDS", 10)
    monkeypatch.setattr("ppal_backend.worker.queue.MOST_SYNCS", 20)
    queue = JobQueue(location)
    for _ in range(30):
        queue.run_round(1)
        queue.sync(1)
    assert queue.pending() == 30


def test_a_queue_that_does_not_answer_says_so(tmp_path):
    with pytest.raises(QueueUnavailable, match="does not answer"):
        JobQueue("redis://127.0.0.1:1/0").sync(1)
    with pytest.raises(QueueUnavailable, match="does not answer"):
        JobQueue("postgresql://ppal:word-9@127.0.0.1:1/x").sync(1)
    (tmp_path / "jobs.db").write_bytes(b"this is no database, whatever its name says" * 100)
    with pytest.raises(QueueUnavailable, match="not a database"):
        JobQueue(tmp_path / "jobs.db").sync(1)


def test_the_settings_name_the_queue(tmp_path):
    open_queue(load_settings(MODEL_DIR=tmp_path)).sync(3)
    assert JobQueue(tmp_path / "jobs.db").pending() == 1
    for url in ("amqp://somewhere", "redis://host:notaport/0"):
        with pytest.raises(SettingsError, match="expected PPAL_QUEUE_URL such as redis"):
            open_queue(load_settings(MODEL_DIR=tmp_path, queue_url=url))


@pytest.mark.servers
def test_a_queue_beside_the_state_touches_none_of_its_tables(postgres):
    url = new_database(postgres, "shared")
    state = Database(url)
    queue = JobQueue(url)
    queue.sync(1)
    with state.engine.connect() as connection:
        tables = set(inspect(connection).get_table_names())
        assert "projects" in tables and not [name for name in tables if name.startswith("huey")]
        assert "huey_task" in inspect(connection).get_table_names(schema="ppal_jobs")
    state.close()


@pytest.mark.servers
def test_a_server_without_a_locale_holds_state_and_queue(postgres):
    """Its databases have the encoding SQL_ASCII, in which psycopg answers with bytes unless told what they are."""
    url = new_database(postgres, "no-locale", "ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    store = Store(Database(url))
    store.projects.connect(1, "1.111", "<View><!-- größe --></View>", "http://ls", {})
    assert store.projects.get(1).label_config == "<View><!-- größe --></View>"
    queue = JobQueue(url)
    queue.sync(1)
    assert queue.pending() == 1
    store.close()


def cut_connections(url):
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


@pytest.mark.servers
def test_a_queue_answers_again_after_its_connections_were_cut(postgres):
    url = new_database(postgres, "cut")
    queue = JobQueue(url)
    queue.sync(1)
    cut_connections(url)
    with contextlib.suppress(QueueUnavailable):
        queue.sync(2)
    queue.sync(3)
    assert 2 <= queue.pending() <= 3


@pytest.mark.servers
def test_a_worker_takes_jobs_again_after_its_connections_were_cut(postgres):
    """It waits in a connection of its own, which notices nothing of a new one."""
    url, got = new_database(postgres, "cutworker"), []
    consumer = JobQueue(url, got.append, got.append).consumers()[0]
    consumer.start()
    try:
        JobQueue(url).sync(1)
        wait_for(lambda: got == [1])
        cut_connections(url)
        JobQueue(url).sync(2)
        wait_for(lambda: got == [1, 2])
    finally:
        consumer.stop(graceful=True)


@pytest.mark.servers
def test_workers_that_open_a_new_queue_at_once_make_its_tables_once(postgres):
    url, barrier, failed = new_database(postgres, "atonce"), threading.Barrier(6), []

    def enqueue(number):
        queue = JobQueue(url)
        barrier.wait(30)
        try:
            queue.sync(number)
        except QueueUnavailable as error:
            failed.append(error)

    threads = [threading.Thread(target=enqueue, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == [] and JobQueue(url).pending() == 6


def test_a_worker_whose_queue_is_away_says_so_now_and_then_in_a_line(caplog, monkeypatch):
    """Every reader wrote its traceback several times a second: ten thousand lines while Redis restarted."""
    for name in ("huey.consumer.Worker", "huey.consumer.Scheduler"):
        monkeypatch.setattr(logging.getLogger(name), "filters", [])  # other tests have had errors
    consumers = JobQueue("redis://127.0.0.1:1/0", print, print).consumers()
    for consumer in consumers:
        consumer.start()
    time.sleep(2.0)
    for consumer in consumers:
        consumer.stop(graceful=True)
    records = [r for r in caplog.records if r.name.startswith("huey.consumer.") and r.levelname == "ERROR"]
    assert {r.getMessage().split(":")[0] for r in records} == {"Error reading from queue", "Error reading schedule."}
    assert len(records) == 2 and all("Connection refused" in r.getMessage() and not r.exc_info for r in records)
