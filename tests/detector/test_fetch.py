"""Downloads from a server on this machine that can go on in the middle, refuse to, or hang up."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ppal_backend.detector.zoo import Schedule, Weights, ZooEntry
from ppal_backend.detector.zoo.fetch import place_weights, weights_file, weights_target
from ppal_backend.errors import WeightsUnavailable
from ppal_backend.structures.round import Progress

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


def of_a_file(digest: str = DIGEST) -> ZooEntry:
    """An entry whose weights have a name and a digest, but no address."""
    weights = Weights("detector", None, None, digest, "MIT", "a drawer", file="net.pth")
    return ZooEntry("toy", "t", "p", Path("c.py"), "anchor", (64, 64), weights, Schedule(1, 1, 1, 1, 0.1))


@pytest.fixture
def given(tmp_path: Path) -> Path:
    file = tmp_path / "given" / "any name.bin"
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    return file


def test_a_file_is_put_in_place_and_used(given: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "weights"
    assert place_weights(of_a_file(), given, folder) == folder / "net.pth"
    assert weights_file(of_a_file(), folder).read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["net.pth"]
    assert given.read_bytes() == CONTENT
    again = place_weights(of_a_file(), folder / "net.pth", folder)  # the very file that lies there
    assert again.read_bytes() == CONTENT


def test_a_file_takes_the_place_of_a_download(server: Server, given: Path, tmp_path: Path) -> None:
    (tmp_path / "net.pth.part").write_bytes(b"x" * 100)
    place_weights(entry(server), given, tmp_path)
    assert weights_file(entry(server), tmp_path).read_bytes() == CONTENT and server.asked == []


def test_a_file_restores_shipped_weights(given: Path, tmp_path: Path) -> None:
    weights = Weights("detector", tmp_path / "zoo" / "initial.pth", None, DIGEST, "MIT", "a script")
    shipped = ZooEntry("toy", "t", "p", Path("c.py"), "anchor", (64, 64), weights, Schedule(1, 1, 1, 1, 0.1))
    with pytest.raises(WeightsUnavailable, match="ppal zoo fetch toy --from FILE"):
        weights_file(shipped)
    place_weights(shipped, given)
    assert weights_file(shipped).read_bytes() == CONTENT


def test_a_file_of_another_digest_is_refused_and_nothing_lost(given: Path, tmp_path: Path) -> None:
    place_weights(of_a_file(), given, tmp_path / "weights")
    wrong = tmp_path / "wrong.pth"
    wrong.write_bytes(b"something else")
    with pytest.raises(WeightsUnavailable) as caught:
        place_weights(of_a_file(), wrong, tmp_path / "weights")
    told = str(caught.value)
    assert DIGEST in told and hashlib.sha256(b"something else").hexdigest() in told
    assert str(wrong) in told and "nothing was changed, give the file" in told and "net.pth, a drawer" in told
    assert wrong.read_bytes() == b"something else"
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["net.pth"]
    assert weights_file(of_a_file(), tmp_path / "weights").read_bytes() == CONTENT


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for source in (tmp_path / "none.pth", tmp_path):  # a folder is no file either
        with pytest.raises(WeightsUnavailable, match=re.escape(f"from {source} to ")):
            place_weights(of_a_file(), source, tmp_path / "weights")
    assert not list(tmp_path.rglob("*.pth"))


def test_a_folder_that_cannot_be_written_is_named(given: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"a file")
    with pytest.raises(WeightsUnavailable, match="a folder that can be written") as caught:
        place_weights(of_a_file(), given, tmp_path / "taken")
    assert str(tmp_path / "taken" / "net.pth") in str(caught.value)
    assert (tmp_path / "taken").read_bytes() == b"a file"


def test_an_entry_without_weights_takes_no_file(given: Path, tmp_path: Path) -> None:
    bare = ZooEntry("toy", "t", "p", Path("c.py"), "anchor", (64, 64), None, Schedule(1, 1, 1, 1, 0.1))
    with pytest.raises(WeightsUnavailable, match="no initial weights in the zoo"):
        place_weights(bare, given, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_missing_weights_without_an_address_name_file_digest_and_command(given: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    with pytest.raises(WeightsUnavailable) as caught:
        weights_file(of_a_file(), folder)
    told = str(caught.value)
    assert str(folder / "net.pth") in told and "net.pth (a drawer; sha256 " + DIGEST in told
    assert f"ppal zoo fetch toy --from FILE --to {folder}" in told and "random" in told
