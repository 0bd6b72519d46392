"""Fetching images from hostile addresses: real sockets, a fake Label Studio and a fake rest of the world."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import httpx
import pytest
from PIL import Image

from ppal_backend.datasets.images import ImageCache
from ppal_backend.errors import ImageError, LabelStudioAuthError, LabelStudioError, LabelStudioUnavailable
from ppal_backend.label_studio.auth import Addresses
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.image_source import HostRules, ImageSource, is_public, safe_url, target_of
from tests.label_studio.fake import LEGACY, FakeLabelStudio

BASE = "http://ls.test:8080"


class Site:
    """A web server on 127.0.0.1 that answers from a table and notes what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[tuple[str, str | None]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append((self.path, self.headers.get("Authorization")))
                status, headers, body = site.answers.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def own() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture
def other() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


def source(own: Site, allowed=None, names=None, **options) -> ImageSource:
    client = LabelStudioClient(own.url, LEGACY, tries=1, sleep=lambda s: None)

    def resolver(host: str, port: int) -> list[str]:
        return (names or {}).get(host, [host])

    return ImageSource(client, allowed, resolver=resolver, sleep=lambda s: None, tries=2, **options)


def read(images: ImageSource, url: str, task_id: int = 7) -> bytes:
    with images(task_id, url) as chunks:
        return b"".join(chunks)


def test_upload_is_fetched_with_the_token_and_any_name(own):
    own.answers["/data/upload/1/%E5%9B%BE%20a.jpg"] = (200, {}, b"bytes")
    assert read(source(own), "/data/upload/1/图 a.jpg") == b"bytes"
    assert own.asked == [("/data/upload/1/%E5%9B%BE%20a.jpg", f"Token {LEGACY}")]


def test_local_files_keep_their_query(own):
    own.answers["/data/local-files/?d=a/b.jpg"] = (200, {}, b"x")
    assert read(source(own), "/data/local-files/?d=a/b.jpg") == b"x"


@pytest.mark.parametrize("prefix", ["", BASE])
def test_local_files_of_a_label_studio_on_windows(prefix):
    target = target_of(1, prefix + "/data/local-files/?d=photos\\a.jpg", Addresses(BASE))
    assert (target.url, target.signed) == (BASE + "/data/local-files/?d=photos%5Ca.jpg", True)


@pytest.mark.parametrize("url", ["s3://bucket/k ü.jpg", "gs://b/k.jpg", "azure-blob://c/k.jpg"])
def test_cloud_images_go_through_the_task_and_the_token_stays_behind(own, other, url):
    coded = base64.urlsafe_b64encode(url.encode()).decode()
    path = f"/tasks/7/resolve/?fileuri={coded}".replace("=", "%3D").replace("fileuri%3D", "fileuri=")
    signed = f"http://store.test:{other.port}/k?signature=secret"
    for form in (path, f"/tasks/7/resolve/?fileuri={coded}"):
        own.answers[form] = (303, {"Location": signed}, b"")
    other.answers["/k?signature=secret"] = (200, {}, b"cloud")
    images = source(own, allowed=["store.test"], names={"store.test": ["127.0.0.1"]})
    assert read(images, url) == b"cloud"
    assert own.asked[0][1] == f"Token {LEGACY}"
    assert other.asked == [("/k?signature=secret", None)]


def test_absolute_address_of_label_studio_is_its_own(own):
    own.answers["/data/upload/1/a.jpg"] = (200, {}, b"x")
    assert read(source(own), own.url + "/data/upload/1/a.jpg") == b"x"
    assert own.asked[0][1] == f"Token {LEGACY}"


def test_token_is_kept_from_paths_that_are_no_files(own):
    own.answers["/api/projects/1/export"] = (200, {}, b"x")
    read(source(own), "/api/projects/1/export")
    assert own.asked == [("/api/projects/1/export", None)]


def test_redirect_to_another_host_drops_the_token_and_does_not_get_it_back(own, other):
    own.answers["/data/upload/1/a.jpg"] = (302, {"Location": f"http://cdn.test:{other.port}/b"}, b"")
    other.answers["/b"] = (302, {"Location": own.url + "/data/upload/1/c.jpg"}, b"")
    own.answers["/data/upload/1/c.jpg"] = (200, {}, b"x")
    images = source(own, allowed=["cdn.test"], names={"cdn.test": ["127.0.0.1"]})
    with pytest.raises(ImageError, match="allowed host"):
        read(images, "/data/upload/1/a.jpg")
    assert other.asked == [("/b", None)]
    images = source(own, allowed=["cdn.test", "127.0.0.1"], names={"cdn.test": ["127.0.0.1"]})
    assert read(images, "/data/upload/1/a.jpg") == b"x"
    assert own.asked[-1] == ("/data/upload/1/c.jpg", None)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "FILE:/etc/passwd", "ftp://h/x.jpg", "data:image/png;base64,aaaa", "javascript:a"]
)
def test_other_schemes_are_refused(own, url):
    with pytest.raises(ImageError, match="expected"):
        read(source(own), url)
    assert own.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "/data/upload/../../api/projects/1/export",
        "/data/upload/%2e%2e/%2e%2e/api/x",
        "/data/%252e%252e/api/x",
        "images/a.jpg",
        "http://user:pw@ls.test/x.jpg",
        "http://evil\\@ls.test/x.jpg",
        "/data/a\r\nHost: evil",
        "http:///x",
        "http://[::1",
    ],
)
def test_crooked_addresses_are_refused(own, url):
    with pytest.raises(ImageError, match="expected"):
        read(source(own), url)
    assert own.asked == []


def test_credentials_in_an_address_are_refused_even_for_label_studio(own):
    own.answers["/data/a"] = (200, {}, b"x")
    with pytest.raises(ImageError, match="without user name") as caught:
        read(source(own), own.url.replace("http://", "http://user:secret@") + "/data/a")
    assert own.asked == []
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "169.254.169.254", "10.0.0.5", "[::1]", "0.0.0.0"])
def test_private_networks_are_refused_without_a_connection(own, other, host):
    images = source(own, names={"localhost": ["127.0.0.1", "::1"]})
    with pytest.raises(ImageError, match="private network"):
        read(images, f"http://{host}:{other.port}/a")
    assert other.asked == []


def test_name_that_resolves_to_a_private_address_is_refused(own, other):
    with pytest.raises(ImageError, match="private network"):
        read(source(own, names={"cdn.test": ["93.184.216.34", "127.0.0.1"]}), f"http://cdn.test:{other.port}/a")


def test_redirect_to_a_private_address_is_refused(own, other):
    own.answers["/data/upload/1/a.jpg"] = (302, {"Location": f"http://127.0.0.1:{other.port}/admin"}, b"")
    with pytest.raises(ImageError, match="private network"):
        read(source(own), "/data/upload/1/a.jpg")
    assert other.asked == []


def test_redirect_to_a_file_is_refused(own):
    own.answers["/data/upload/1/a.jpg"] = (302, {"Location": "file:///etc/passwd"}, b"")
    with pytest.raises(ImageError, match="scheme 'file'"):
        read(source(own), "/data/upload/1/a.jpg")


def test_another_port_of_label_studios_host_is_another_host(own, other):
    with pytest.raises(ImageError, match="private network"):
        read(source(own), other.url + "/a")


def test_list_of_hosts(own, other):
    other.answers["/a"] = (200, {}, b"x")
    names = {"a.cdn.test": ["127.0.0.1"]}
    for allowed in (["a.cdn.test"], [f"a.cdn.test:{other.port}"], ["*", "a.cdn.test"]):
        assert read(source(own, allowed, names), f"http://a.cdn.test:{other.port}/a") == b"x"
    for allowed in ([], ["cdn.test"], ["a.cdn.test:1"]):
        with pytest.raises(ImageError, match="PPAL_ALLOWED_IMAGE_HOSTS"):
            read(source(own, allowed, names), f"http://a.cdn.test:{other.port}/a")
    assert len(other.asked) == 3


@pytest.mark.parametrize("entry", [".cdn.test", "*"])
def test_a_pattern_allows_names_but_no_private_network(own, other, entry):
    """Whoever may make names below an allowed domain could point one at a machine of ours."""
    rules = HostRules([entry])
    rules.check_name("a.cdn.test", 80)
    rules.check_address("a.cdn.test", 80, "93.184.216.34")
    with pytest.raises(ImageError, match="private network"):
        read(source(own, [entry], {"a.cdn.test": ["127.0.0.1"]}), f"http://a.cdn.test:{other.port}/a")
    assert other.asked == []


def test_endless_redirects_end(own):
    own.answers["/data/a"] = (302, {"Location": "/data/a"}, b"")
    with pytest.raises(ImageError, match="5 redirects"):
        read(source(own), "/data/a")
    assert len(own.asked) == 6


def test_answers_that_are_no_image(own):
    images = source(own)
    with pytest.raises(ImageError, match="no such file"):
        read(images, "/data/gone.jpg")
    own.answers["/data/x"] = (424, {}, b"")
    with pytest.raises(ImageError, match="424"):
        read(images, "/data/x")
    own.answers["/data/x"] = (401, {}, b"")
    with pytest.raises(LabelStudioAuthError, match="Personal Access Token"):
        read(images, "/data/x")
    own.answers["/data/x"] = (503, {}, b"")
    with pytest.raises(LabelStudioUnavailable):
        read(images, "/data/x")


@pytest.mark.parametrize("status", [401, 403, 404, 429, 503])
def test_what_is_answered_without_the_token_is_the_images_fault(own, status):
    """Pictures with a login of their own, served by the same web server: the round waited for another token."""
    own.answers["/pictures/a.jpg"] = (status, {"WWW-Authenticate": 'Basic realm="pictures"'}, b"")
    with pytest.raises(ImageError, match=f"http.*/pictures/a.jpg, got status {status}; ") as caught:
        read(source(own), own.url + "/pictures/a.jpg")
    assert ("an address that needs no login" in str(caught.value)) == (status == 401)
    assert "token" not in str(caught.value)
    assert {sent for _, sent in own.asked} == {None}


@pytest.mark.parametrize("answer", [502, 504, "none"])
def test_an_image_that_a_running_label_studio_never_sends_is_that_images_fault(own, answer):
    """A proxy before it gives up on a slow storage: one such image held up its round for ever."""
    own.answers["/api/version"] = (200, {"Content-Type": "application/json"}, b'{"release": "1.23.2"}')
    own.answers["/data/x"] = (answer, {}, b"")
    if answer == "none":
        own.answers["/data/x"] = (200, {"Content-Length": "many"}, b"")  # no valid answer
    with pytest.raises(ImageError, match=r"http.*/data/x, got (status 50. |no answer .*)2 times.*check the file"):
        read(source(own), "/data/x")
    assert [path for path, _ in own.asked].count("/data/x") == 2


@pytest.mark.parametrize("answer", [429, 503])
def test_an_answer_that_asks_to_wait_is_not_the_images_fault(own, answer):
    """A proxy that limits requests; Label Studio itself is up."""
    own.answers["/api/version"] = (200, {"Content-Type": "application/json"}, b'{"release": "1.23.2"}')
    own.answers["/data/x"] = (answer, {}, b"")
    with pytest.raises(LabelStudioUnavailable, match=f"answered {answer} for "):
        read(source(own), "/data/x")


def test_local_files_that_label_studio_does_not_serve_are_told_with_its_switch(own):
    """It is off unless set; the text spoke of the file and of a storage connection, which both are in order."""
    own.answers["/data/local-files/?d=a.jpg"] = (403, {}, b"disabled by default")
    with pytest.raises(ImageError, match=r"status 403.*LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true"):
        read(source(own), "/data/local-files/?d=a.jpg")
    own.answers["/data/upload/1/a.jpg"] = (403, {}, b"")
    with pytest.raises(
        ImageError, match=r"status 403; check the file, the storage connection and that the token's user"
    ):
        read(source(own), "/data/upload/1/a.jpg")


def test_label_studio_down_is_not_the_images_fault():
    client = LabelStudioClient("http://127.0.0.1:9", LEGACY, tries=1)
    with pytest.raises(LabelStudioUnavailable):
        read(ImageSource(client, sleep=lambda s: None), "/data/a.jpg")


def test_a_host_that_is_down_costs_only_its_image(own):
    with pytest.raises(ImageError, match="no answer"):
        read(source(own, ["127.0.0.1:9"]), "http://127.0.0.1:9/a?signature=secret")
    with pytest.raises(ImageError) as caught:
        read(source(own, ["127.0.0.1:9"]), "http://127.0.0.1:9/a?signature=secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("whose", ["own", "other"])
def test_cut_off_transfer_is_noticed(own, other, whose):
    site = own if whose == "own" else other
    site.answers["/data/a"] = (200, {"Content-Length": "100", "Connection": "close"}, b"short")
    kind = LabelStudioUnavailable if whose == "own" else ImageError
    with pytest.raises(kind):
        read(source(own, ["127.0.0.1"]), site.url + "/data/a")


def test_a_transfer_that_a_running_label_studio_cuts_off_is_that_images_fault(own, tmp_path):
    """It ends a proxied transfer after RESOLVER_PROXY_TIMEOUT: one slow image held up all rounds of its project."""
    own.answers["/api/version"] = (200, {"Content-Type": "application/json"}, b'{"release": "1.23.2"}')
    own.answers["/data/a"] = (200, {"Content-Length": "100", "Connection": "close"}, b"short")
    images = ImageCache(tmp_path, source(own))
    with pytest.raises(ImageError, match=r"^task 7: expected the whole of http.*/data/a, got a part.*PROXY_TIMEOUT"):
        images.get(7, "/data/a")
    assert [path for path, _ in own.asked].count("/data/a") == 2, "it is tried once more"


@pytest.mark.parametrize("whose", ["own", "other"])
def test_a_transfer_that_is_cut_off_once_costs_nothing(own, other, whose, tmp_path):
    site, whole = own if whose == "own" else other, BytesIO()
    Image.new("RGB", (30, 20)).save(whole, "PNG")
    own.answers["/api/version"] = (200, {"Content-Type": "application/json"}, b'{"release": "1.23.2"}')
    site.answers["/data/a"] = (200, {"Content-Length": "100", "Connection": "close"}, b"short")
    images = source(own, ["127.0.0.1"])
    opened = images.open

    def open_and_mend(task_id, url):
        found = opened(task_id, url)
        if site.asked:
            site.answers["/data/a"] = (200, {}, whole.getvalue())
        return found

    images.open = open_and_mend
    assert ImageCache(tmp_path, images).get(7, site.url + "/data/a").width == 30


def test_a_host_that_does_not_answer_is_not_asked_for_every_image(own):
    """Each try waits for minutes: a pool of 10,000 images behind a firewall took more than a day to say so."""
    asked, now = [], [1000.0]

    def resolver(host, port):
        asked.append(host)
        if host == "nowhere.test":
            raise OSError("temporary failure in name resolution")
        return ["127.0.0.1"]

    client = LabelStudioClient(own.url, LEGACY, tries=1, sleep=lambda s: None)
    allowed = ["silent.test:9", "nowhere.test"]
    images = ImageSource(client, allowed, resolver=resolver, sleep=lambda s: None, tries=1, clock=lambda: now[0])
    for host in ("silent.test:9", "nowhere.test"):
        asked.clear()
        for _ in range(20):
            with pytest.raises(ImageError) as caught:
                read(images, f"http://{host}/a?signature=secret")
        assert len(asked) == 3, host
        assert re.search(f"expected an image from '{host}', got no answer 3 times in a row", str(caught.value))
        now[0] += 61
        with pytest.raises(ImageError):
            read(images, f"http://{host}/a")
        assert len(asked) == 4, "after a while it is asked again"


def test_a_host_that_answers_now_and_then_is_always_asked(own, other):
    other.answers["/a"] = (200, {}, b"x")
    is_known = [True]

    def resolver(host, port):
        if not is_known[0]:
            raise OSError("temporary failure in name resolution")
        return ["127.0.0.1"]

    client = LabelStudioClient(own.url, LEGACY, tries=1, sleep=lambda s: None)
    images = ImageSource(client, ["store.test"], resolver=resolver, sleep=lambda s: None, tries=1)
    for _ in range(3):
        is_known[0] = False
        images._pool.close()  # the next request connects anew
        for _ in range(2):
            with pytest.raises(ImageError, match="host that exists"):
                read(images, f"http://store.test:{other.port}/a")
        is_known[0] = True
        assert read(images, f"http://store.test:{other.port}/a") == b"x"


def test_time_limit_for_one_image(own):
    own.answers["/data/a"] = (200, {}, b"x" * 10)
    with pytest.raises(ImageError, match="in time"):
        read(source(own, total_s=-1.0), "/data/a")


@pytest.mark.parametrize(
    ("base", "url", "wanted"),
    [
        ("http://h/ls", "/data/upload/a.jpg", "http://h/ls/data/upload/a.jpg"),
        ("http://h/ls", "/ls/data/upload/a.jpg", "http://h/ls/data/upload/a.jpg"),
        ("http://h", "  /data/a.jpg\t", "http://h/data/a.jpg"),
        ("http://h", "https://h/data/a.jpg", "https://h/data/a.jpg"),
    ],
)
def test_where_an_image_lies(base, url, wanted):
    target = target_of(1, url, Addresses(base))
    assert (target.url, target.signed) == (wanted, True)


HERE, PEOPLE = "http://ls:8080", "https://people.test/label-studio"
FILE = "/data/local-files/?d=a/b.jpg"


@pytest.mark.parametrize(
    ("base", "public", "url", "wanted"),
    [
        ("http://127.0.0.1:8080", "http://localhost:8080", "http://localhost:8080" + FILE, FILE),
        (HERE, PEOPLE, "/label-studio/data/upload/1/a.jpg", "/data/upload/1/a.jpg"),
        (HERE, PEOPLE, PEOPLE + "/data/upload/a%20b.jpg", "/data/upload/a%20b.jpg"),
        (HERE, PEOPLE, "/data/upload/1/a.jpg", "/data/upload/1/a.jpg"),
    ],
)
def test_other_names_of_one_label_studio_are_asked_for_at_our_own_address(base, public, url, wanted):
    """Two addresses of one Label Studio: its tasks were refused as a foreign host's, or answered 401 or 404."""
    target = target_of(1, url, Addresses(base, (public,)))
    assert (target.url, target.signed, target.own) == (base + wanted, True, True)


@pytest.mark.parametrize("own", [Addresses(HERE, (PEOPLE,)), Addresses(PEOPLE), Addresses(PEOPLE + "/")])
@pytest.mark.parametrize(
    "url",
    [
        "https://people.test/other/data/upload/a.jpg",
        "https://people.test/data/a.jpg",
        "https://people.test/projects/wiki/a.jpg",
        "https://people.test/label-studio-2/data/a.jpg",
        "https://people.test/label-studio%2Fdata/a.jpg",
        "https://people.test/label-studio%2F@evil.test/data/a.jpg",
        "https://people.test:444/label-studio/data/a.jpg",
        "http://evil.test/data/a.jpg",
    ],
)
def test_what_is_beside_label_studio_is_another_host(own, url):
    """Another application on its web server was sent the token; "%2F@" sent requests past the rules for hosts."""
    target = target_of(1, url, own)
    assert (target.url, target.signed, target.own) == (url, False, False)


def test_a_path_upwards_out_of_label_studio_is_not_its_own():
    target = target_of(1, PEOPLE + "/../data/a.jpg", Addresses(PEOPLE))
    assert (target.url, target.signed, target.own) == ("https://people.test/data/a.jpg", False, False)


def test_who_names_himself_label_studio_gets_no_request_and_no_token():
    """`/setup` may be called by anybody: a false name sends requests to Label Studio, and none to the name."""
    fake = FakeLabelStudio()
    client = fake.client(other_urls=("http://evil.test",))
    seen = []
    fake.fault = lambda request: seen.append(request) or httpx.Response(200, content=b"image")
    with ImageSource(client).open(1, "http://evil.test/data/upload/1.jpg") as chunks:
        assert b"".join(chunks) == b"image"
    assert [str(r.url) for r in seen] == [BASE + "/data/upload/1.jpg"]


def test_a_hosts_certificate_is_named_and_the_advice_works(own, self_signed, monkeypatch):
    """A storage with a certificate of its own was said to be down."""
    url, certificate = self_signed
    with pytest.raises(ImageError, match=r"self-signed certificate\); set SSL_CERT_FILE"):
        read(source(own, allowed=["localhost"], names={"localhost": ["127.0.0.1"]}), url + "/a.png")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(ImageError, match="status 501"):  # there is a connection
        read(source(own, allowed=["localhost"], names={"localhost": ["127.0.0.1"]}), url + "/a.png")


def test_label_studios_certificate_is_named_for_an_image_too(self_signed):
    client = LabelStudioClient(self_signed[0], LEGACY, tries=1)
    with pytest.raises(LabelStudioError, match=r"self-signed certificate\); set SSL_CERT_FILE") as caught:
        read(ImageSource(client, tries=1), "/data/upload/1/a.png")
    assert not isinstance(caught.value, LabelStudioUnavailable)


def test_a_path_upwards_is_refused_under_every_name():
    for url in ("http://localhost/data/../api/users", "http://localhost/data/%2e%2e/api", "/label-studio/../x"):
        with pytest.raises(ImageError, match=r"without '\.\.'"):
            target_of(1, url, Addresses("http://ls:8080", ("http://localhost", "http://localhost/label-studio")))


def test_protocol_relative_address_is_another_host():
    assert target_of(1, "//evil.test/data/a.jpg", Addresses("http://h")).signed is False


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("2002:7f00:1::", False),
        ("2001:0:1::1", False),
        ("::7f00:1", False),
        ("nonsense", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public


def test_rules_ignore_case_and_final_dot():
    rules = HostRules(["CDN.test", ""])
    assert rules.named("cdn.TEST.", 80)
    assert not rules.named("xcdn.test", 80)


def test_messages_show_no_signature():
    assert safe_url("https://u:p@h.test:8443/a/b.jpg?X-Amz-Signature=abc#f") == "https://h.test:8443/a/b.jpg"
