"""Whatever a round logs says which project and round it is about."""

import json
import logging

import pytest

from ppal_backend.logs import configure_logging
from ppal_backend.worker.round_process import run_next_round
from tests.worker.test_round_process import World, settings, store  # noqa: F401


@pytest.fixture(autouse=True)
def as_it_was():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_records_of_a_round_carry_its_ids(settings, store, capfd):  # noqa: F811
    class Talking(World):
        def train(self, *arguments):
            logging.getLogger("mmengine").warning("deep within")
            return super().train(*arguments)

    store.rounds.request(1, "train", "x")
    configure_logging("INFO", "json")
    assert run_next_round(settings, 1, Talking().ports)
    records = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (deep,) = [r for r in records if r["message"] == "deep within"]
    assert (deep["project"], deep["round"], deep["level"]) == (1, 1, "WARNING")
