"""Task data that points where it should not, and images that are weapons."""

import gzip
import io
import struct
import threading
import tracemalloc
import zlib

import pytest
from PIL import Image

from ppal_backend.datasets.images import ImageCache
from ppal_backend.errors import ImageError
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.image_source import ImageSource
from ppal_backend.label_studio.source import image_cache
from tests.label_studio.fake import LEGACY

pytestmark = pytest.mark.attacks


@pytest.fixture
def make_cache(tmp_path, label_studio_site):
    """The image cache with an image source; ``names`` is the DNS, ``hosts`` what the operator allowed."""

    def make(hosts=(), names=None, **options):
        client = LabelStudioClient(label_studio_site.url, LEGACY, tries=1, sleep=lambda s: None)

        def resolver(host, port):
            found = (names or {}).get(host, [host])
            return found() if callable(found) else found

        source = ImageSource(client, hosts, resolver=resolver, tries=1, sleep=lambda s: None)
        return ImageCache(tmp_path / "images", source, **options)

    return make


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "url",
    [
        "/data/upload/../../../../etc/passwd",
        "/data/upload/%2e%2e/%2e%2e/etc/passwd",
        "/data/local-files/?d=x/../../../..\\etc\\passwd",
        "../../../etc/passwd",
        "/data/upload/1/..%252f..%252fapi/x/%2e%2e",
    ],
)
def test_path_traversal(make_cache, label_studio_site, tmp_path, url):
    with pytest.raises(ImageError):
        make_cache().get(7, url)
    assert all("passwd" not in path for path, _ in label_studio_site.asked)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("task_id", [7, -1, 10**30])
def test_the_name_of_a_cached_file_is_never_taken_from_the_task(make_cache, label_studio_site, tmp_path, task_id):
    name = "/data/upload/1/%2Fetc%2Fcron.d%2Fx.png"
    label_studio_site.answers[name] = (200, {}, png())
    info = make_cache().get(task_id, name)
    assert info.path.is_relative_to(tmp_path / "images")
    assert all(path.is_relative_to(tmp_path / "images") and "cron" not in path.name for path in files_below(tmp_path))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "FILE:///etc/passwd", " file:/etc/passwd", "file://h/share/x"])
def test_file_scheme(make_cache, url):
    with pytest.raises(ImageError, match="file:"):
        make_cache(["*", "h"]).get(7, url)


def test_file_scheme_in_a_redirect(make_cache, label_studio_site):
    label_studio_site.answers["/data/upload/1/a.png"] = (302, {"Location": "file:///etc/passwd"}, b"")
    with pytest.raises(ImageError, match="file"):
        make_cache(["*"]).get(7, "/data/upload/1/a.png")


def test_another_host_than_label_studios_needs_the_operators_word(make_cache, settings, label_studio_site):
    with pytest.raises(ImageError, match="PPAL_ALLOWED_IMAGE_HOSTS"):
        make_cache(names={"cdn.test": ["93.184.216.34"]}).get(7, "http://cdn.test/a.png")
    client = LabelStudioClient(label_studio_site.url, LEGACY, tries=1)
    with pytest.raises(ImageError, match="PPAL_ALLOWED_IMAGE_HOSTS"):  # as shipped
        image_cache(settings, client).get(7, "http://93.184.216.34/a.png")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "0x7f000001", "2130706433", "[::1]", "[::ffff:127.0.0.1]"])
def test_redirect_to_a_private_address(make_cache, label_studio_site, internal_site, host):
    import socket

    def resolved():
        return [entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), internal_site.port)]

    location = f"http://{host}:{internal_site.port}/latest/meta-data/"
    label_studio_site.answers["/data/upload/1/a.png"] = (302, {"Location": location}, b"")
    with pytest.raises(ImageError, match=r"private network|allowed host|exists"):
        make_cache(["*"], {host.strip("[]"): resolved}).get(7, "/data/upload/1/a.png")
    assert internal_site.asked == []


def test_redirect_from_an_allowed_host_to_a_private_address(make_cache, label_studio_site, internal_site):
    label_studio_site.answers["/out"] = (307, {"Location": f"{internal_site.url}/latest/meta-data/"}, b"")
    cache = make_cache([f"cdn.test:{label_studio_site.port}"], {"cdn.test": ["127.0.0.1"]})
    with pytest.raises(ImageError, match="allowed host"):
        cache.get(7, f"http://cdn.test:{label_studio_site.port}/out")
    assert label_studio_site.asked == [("/out", None)] and internal_site.asked == []


def test_dns_name_of_a_private_address(make_cache, internal_site):
    for addresses in (["127.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["169.254.169.254"], ["fd00::1"]):
        cache = make_cache(["*", ".evil.test"], {"a.evil.test": addresses})
        with pytest.raises(ImageError, match="private network"):
            cache.get(7, f"http://a.evil.test:{internal_site.port}/latest/meta-data/")
    assert internal_site.asked == []


def test_dns_name_that_changes_between_check_and_use(make_cache, internal_site):
    """The address that was checked is the one connected to: the name is looked up once."""
    answers = iter([["203.0.113.1"], ["127.0.0.1"]])
    asked = []

    def rebinding():
        asked.append(1)
        return next(answers)

    cache = make_cache(["*"], {"rebind.test": rebinding})
    with pytest.raises(ImageError):
        cache.get(7, f"http://rebind.test:{internal_site.port}/latest/meta-data/")
    assert (len(asked), internal_site.asked) == (1, [])


@pytest.mark.parametrize("url", ["http://cdn.test/a\r\nX-Evil: 1", "http://cdn.test\r\n/a", "/data/a\nHost: evil"])
def test_header_injection_through_an_address(make_cache, label_studio_site, url):
    with pytest.raises(ImageError, match="control characters"):
        make_cache(["*"]).get(7, url)
    assert label_studio_site.asked == []


def test_header_injection_through_a_redirect(make_cache, label_studio_site, internal_site):
    location = f"http://cdn.test:{internal_site.port}/a%0d%0aX-Evil:%201"
    label_studio_site.answers["/data/a.png"] = (302, {"Location": location}, b"")
    names = {"cdn.test": ["127.0.0.1"]}
    with pytest.raises(ImageError):
        make_cache(["cdn.test"], names).get(7, "/data/a.png")
    assert internal_site.asked == [("/a%0d%0aX-Evil:%201", None)]  # still one line, still encoded


def png(width=4, height=4, data=None):
    """A PNG that declares a size and holds ``data`` (its own pixels when None)."""
    if data is None:
        buffer = io.BytesIO()
        Image.new("RGB", (width, height)).save(buffer, "PNG")
        return buffer.getvalue()

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(50_000, 50_000), (11_000, 10_000)])
def test_decompression_bomb_by_size(make_cache, label_studio_site, tmp_path, size):
    """A few hundred bytes that claim to be huge: refused by the header, before a byte is decoded."""
    label_studio_site.answers["/data/bomb.png"] = (200, {}, png(*size, zlib.compress(bytes(100_000), 9)))
    tracemalloc.start()
    with pytest.raises(ImageError, match="megapixels"):
        make_cache().get(7, "/data/bomb.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20
    assert files_below(tmp_path) == []


def test_decompression_bomb_in_a_text_chunk(make_cache, label_studio_site):
    body = b"Comment\0\0" + zlib.compress(bytes(80 * 2**20), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    whole = png()
    label_studio_site.answers["/data/bomb.png"] = (200, {}, whole[:33] + chunk + whole[33:])
    with pytest.raises(ImageError):
        make_cache().get(7, "/data/bomb.png")


def test_decompression_bomb_by_content_encoding(make_cache, label_studio_site, tmp_path):
    packed = gzip.compress(bytes(30 * 2**20), 9)
    label_studio_site.answers["/data/bomb.png"] = (200, {"Content-Encoding": "gzip"}, packed)
    with pytest.raises(ImageError, match="at most 1048576 bytes"):
        make_cache(max_bytes=2**20).get(7, "/data/bomb.png")
    assert files_below(tmp_path) == []


def test_endless_body(make_cache, label_studio_site, tmp_path):
    label_studio_site.answers["/data/a.png"] = (200, {}, bytes(3 * 2**20))
    with pytest.raises(ImageError, match="at most"):
        make_cache(max_bytes=2**20).get(7, "/data/a.png")
    assert files_below(tmp_path) == []


def test_many_large_images_are_decoded_one_at_a_time(make_cache, label_studio_site, monkeypatch):
    """Eight threads that decode an image of the largest allowed size each would need gigabytes."""
    at_work, most, lock = [0], [0], threading.Lock()
    both = threading.Barrier(2)
    load = Image.Image.load

    def counted(image, *args):
        if image.fp is None:
            return load(image, *args)
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        try:
            both.wait(0.3)  # gives a second thread the time to come in, if it can
        except threading.BrokenBarrierError:
            both.reset()
        finally:
            with lock:
                at_work[0] -= 1
        return load(image, *args)

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", counted)
    cache = make_cache(max_pixels=400)
    for i in range(2):
        label_studio_site.answers[f"/data/{i}.png"] = (200, {}, png(20, 20))
    threads = [threading.Thread(target=cache.get, args=(i, f"/data/{i}.png")) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1


@pytest.mark.parametrize(
    "body",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.4\n",
    ],
)
def test_formats_that_run_programs_or_fetch_things(make_cache, label_studio_site, body):
    label_studio_site.answers["/data/a.png"] = (200, {}, body + b" " * 200)
    with pytest.raises(ImageError, match="another kind of file"):
        make_cache().get(7, "/data/a.png")
