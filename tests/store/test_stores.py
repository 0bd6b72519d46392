"""Projects, events, the ledger and versions."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, StatementError

from ppal_backend.errors import SettingsError, StateError, StoreUnavailable
from ppal_backend.store import Database, Lease, ModelVersion, ProjectSides, SeenAnnotation, Store
from ppal_backend.store import database as database_module
from ppal_backend.store import tables as store_module
from ppal_backend.store.tables import TaskSideRow
from ppal_backend.worker.queue import JobQueue
from tests.servers import new_database

VERSION = ModelVersion(1, "ppal-r1-a", 1, "retinanet_tiny", "projects/1/m.pth", ("a", "b"), (0.5, 1.0), {"map": 0.3})


def test_connecting_twice_updates_and_tells_new_from_known(store):
    assert store.projects.connect(1, "1.5", "<old/>", "http://a", {})
    assert not store.projects.connect(1, "1.5", "<new/>", "http://b", {"budget": 3})
    record = store.projects.get(1)
    assert (record.label_config, record.url, record.options) == ("<new/>", "http://b", {"budget": 3})


def test_a_project_that_reuses_an_id_starts_from_nothing(store, project):
    store.ledger.see(project, [SeenAnnotation(7, 70)])
    store.rounds.request(project, "train", "x")
    store.versions.activate(VERSION)
    store.sides.add(project, 1, {70: "evaluation"})
    assert store.projects.connect(project, "1.222", "<View/>", "http://ls", {})
    assert store.ledger.new_count(project) == 0
    assert store.rounds.of_project(project) == []
    assert store.versions.active(project) is None
    assert store.sides.of_project(project) == {}


def test_an_unknown_project_is_a_clear_error(store):
    assert store.projects.find(5) is None
    with pytest.raises(StateError, match="Settings > Model"):
        store.projects.get(5)


def test_events_leave_the_inbox_once_and_in_order(store, project):
    ids = [store.events.add(project, "ANNOTATION_CREATED", {"n": n}) for n in range(3)]
    store.events.add(2, "ANNOTATION_CREATED", {})
    assert [e.body["n"] for e in store.events.pending(project)] == [0, 1, 2]
    store.events.settle(ids[0])
    store.events.settle(ids[1], "broken")
    assert [e.id for e in store.events.pending(project)] == [ids[2]]
    assert store.events.counts() == {"pending": 2, "done": 1, "parked": 1}


def test_events_tell_how_often_they_were_begun_and_since_when_they_wait(store, project):
    number = store.events.add(project, "ANNOTATION_CREATED", {})
    store.events.add(None, "ANNOTATION_CREATED", {})
    assert [e.attempts for e in store.events.pending(project)] == [0]
    store.events.begin([number])
    store.events.begin([number, number + 1])
    assert [e.attempts for e in store.events.pending(project)] == [2]
    assert store.events.waiting(longer_than_s=0) == [project] and store.events.waiting(longer_than_s=60) == []
    store.events.settle(number)
    assert store.events.waiting(longer_than_s=0) == []


def test_events_take_effect_together_with_their_being_done_or_not_at_all(store, project):
    first, second = (store.events.add(1, "START_TRAINING", {}) for _ in range(2))
    with pytest.raises(ZeroDivisionError), store.events.handling([first, second]) as ours:
        assert ours == {first, second} and store.rounds.request(1, "train", "x").number == 1
        assert store.rounds.is_open(1), "what the transaction wrote is seen within it"
        raise ZeroDivisionError
    assert [e.id for e in store.events.pending(1)] == [first, second] and store.rounds.of_project(1) == []
    with store.events.handling([first]) as ours:
        store.rounds.request(1, "train", "x")
    assert ours == {first} and store.events.counts() == {"done": 1, "pending": 1} and store.rounds.is_open(1)
    with store.events.handling([first, second]) as ours:
        assert ours == {second}, "somebody has handled the first"


def in_one_batch(store, project, bodies):
    """Add events in a thread each while another one writes; what each of them got."""
    outcomes = {}

    def add(number, body):
        try:
            outcomes[number] = store.events.add(project, "ANNOTATION_CREATED", body)
        except (StoreUnavailable, StatementError, TypeError) as error:
            outcomes[number] = error

    threads = [threading.Thread(target=add, args=item) for item in enumerate(bodies)]
    with store.events._writing:
        for number, thread in enumerate(threads):
            thread.start()
            while len(store.events._arrived) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join(30)
    return [outcomes[number] for number in range(len(bodies))]


def test_events_that_come_at_once_share_a_transaction_and_keep_their_order(store, project):
    begun = []
    event.listen(store.database.engine, "begin", begun.append)
    ids = in_one_batch(store, project, [{"n": n} for n in range(20)])
    assert len(begun) == 1
    assert [(e.id, e.body["n"]) for e in store.events.pending(project)] == [(i, n) for n, i in enumerate(ids)]


def test_an_event_that_cannot_be_stored_takes_no_other_with_it(store, project):
    ids = in_one_batch(store, project, [{"n": 0}, {"n": {1}}, {"n": 2}])
    assert isinstance(ids[1], StatementError | TypeError)
    assert [(e.id, e.body["n"]) for e in store.events.pending(project)] == [(ids[0], 0), (ids[2], 2)]


def test_everybody_is_told_that_the_database_is_away(store, project, monkeypatch):
    with monkeypatch.context() as patched:
        away = StoreUnavailable("away")
        patched.setattr(store.database, "writing", lambda: (_ for _ in ()).throw(away))
        assert in_one_batch(store, project, [{}, {}, {}]) == [away, away, away]
    assert store.events.pending(project) == [] and store.events.add(project, "START_TRAINING", {}) > 0


def test_what_fails_within_a_transaction_undoes_its_own_part_only(store, project):
    with store.database.transaction():
        store.projects.set_problem(1, "poll", "kept")
        with pytest.raises(IntegrityError), store.database.transaction() as session:
            store.projects.set_problem(1, "disk", "undone")
            session.execute(text("INSERT INTO workers (name, beat_at) VALUES (NULL, NULL)"))
        assert store.projects.get(1).problems == {"poll": "kept"}
    assert store.projects.get(1).problems == {"poll": "kept"}


def test_workers_are_known_by_their_last_sign_of_life(store, monkeypatch):
    start = store_module.now()
    monkeypatch.setattr(store.database, "now", lambda session: start + timedelta(seconds=passed))
    passed = 0.0
    store.workers.beat("a")
    store.workers.beat("b")
    passed = 20.0
    store.workers.beat("b")
    assert store.workers.ages_s() == {"a": pytest.approx(20.0), "b": pytest.approx(0.0)}
    store.workers.leave("b")
    passed = 90_000.0
    store.workers.beat("c")
    assert list(store.workers.ages_s()) == ["c"], "a has been silent for a day"


@pytest.mark.parametrize("damage", [b"no database " * 999, b"SQLite format 3\0" + b"\x10\0\2\2\0" + b"\xff" * 9000])
def test_a_damaged_database_is_told_with_what_brings_it_back(tmp_path, damage):
    (tmp_path / "ppal.db").write_bytes(damage)
    for create in (True, False):
        with pytest.raises(StateError, match=r"ppal\.db to be whole, got: .*ppal restore FILE --force"):
            Database(f"sqlite:///{tmp_path}/ppal.db", create=create)
    assert (tmp_path / "ppal.db").read_bytes() == damage


def test_an_event_survives_a_kill_right_after_it_was_stored(tmp_path):
    url = f"sqlite:///{tmp_path}/ppal.db"
    code = (
        "import os, sys\nfrom ppal_backend.store import Database, Store\n"
        "store = Store(Database(sys.argv[1]))\n"
        "store.projects.connect(1, '1.1', '<View/>', '', {})\n"
        "store.events.add(1, 'ANNOTATION_CREATED', {'x': 1})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, url], check=False).returncode == -9
    assert [e.body for e in Store(Database(url)).events.pending(1)] == [{"x": 1}]


def test_the_ledger_counts_each_annotation_once(store, project):
    store.ledger.see(project, [SeenAnnotation(1, 10), SeenAnnotation(2, 10), SeenAnnotation(1, 10)])
    store.ledger.see(project, [SeenAnnotation(2, 10)])
    assert store.ledger.new_count(project) == 2


def test_skipped_and_deleted_annotations_do_not_count(store, project):
    store.ledger.see(project, [SeenAnnotation(1, 10), SeenAnnotation(2, 11, usable=False)])
    assert store.ledger.new_count(project) == 1
    store.ledger.see(project, [SeenAnnotation(1, None, usable=False)])
    assert store.ledger.new_count(project) == 0


def test_an_annotation_deleted_as_soon_as_it_was_made_keeps_its_task(store, project):
    store.ledger.see(project, [SeenAnnotation(1, 10), SeenAnnotation(1, None, usable=False)])
    assert store.ledger.new_count(project) == 0
    store.ledger.see(project, [SeenAnnotation(1, None)])
    assert store.ledger.tasks_after(project, 0) == [10]


def test_exported_annotations_no_longer_count_even_if_no_event_came(store, project):
    store.ledger.see(project, [SeenAnnotation(i, i) for i in range(1200)])
    store.ledger.used_by(project, 1, range(1, 1205))
    assert store.ledger.new_count(project) == 1
    store.ledger.see(project, [SeenAnnotation(3, 3)])
    assert store.ledger.new_count(project) == 1, "a late duplicate made an old annotation new again"


def at(hour):
    return datetime(2026, 1, 1, hour)


def test_a_correction_is_counted_once_however_often_and_late_it_is_told(store, project):
    see = partial(store.ledger.see, project)
    see([SeenAnnotation(1, 10, changed_at=at(1)), SeenAnnotation(2, 11), SeenAnnotation(3, 12, usable=False)])
    see([SeenAnnotation(1, 10, changed_at=at(2))])
    assert store.ledger.corrected(project) == 0, "no training has had it"
    store.ledger.corrections_read(project)
    store.ledger.used_by(project, 1, [1, 2, 3])
    for told_again in (None, at(1), at(2)):
        see([SeenAnnotation(1, 10, changed_at=told_again)])
    see([SeenAnnotation(2, 11, changed_at=at(5))])
    assert store.ledger.corrected(project) == 0, "told before, or no time to compare it with"
    for _ in range(2):
        see([SeenAnnotation(1, 10, changed_at=at(3))])
        see([SeenAnnotation(1, 10, changed_at=at(2))])
    assert store.ledger.corrected(project) == 1
    see([SeenAnnotation(2, None, usable=False), SeenAnnotation(3, 12, changed_at=at(3))])
    assert store.ledger.corrected(project) == 3, "one is deleted, one no longer skipped"
    store.ledger.deleted(project, [1])
    store.ledger.tasks_deleted(project, [12])
    assert store.ledger.corrected(project) == 3
    store.ledger.corrections_read(project)
    see([SeenAnnotation(1, None, usable=False)])
    assert store.ledger.corrected(project) == 0


def test_what_is_corrected_while_it_is_first_exported_counts(store, project):
    store.ledger.see(project, [SeenAnnotation(1, 10, changed_at=at(1))])
    store.ledger.corrections_read(project)
    store.ledger.see(project, [SeenAnnotation(1, 10, changed_at=at(2))])
    store.ledger.used_by(project, 1, [1])
    assert store.ledger.corrected(project) == 1, "the export may have read it before"
    store.ledger.postpone(project, 1)
    assert store.ledger.corrected(project) == 0


def test_annotations_of_a_cancelled_round_do_not_ask_again(store, project):
    store.ledger.see(project, [SeenAnnotation(i, i) for i in (1, 2, 3)])
    store.ledger.postpone(project, 4)
    assert store.ledger.new_count(project) == 0
    store.ledger.see(project, [SeenAnnotation(4, 4)])
    assert store.ledger.new_count(project) == 1


def test_a_version_that_was_rolled_back_does_not_predict_any_more(store, project):
    random_order = replace(VERSION, version="ppal-r0-z", checkpoint="", round_number=0)
    for version in (random_order, VERSION, replace(VERSION, version="ppal-r2-b", round_number=2)):
        store.versions.activate(version)
    store.versions.activate(VERSION)
    assert store.versions.active(project, with_model=True).version == "ppal-r1-a"
    store.versions.activate(random_order)
    assert store.versions.active(project, with_model=True) is None
    assert store.versions.get(project, "ppal-r2-b").round_number == 2
    with pytest.raises(StateError, match="got 'ppal-r9-x'; it has: ppal-r0-z, ppal-r1-a, ppal-r2-b"):
        store.versions.get(project, "ppal-r9-x")


def test_one_version_is_active_and_activation_is_idempotent(store, project):
    store.versions.activate(VERSION)
    store.versions.activate(replace(VERSION, version="ppal-r2-b", checkpoint="", round_number=2))
    assert store.versions.active(project).version == "ppal-r2-b"
    assert store.versions.active(project, with_model=True) is None, "an order without a model predicts with none"
    store.versions.activate(VERSION)
    store.versions.activate(VERSION)
    active = store.versions.active(project)
    assert (active.version, active.labels, active.difficulty) == ("ppal-r1-a", ("a", "b"), (0.5, 1.0))
    assert [v.version for v in store.versions.of_project(project)] == ["ppal-r1-a", "ppal-r2-b"]
    assert store.versions.names() == ["ppal-r2-b", "ppal-r1-a"]


def test_a_database_that_does_not_answer_says_so_without_its_password():
    with pytest.raises(StoreUnavailable, match=r"ppal:\*\*\*@127.0.0.1:1/x\?connect_timeout=1 to answer") as told:
        Database("postgresql://ppal:s3cret@127.0.0.1:1/x?connect_timeout=1")
    assert "s3cret" not in str(told.value)
    for url, wanted in (("no url", "expected PPAL_DATABASE_URL such as"), ("foodb://x/y", "a driver for the database")):
        with pytest.raises(SettingsError, match=wanted):
            Database(url)


@pytest.fixture
def silent():
    """The port of a server that takes connections and never answers, like a frozen host."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_database_that_takes_connections_and_never_answers_is_given_up(silent, monkeypatch):
    monkeypatch.setattr(database_module, "POSTGRES_WAIT_S", 2)
    told = []

    def open_it(query):
        try:
            Database(f"postgresql://ppal:s3cret@127.0.0.1:{silent}/x{query}")
        except StoreUnavailable as error:
            told.append(str(error))

    opening = [threading.Thread(target=open_it, args=(q,), daemon=True) for q in ("", "?connect_timeout=100")]
    for thread in opening:
        thread.start()
    opening[0].join(30)
    assert not opening[0].is_alive(), "still waiting"
    assert len(told) == 1 and "s3cret" not in told[0]
    assert f"expected the state database postgresql+psycopg://ppal:***@127.0.0.1:{silent}/x to answer" in told[0]
    assert "timeout" in told[0] and told[0].endswith("check that it is up and that its disk is not full")
    assert opening[1].is_alive(), "what the address says itself holds"


@pytest.mark.servers
def test_state_and_queue_give_up_a_host_that_vanishes_while_they_are_connected(postgres):
    url = new_database(postgres, "vanishing")
    database, queue = Database(url), JobQueue(url)
    queue.sync(1)
    with database.engine.connect() as connection:
        for driver in (connection.connection.driver_connection, queue._light.storage.conn):
            with socket.socket(fileno=os.dup(driver.fileno())) as link:
                assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
                assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
    database.close()


def test_a_database_whose_connections_are_all_taken_says_so(tmp_path):
    """Each waits for a server that does not answer; who gets none met an error that nothing expected."""
    database = Database(f"sqlite:///{tmp_path}/ppal.db")
    pool = database.engine.pool
    pool._timeout = 0.1
    taken = [database.engine.connect() for _ in range(pool.size() + pool._max_overflow)]
    with pytest.raises(StoreUnavailable, match=r"ppal.db to answer, got: QueuePool limit .*; it is tried again"):
        database.check()
    for connection in taken:
        connection.close()
    database.check()
    database.close()


def test_a_reader_does_not_wait_for_a_writer(store, project):
    if store.database.name == "sqlite://":
        return  # one connection: everybody takes turns
    with store.database.transaction() as session:
        session.connection()
        assert store.projects.get(project).id == project


def test_events_that_were_settled_long_ago_are_forgotten_and_pending_ones_never(store, project):
    ids = [store.events.add(project, "TASKS_CREATED", {}) for _ in range(5)]
    for event_id, reason in zip(ids[:3], ("", "", "bad content"), strict=True):
        store.events.settle(event_id, reason)
    assert store.events.forget(3600.0) == 0
    assert store.events.forget(-1.0, at_most=2) == 2
    assert store.events.counts() == {"pending": 2, "parked": 1}
    assert store.events.forget(-1.0) == 1 and store.events.forget(-1.0) == 0
    assert len(store.events.pending(project)) == 2


def test_whether_the_database_answers_is_asked_without_counting_anything(store, project):
    asked = []
    event.listen(store.database.engine, "before_cursor_execute", lambda *told: asked.append(told[2]))
    store.database.check()
    assert [text for text in asked if "events" in text or "count" in text.lower()] == [] and asked


def beaten_once(monkeypatch, store, other):
    """Let another process insert a row of the next transaction at the same moment; what transactions there were."""
    transaction, tries = store.database.transaction, []

    @contextmanager
    def contended():
        tries.append(["beaten", "the other", "again"][len(tries)])
        if tries == ["beaten"]:
            other()
            raise IntegrityError("INSERT", {}, Exception("duplicate key"))
        with transaction() as session:
            yield session

    monkeypatch.setattr(store.database, "transaction", contended)
    return tries


def test_an_annotation_that_is_seen_while_a_round_uses_it_breaks_nothing(store, project, monkeypatch):
    """On PostgreSQL a webhook's transaction may insert the row between the round's look and its own insertion."""
    tries = beaten_once(monkeypatch, store, lambda: store.ledger.see(project, [SeenAnnotation(1, 10)]))
    store.ledger.used_by(project, 3, iter([1, 2]))
    assert tries == ["beaten", "the other", "again"] and store.ledger.new_count(project) == 0
    assert store.ledger.usable(project) == {1: 10, 2: None}


def test_a_task_keeps_the_side_it_was_given_first(store, project):
    sides = ProjectSides(store.sides, project, 3)
    sides.add({i: "evaluation" if i % 5 == 0 else "training" for i in range(1200)})
    ProjectSides(store.sides, project, 4).add({0: "training", 1: "evaluation", 5000: "evaluation"})
    kept = sides.all()
    assert len(kept) == 1201 and (kept[0], kept[1], kept[5000]) == ("evaluation", "training", "evaluation")
    with store.database.reading() as session:
        found = session.get(TaskSideRow, (project, 0))
        assert found.round_number == 3 and found.assigned_at is not None, "so it can be proven"
    assert store.sides.of_project(project + 1) == {}


def test_two_processes_that_give_sides_at_once_agree_on_the_first(store, project, monkeypatch):
    tries = beaten_once(monkeypatch, store, lambda: store.sides.add(project, 1, {7: "training"}))
    store.sides.add(project, 1, {7: "evaluation", 8: "evaluation"})
    assert tries == ["beaten", "the other", "again"]
    assert store.sides.of_project(project) == {7: "training", 8: "evaluation"}


def test_what_the_last_training_had_is_known_without_its_folder(store, project):
    assert store.sides.trained_before(project, [1, 2, 3]) == set()
    store.ledger.see(project, [SeenAnnotation(10, 1), SeenAnnotation(20, 2)])
    record = store.rounds.request(project, "train", "asked for")
    store.ledger.used_by(project, record.number, [10, 20])
    lease = Lease.mine()
    store.rounds.claim(project, lease)
    store.rounds.finish(record.id, {}, lease)
    store.ledger.see(project, [SeenAnnotation(30, 3)])
    assert store.sides.trained_before(project, [1, 2, 3]) == {1, 2}
