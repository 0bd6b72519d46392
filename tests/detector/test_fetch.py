"""Downloads from a server on this machine that can go on in the middle, refuse to, or hang up."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ppal_backend.detector.weights.fetch import weights_file, weights_target
from ppal_backend.detector.zoo import Schedule, Weights, ZooEntry
from ppal_backend.errors import WeightsUnavailable
from ppal_backend.structures.progress import Progress

CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    ranges = True
    hang_up_after: int | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.refused_once = threading.Event()
        self.refused_once.set()
        self.may_refuse, self.may_answer = threading.Event(), threading.Event()
        self.may_refuse.set()
        self.may_answer.set()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        if not self.server.refused_once.is_set():
            self.server.refused_once.set()
            assert self.server.may_refuse.wait(10)
            self.send_error(503)
            return
        assert self.server.may_answer.wait(10)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if start > len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.server.hang_up_after is None else body[: self.server.hang_up_after])

    def log_message(self, *args: object) -> None:
        """Silence."""


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def entry(server: Server, digest: str = DIGEST[:8]) -> ZooEntry:
    url = f"http://127.0.0.1:{server.server_address[1]}/net.pth"
    weights = Weights("detector", None, url, digest, "MIT")
    return ZooEntry("toy", "t", "p", Path("c.py"), "anchor", (64, 64), weights, Schedule(1, 1, 1, 1, 0.1))


def test_a_cut_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.hang_up_after = 3000
    with pytest.raises(WeightsUnavailable, match="3000 of 10240 bytes") as caught:
        weights_file(entry(server), tmp_path)
    assert str(tmp_path / "net.pth") in str(caught.value) and "http://127.0.0.1" in str(caught.value)
    assert (tmp_path / "net.pth.part").stat().st_size == 3000 and not (tmp_path / "net.pth").exists()
    server.hang_up_after = None
    seen: list[Progress] = []
    assert weights_file(entry(server), tmp_path, seen.append).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=3000-"]
    assert (seen[-1].done, seen[-1].total) == (10240, 10240)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


def test_a_server_that_cannot_go_on_is_asked_for_everything(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "net.pth.part").write_bytes(b"x" * 100)
    assert weights_file(entry(server), tmp_path).read_bytes() == CONTENT


def test_what_is_longer_than_the_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "net.pth.part").write_bytes(b"x" * 20000)
    assert weights_file(entry(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=20000-", None]


def test_a_wrong_beginning_is_noticed_and_not_kept(server: Server, tmp_path: Path) -> None:
    (tmp_path / "net.pth.part").write_bytes(b"x" * 100)
    with pytest.raises(WeightsUnavailable, match="sha256"):
        weights_file(entry(server), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert weights_file(entry(server), tmp_path).read_bytes() == CONTENT


def test_several_at_once_download_once(server: Server, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(weights_file(entry(server), tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in found] == [CONTENT] * 4
    assert server.asked == [None]


def test_one_that_fails_leaves_the_file_of_the_next_alone(server: Server, tmp_path: Path) -> None:
    for event in (server.refused_once, server.may_refuse, server.may_answer):
        event.clear()
    said: dict[str, object] = {}

    def ask(name: str) -> None:
        try:
            said[name] = weights_file(entry(server), tmp_path).read_bytes()
        except WeightsUnavailable as error:
            said[name] = str(error)

    first, second = (threading.Thread(target=ask, args=(name,)) for name in ("first", "second"))
    first.start()
    assert server.refused_once.wait(10)
    second.start()
    time.sleep(0.2)  # it waits for the unfinished file of the first
    server.may_refuse.set()
    first.join(10)  # and here the second one has begun, with nothing received yet
    server.may_answer.set()
    second.join(10)
    assert "503" in str(said["first"])
    assert said["second"] == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


def test_an_address_that_answers_nothing_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    server.refused_once.clear()
    with pytest.raises(WeightsUnavailable, match="503"):
        weights_file(entry(server), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_a_file_lies(server: Server, tmp_path: Path) -> None:
    assert weights_target(entry(server), tmp_path) == tmp_path / "net.pth"
