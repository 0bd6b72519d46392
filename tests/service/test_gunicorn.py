"""The app as it is run: gunicorn with its own configuration, a real database and a real job queue."""

import json
import socket
import time

import psutil

from benchmarks.service import _setup, annotation_payload, call, run, service
from ppal_backend.settings import load_settings
from ppal_backend.store import open_store
from ppal_backend.worker.queue import JobQueue


def test_a_short_measurement_loses_nothing():
    report = run(seconds=1.0, rate_per_s=20.0)
    assert (report.webhook_ms.count, report.failed, report.lost) == (20, 0, 0)
    assert report.memory_mib < 400  # gunicorn's two processes; with a detector they would need far more


def test_events_and_their_job_outlive_the_process(tmp_path):
    with service(tmp_path) as (port, process):
        assert call(port, "POST", "/setup", _setup()) == 200
        assert call(port, "POST", "/webhook", annotation_payload(31)) == 201
        children = psutil.Process(process.pid).children(recursive=True)
        start = time.monotonic()
    assert time.monotonic() - start < 10
    assert not any(child.is_running() for child in children)
    assert process.returncode == 0
    settings = load_settings(MODEL_DIR=tmp_path)
    store = open_store(settings)
    assert [event.body["annotations"][0]["id"] for event in store.events.pending(7)] == [31]
    store.close()
    assert JobQueue(settings.jobs_file).pending() >= 1


def test_a_request_under_way_is_answered_after_sigterm(tmp_path, capfd):
    with service(tmp_path, LOG_LEVEL="INFO") as (port, process):
        assert call(port, "POST", "/setup", _setup()) == 200
        body = json.dumps(annotation_payload(31)).encode()
        head = (
            f"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Expect: 100-continue\r\nConnection: close\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", port), timeout=20) as caller:
            caller.sendall(head.encode())
            assert caller.recv(1000).startswith(b"HTTP/1.1 100")  # its handling has begun
            process.terminate()
            wait_for_log(capfd, "Handling signal: term")
            caller.sendall(body)
            assert b" 201 " in caller.makefile("rb").readline()
        assert process.wait(20) == 0
    store = open_store(load_settings(MODEL_DIR=tmp_path))
    assert len(store.events.pending(7)) == 1
    store.close()


def wait_for_log(capfd, words):
    seen, end = "", time.monotonic() + 30
    while words not in seen:
        assert time.monotonic() < end, seen
        seen += capfd.readouterr().err
        time.sleep(0.01)


def test_logs_are_json_when_asked_for_and_hold_gunicorns_too(tmp_path, capfd):
    with service(tmp_path, LOG_FORMAT="json", LOG_LEVEL="INFO") as (port, _):
        assert call(port, "POST", "/setup", _setup()) == 200
    records = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert any(r["logger"] == "gunicorn.error" and "Listening at" in r["message"] for r in records)
    (connected,) = [r for r in records if "connected" in r["message"]]
    assert (connected["project"], connected["level"]) == (7, "INFO")


def test_a_wrong_setting_ends_it_with_its_name(tmp_path, capfd):
    import pytest

    with pytest.raises(RuntimeError, match="did not start"), service(tmp_path, BASIC_AUTH_USER="only-user"):
        pass
    assert "BASIC_AUTH_PASS" in capfd.readouterr().err
