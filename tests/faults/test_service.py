"""kill -9 of the service: it is back within seconds, and what it had taken is kept."""

import json
import threading
import time
import urllib.request

import psutil
import pytest

from ppal_backend.launcher import GUNICORN, Group
from ppal_backend.settings import load_settings
from ppal_backend.store import open_store
from tests.faults.conftest import POOL, kill
from tests.faults.test_kill import STEPS
from tests.place import CONFIG
from tests.servers import free_port, wait_for
from tests.service.conftest import annotation_payload

pytestmark = pytest.mark.faults


@pytest.fixture
def service(tmp_path):
    """The service under its launcher: ``(url, group, store)``, project 7 connected."""
    port, data = free_port(), tmp_path / "data"
    store = open_store(load_settings(MODEL_DIR=data))
    store.projects.connect(7, "7.1", CONFIG, "http://127.0.0.1:1", {})
    variables = {"MODEL_DIR": str(data), "PPAL_PORT": str(port), "PPAL_HOST": "127.0.0.1"}
    group, stop = Group({"service": GUNICORN}, variables), threading.Event()
    thread = threading.Thread(target=group.run, args=(stop,))
    thread.start()
    yield f"http://127.0.0.1:{port}", group, store
    stop.set()
    thread.join(60)
    store.close()


def deliver(url, annotation_id):
    """Send a webhook; whether it was taken."""
    data = json.dumps(annotation_payload(annotation_id, 5)).encode()
    request = urllib.request.Request(f"{url}/webhook", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=5) as response:
        return response.status < 300


@pytest.mark.parametrize("which", ["master", "serving process"])
def test_a_killed_service_is_back_and_has_what_it_took(service, which, recovered):
    url, group, store = service
    wait_for(lambda: deliver(url, 1), "the service answers")
    master = psutil.Process(group.processes["service"].pid)
    target = master if which == "master" else master.children()[0]
    moment = kill(target.pid)
    if which == "master":  # its child may answer for another moment before it notices
        wait_for(lambda: group.processes["service"].pid != master.pid, "the launcher starts it again")
        wait_for(lambda: _is_served_by(group.processes["service"].pid), "the new one has a serving process")
    wait_for(lambda: deliver(url, 2), "the service answers again")
    recovered(time.monotonic() - moment)
    seen = [a["id"] for e in store.events.pending(7) for a in e.body["annotations"]]
    assert seen[0] == 1 and seen[-1] == 2


def test_a_service_killed_in_every_step_of_a_round_disturbs_none(rig, recovered):
    """One round, held in each place in turn; the service is killed there, is back, and takes webhooks again."""
    port = free_port()
    environment = {**rig.environment, "PPAL_PORT": str(port), "PPAL_HOST": "127.0.0.1"}
    group, stop = Group({"service": GUNICORN}, environment), threading.Event()
    thread = threading.Thread(target=group.run, args=(stop,))
    thread.start()
    try:
        rig.project(7)
        for place in STEPS:
            rig.hold(7, place)
        rig.start_worker()
        round_id, slowest = rig.ask(7), 0.0
        for number, place in enumerate(STEPS, start=1):
            rig.wait_at(7, place)
            rig.wait(lambda n=number: deliver(f"http://127.0.0.1:{port}", n), "the service takes a webhook")
            old = group.processes["service"].pid
            moment = kill(old)
            rig.wait(lambda pid=old: group.processes["service"].pid != pid, "the launcher starts it again")
            rig.wait(lambda: _is_served_by(group.processes["service"].pid), "the new one has a serving process")
            rig.wait(lambda n=number: deliver(f"http://127.0.0.1:{port}", 100 + n), "it takes webhooks again")
            slowest = max(slowest, time.monotonic() - moment)
            rig.let_go(7, place)
        record = rig.wait_done(round_id)
        recovered(slowest)
        assert (record.attempts, record.crashes) == (1, 0) and sorted(rig.label_studio.projects[7].served()) == [*POOL]
        rig.wait(lambda: set(rig.store.events.counts()) == {"done"}, "every event is handled")
        seen = {a["id"] for e in events_of(rig.store, 7) for a in e["annotations"]}
        assert seen == {*range(1, len(STEPS) + 1), *range(101, len(STEPS) + 101)}
    finally:
        stop.set()
        thread.join(60)


def events_of(store, project_id):
    from ppal_backend.store.tables import EventRow

    with store.database.reading() as session:
        return [row.body for row in session.query(EventRow).filter_by(project_id=project_id)]


def _is_served_by(pid):
    return bool(psutil.Process(pid).children())
