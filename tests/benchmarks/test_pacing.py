"""The load generator keeps its own time: waiting for a free caller counts, and every answer has its number."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.pacing import Caller, Latency, closed_loop, latency, open_loop
from tests.servers import free_port


def test_a_slow_answer_delays_those_behind_it_and_that_counts():
    """One caller, 20 ms an answer, due every 5 ms: the last of 10 comes 155 ms after it was due."""

    def send(caller, number):
        time.sleep(0.02)
        return 200 + number

    answers = open_loop(10, 200.0, 1, send)
    assert [status for status, _ in answers] == list(range(200, 210))
    waits = [seconds for _, seconds in answers]
    assert waits[0] >= 0.02 and waits[-1] >= 10 * 0.02 - 9 * 0.005 - 0.001
    assert waits == sorted(waits)


def test_requests_are_not_sent_before_they_are_due():
    sent = []
    started = time.perf_counter()
    open_loop(5, 20.0, 3, lambda caller, number: sent.append((number, time.perf_counter() - started)) or 201)
    assert sorted(number for number, _ in sent) == [0, 1, 2, 3, 4]
    assert all(at >= number / 20.0 for number, at in sent)


def test_callers_of_a_closed_loop_take_turns_with_nobody():
    together = threading.Barrier(3)
    answers, seconds = closed_loop(3, 2, lambda caller, number: together.wait(10) * 0 + 200)
    assert [status for status, _ in answers] == [200] * 6 and seconds >= max(s for _, s in answers)


def test_percentiles_are_of_the_slowest():
    calls = [(200, n / 1000) for n in range(1, 201)]
    assert latency(calls) == Latency(200, 101.0, 199.0, 200.0)
    assert latency([]) == Latency(0, 0.0, 0.0, 0.0)


@pytest.fixture
def server():
    """Counts connections and bodies; closes each connection after two requests without saying so."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        connections, bodies, served = [], [], 0

        def setup(self):
            super().setup()
            self.served = 0
            self.connections.append(self.client_address)

        def do_POST(self):
            self.bodies.append((self.rfile.read(int(self.headers["content-length"])), self.headers["Authorization"]))
            self.served += 1
            self.send_response_only(201)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
            self.close_connection = self.served == 2

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made.server_address[1], Handler
    made.shutdown()
    made.server_close()


def test_a_connection_is_kept_and_opened_again_when_the_server_closed_it(server):
    port, handler = server
    caller = Caller(port, {"Authorization": "Bearer x"})
    assert [caller.post("/webhook", b"%d" % n) for n in range(5)] == [201] * 5
    caller.close()
    assert handler.bodies == [(b"%d" % n, "Bearer x") for n in range(5)]
    assert len(handler.connections) == 3


def test_no_answer_is_no_success():
    caller = Caller(free_port(), {})
    assert caller.post("/webhook", b"{}") == 0
    caller.close()
