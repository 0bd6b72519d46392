"""What becomes of a round whose process ended, as its supervisor sees it."""

import sys
import textwrap

import pytest

from ppal_backend.store import Database, Lease, Store
from ppal_backend.worker.supervisor import Supervisor


@pytest.fixture
def world(tmp_path, monkeypatch):
    """``world(code)`` runs a round whose process is ``code``; it knows ``store`` and ``project``."""
    url = f"sqlite:///{tmp_path}/ppal.db"
    store = Store(Database(url))
    store.projects.connect(1, "1.1", "<View/>", "http://ls", {})
    store.rounds.request(1, "train", "x")
    start = f"import os, sys\nfrom ppal_backend.store import Database, Lease, Store\nstore = Store(Database({url!r}))\n"

    def run(code):
        (tmp_path / "a_round.py").write_text(start + textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(p for p in sys.path if p)}")
        Supervisor(store, "a_round").run(1)
        return store.rounds.of_project(1)[0]

    run.store = store
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


def test_nothing_to_do_starts_no_process(world):
    world.store.projects.set_paused(1, True)
    assert world("raise SystemExit('never')").attempts == 0
