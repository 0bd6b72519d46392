"""The Label Studio of ``tests/label_studio/fake.py`` on a real port, one project under each path prefix."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from tests.label_studio.fake import FakeLabelStudio


class HttpLabelStudio:
    """``url(project_id)`` is the address of a project's own Label Studio; ``projects[id]`` is what it holds.

    ``fault(project_id, request)`` may answer in place of it (``None``: let it answer itself).
    """

    def __init__(self) -> None:
        self.projects: dict[int, FakeLabelStudio] = {}
        self.fault: Callable[[int, httpx.Request], httpx.Response | None] = lambda project_id, request: None
        self.lock = threading.RLock()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.start()

    def start(self) -> None:
        """(Again) on the same port."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), _handler(self))
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Nothing listens any more: connections are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def add(self, project_id: int, label_config: str, task_ids: range) -> FakeLabelStudio:
        fake = FakeLabelStudio(tasks=0)
        fake.project["label_config"] = label_config
        for task_id in task_ids:
            fake.add_task(task_id)
        self.projects[project_id] = fake
        return fake

    def url(self, project_id: int) -> str:
        return f"http://127.0.0.1:{self._port}/p{project_id}"

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> httpx.Response:
        found = re.match(r"/p(\d+)(/.*)", path)
        assert found, f"no such project: {path}"
        project_id = int(found[1])
        inner = found[2].replace(f"/projects/{project_id}/", "/projects/1/")
        request = httpx.Request(method, f"http://ls.test{inner}", headers=headers, content=body)
        fault = self.fault(project_id, request)  # outside the lock: it may take its time
        if fault is not None:
            return fault
        with self.lock:
            return self.projects[project_id](request)


def _handler(owner: HttpLabelStudio) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {k.lower(): v for k, v in self.headers.items()}
            response = owner.answer(self.command, self.path, headers, body)
            self.send_response(response.status_code)
            self.send_header("Content-Type", response.headers.get("content-type", "application/json"))
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            self.wfile.write(response.content)

        do_GET = do_POST = do_PATCH = do_DELETE = _do

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
