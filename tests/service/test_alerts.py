"""The example alerts name metrics that there are."""

import re
from pathlib import Path

import yaml

from ppal_backend.service.app import create_app
from ppal_backend.store import Heartbeat
from ppal_backend.worker.queue import JobQueue
from tests.service.conftest import activate, annotation_payload

RULES = yaml.safe_load((Path(__file__).parents[2] / "docs" / "alerts.example.yml").read_text())["groups"][0]["rules"]


def test_every_metric_of_every_alert_exists(settings, connected, store):
    activate(store)
    Heartbeat(store.workers).beat()
    client = create_app(settings, store=store, jobs=JobQueue(settings.jobs_file)).test_client()
    client.post("/webhook", json=annotation_payload())
    text = client.get("/metrics").text
    known = set(re.findall(r"^# TYPE (ppal_\w+)", text, re.MULTILINE)) | {
        line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")
    }
    for rule in RULES:
        names = set(re.findall(r"\bppal_\w+", rule["expr"])) - {"ppal"}
        assert names <= known, (rule["alert"], names - known)


def test_every_alert_says_what_to_do():
    assert len({rule["alert"] for rule in RULES}) == len(RULES) >= 10
    for rule in RULES:
        assert rule["annotations"]["summary"] and rule["annotations"]["action"] and rule["labels"]["severity"]
