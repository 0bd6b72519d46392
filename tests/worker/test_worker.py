"""A worker's own start and end."""

import os
import signal
import sys

import pytest

from ppal_backend.store import open_store
from ppal_backend.worker import worker


@pytest.fixture(autouse=True)
def handlers():
    """As ``ppal_backend.__main__`` sets them; this process's own come back afterwards."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def test_a_signal_while_the_state_is_opened_ends_the_worker_when_it_has_started(settings, monkeypatch, caplog):
    """An exit in the middle of what a library does to its connections is logged there as an error."""

    def opened(settings):
        os.kill(os.getpid(), signal.SIGTERM)
        return open_store(settings)

    monkeypatch.setattr(worker, "open_store", opened)
    with caplog.at_level("INFO", "ppal_backend"):
        worker.run_worker(settings)
    assert caplog.messages[-1] == "worker stopped"
