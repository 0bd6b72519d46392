"""A proxy that misbehaves on demand: between the backend and Label Studio, and before the backend's own service."""

from __future__ import annotations

import http.client
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
SHARE = 0.7
MODES = ("pass", "error", "slow", "lose request", "lose answer", "refuse", "twice")
UPSTREAM_TIMEOUT_S = 600.0


class Proxy:
    """Forwards to a port of this machine; ``mode`` says what becomes of requests.

    ``error`` 500 to 70 % of them, ``slow`` 1 to 4 s more, ``lose request`` 70 % never arrive, ``lose answer`` 70 %
    arrive but nobody hears of it, ``refuse`` 401 to all, ``twice`` each is delivered twice. ``touched`` counts the
    requests that suffered.
    """

    def __init__(self, target_port: int, seed: int) -> None:
        self.target_port, self.mode, self.touched = target_port, "pass", 0
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list, bytes] | None:
        """What the caller gets; None cuts the connection."""
        mode = self.mode
        with self._lock:
            hit, delay_s = self._random.random() < SHARE, self._random.uniform(1, 4)
            hit = hit if mode in ("error", "lose request", "lose answer") else mode != "pass"
            self.touched += hit
        if hit and mode == "slow":
            time.sleep(delay_s)
        if hit and mode == "error":
            return 500, [("Content-Type", "text/html")], b"<html>Server Error (500)</html>"
        if hit and mode == "refuse":
            return 401, [("Content-Type", "application/json")], b'{"detail": "Invalid token."}'
        if hit and mode == "lose request":
            return None
        found = self._forward(method, path, headers, body)
        if hit and mode == "twice":
            found = self._forward(method, path, headers, body)
        return None if hit and mode == "lose answer" else found

    def _forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list, bytes] | None:
        connection = http.client.HTTPConnection("127.0.0.1", self.target_port, timeout=UPSTREAM_TIMEOUT_S)
        try:
            connection.request(method, path, body or None, headers)
            response = connection.getresponse()
            kept = [(k, v) for k, v in response.getheaders() if k.lower() not in HOP_BY_HOP]
            return response.status, kept, response.read()
        except (OSError, http.client.HTTPException):
            return None  # as if nothing listened there
        finally:
            connection.close()


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
            answer = proxy.answer(self.command, self.path, headers, body)
            if answer is None:
                self.close_connection = True
                return
            status, kept, content = answer
            self.send_response_only(status)
            for name, value in kept:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _do

        def handle(self) -> None:
            try:
                super().handle()
            except (ConnectionError, TimeoutError):
                self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
