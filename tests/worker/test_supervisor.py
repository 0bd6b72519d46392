"""What becomes of a round whose process ended, as its supervisor sees it."""

import sys
import textwrap
import threading

import pytest

from ppal_backend.store import Database, Lease, Store
from ppal_backend.worker.supervisor import Supervisor
from tests.servers import wait_for


@pytest.fixture
def world(tmp_path, monkeypatch):
    """``world(code)`` runs a round whose process is ``code``, ``world.supervisor(code)`` is who would run it."""
    url = f"sqlite:///{tmp_path}/ppal.db"
    store = Store(Database(url))
    store.projects.connect(1, "1.1", "<View/>", "http://ls", {})
    store.rounds.request(1, "train", "x")
    start = f"import os, sys\nfrom ppal_backend.store import Database, Lease, Store\nstore = Store(Database({url!r}))\n"

    def supervisor(code):
        (tmp_path / "a_round.py").write_text(start + textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(p for p in sys.path if p)}")
        return Supervisor(store, "a_round")

    def run(code):
        supervisor(code).run_next()
        return store.rounds.of_project(1)[0]

    run.store, run.supervisor = store, supervisor
    yield run
    store.close()


def test_a_process_that_dies_is_told_and_its_round_tried_again(world):
    record = world(
        "record = store.rounds.claim(1, Lease.mine())\nstore.rounds.report(record.id, 'train', {})\nos.abort()"
    )
    assert (record.state, record.crashes) == ("running", 1)
    assert record.error == "the process of round 1 ended early (killed by signal 6) in step 'train'"
    assert world.store.rounds.claimable_projects() == [], "after a pause"


def test_a_round_that_somebody_else_took_over_is_not_touched(world, caplog):
    record = world("""
        record = store.rounds.claim(1, Lease.mine())
        store.rounds.release(record.id)
        store.rounds.claim(1, Lease("another-host", 1, 1.0))
        os.abort()
    """)
    assert (record.crashes, record.error) == (0, "") and "given up" not in caplog.text
    assert world.store.rounds.holds(record.id, Lease("another-host", 1, 1.0))


def test_the_round_that_was_asked_for_first_is_run_whichever_project_it_is_of(world):
    world.store.projects.connect(2, "2.1", "<View/>", "http://ls", {})
    world.store.projects.connect(3, "3.1", "<View/>", "http://ls", {})
    first = world.store.rounds.claim(1, Lease.mine())
    for project_id in (3, 1, 2):
        world.store.rounds.request(project_id, "train", "x")
    supervisor = world.supervisor("""
        record = store.rounds.claim(int(sys.argv[1]), Lease.mine())
        store.rounds.finish(record.id, {})
    """)
    assert supervisor.run_next() == 3, "a round of project 1 runs"
    world.store.rounds.finish(first.id, {})
    assert [supervisor.run_next() for _ in range(3)] == [1, 2, None]


def test_nothing_to_do_starts_no_process(world):
    world.store.projects.set_paused(1, True)
    assert world("raise SystemExit('never')").attempts == 0


def test_a_project_whose_process_is_still_starting_gets_no_second_one_and_is_told_to_stop(world, tmp_path):
    """A second process found nothing to claim, and with its end the first one was forgotten: nobody told it to stop."""
    started = tmp_path / "started"
    supervisor = world.supervisor(f"""
        import pathlib, signal, threading
        asked = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: asked.set())
        with open({str(started)!r}, "a") as file:
            file.write(f"{{os.getpid()}}\\n")
        if pathlib.Path({str(started)!r}).read_text() != f"{{os.getpid()}}\\n":
            raise SystemExit(0)  # not the first
        asked.wait(30)
        record = store.rounds.claim(1, Lease.mine())
        store.rounds.release(record.id) if asked.is_set() else store.rounds.fail(record.id, "nobody asked it to stop")
    """)
    threads = [threading.Thread(target=supervisor.run_next) for _ in range(2)]
    threads[0].start()
    wait_for(lambda: started.is_file() and started.read_text())
    threads[1].start()
    threads[1].join(30)
    supervisor.stop()
    threads[0].join(5)
    assert not threads[0].is_alive(), "its process was told to stop"
    assert len(started.read_text().split()) == 1
    assert world.store.rounds.claimable_projects() == [1], "the round goes on later"


def test_a_round_can_follow_once_the_process_before_it_has_ended(world):
    supervisor = world.supervisor("""
        record = store.rounds.claim(1, Lease.mine())
        store.rounds.finish(record.id, {}) if record.attempts == 2 else store.rounds.release(record.id)
    """)
    supervisor.run_next()
    supervisor.run_next()
    (record,) = world.store.rounds.of_project(1)
    assert (record.state, record.attempts) == ("done", 2)
