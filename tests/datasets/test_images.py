"""The image cache: what is stored, what is refused, and what damage does."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ppal_backend.datasets.images import ImageCache
from ppal_backend.errors import ImageError


def picture(width=40, height=20):
    """A gradient whose corners all differ."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 6, y * 12, (x + y) * 4], -1).astype(np.uint8))


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


class Web:
    """Addresses and their bytes; counts fetches."""

    def __init__(self, **pages: bytes) -> None:
        self.pages, self.fetched = pages, []

    @contextmanager
    def __call__(self, task_id, url):
        self.fetched.append((task_id, url))
        if url not in self.pages:
            raise ImageError("gone")
        data = self.pages[url]
        yield (data[i : i + 1000] for i in range(0, len(data), 1000))


def cache(tmp_path, data, **options):
    web = Web(a=data)
    return ImageCache(tmp_path, web, **options), web


def pixels(info):
    return np.asarray(Image.open(info.path).convert("RGB")).astype(int)


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", ".jpg"), ("PNG", ".png")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_files_are_kept_byte_for_byte(tmp_path, kind, suffix, mode):
    data = encoded(picture().convert(mode), kind)
    images, web = cache(tmp_path, data)
    info = images.get(3, "a")
    assert (info.task_id, info.width, info.height) == (3, 40, 20)
    assert info.path.suffix == suffix
    assert info.path.read_bytes() == data
    assert images.get(3, "a") == info
    assert len(web.fetched) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_stored_as_a_browser_shows_it(tmp_path, orientation):
    shown = np.asarray(picture(40, 24)).astype(int)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo(shown)).astype(np.uint8))
    images, _ = cache(tmp_path, encoded(stored, "JPEG", quality=95, subsampling=0, exif=exif))
    info = images.get(1, "a")
    assert (info.width, info.height) == (40, 24)
    assert np.abs(pixels(info) - shown).max() < 25
    assert Image.open(info.path).getexif().get(0x0112, 1) == 1
    assert info.path.suffix == (".jpg" if orientation == 1 else ".png")


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def exif_of(*entries):
    """EXIF data whose first directory holds ``entries``: packed tag, type, count and value."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0"


TURNED = exif_of(struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0))


def exif_chunk(data):
    body = b"eXIf" + data.removeprefix(b"Exif\0\0")
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def oriented(image):
    """Files of ``image`` that name orientation 6 in some place, those first that a browser turns."""
    in_xmp, in_text, png = PngInfo(), PngInfo(), encoded(image, "PNG")
    in_xmp.add_itxt("XML:com.adobe.xmp", XMP)
    in_text.add_text("Raw profile type exif", f"\nexif\n{len(TURNED):8}\n{TURNED.hex()}\n", zip=True)
    as_long = exif_of(struct.pack("<HHII", 0x0112, 4, 1, 6))
    without = exif_of(struct.pack("<HHI4s", 0x010F, 2, 4, b"abc\0"))
    return {
        "JPEG EXIF": encoded(image, "JPEG", quality=95, subsampling=0, exif=TURNED),
        "PNG eXIf": encoded(image, "PNG", exif=TURNED),
        "PNG eXIf behind the pixels": png[:-12] + exif_chunk(TURNED) + png[-12:],
        "PNG text": encoded(image, "PNG", pnginfo=in_text),
        "PNG XMP": encoded(image, "PNG", pnginfo=in_xmp),
        "JPEG XMP": encoded(image, "JPEG", quality=95, subsampling=0, xmp=XMP.encode()),
        "JPEG XMP beside EXIF": encoded(image, "JPEG", quality=95, subsampling=0, xmp=XMP.encode(), exif=without),
        "JPEG EXIF of another type": encoded(image, "JPEG", quality=95, subsampling=0, exif=as_long),
        "WebP EXIF": encoded(image, "WEBP", lossless=True, exif=TURNED),
        "WebP XMP": encoded(image, "WEBP", lossless=True, xmp=XMP.encode()),
    }


TURNED_BY_BROWSERS = ("JPEG EXIF", "PNG eXIf")


@pytest.mark.parametrize("place", oriented(picture()))
def test_an_image_is_turned_where_a_browser_turns_it(tmp_path, place):
    """Measured with Chromium 156. Elsewhere boxes were learned on the wrong pixels, and drawn on them."""
    stored = picture(40, 24)
    shown = np.asarray(stored).astype(int)
    if place in TURNED_BY_BROWSERS:
        shown = np.rot90(shown, -1)
    info = cache(tmp_path, oriented(stored)[place])[0].get(1, "a")
    assert (info.width, info.height) == shown.shape[1::-1]
    assert np.abs(pixels(info) - shown).max() < 25
    assert np.abs(cv2.imread(str(info.path))[:, :, ::-1] - shown).max() < 25, "a detector's reader turns it once more"


def test_transparency_is_shown_on_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 255, 255))
    images, _ = cache(tmp_path, encoded(image, "PNG"))
    found = pixels(images.get(1, "a"))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 1].tolist() == [0, 0, 255]


def test_palette_with_transparency_and_16_bit_grey(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    image.putpixel((1, 0), 1)
    images, _ = cache(tmp_path / "p", encoded(image, "PNG", transparency=1))
    assert pixels(images.get(1, "a")).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    grey = Image.fromarray(np.array([[0, 256 * 100, 65535]], np.uint16))
    images, _ = cache(tmp_path / "g", encoded(grey, "PNG"))
    assert pixels(images.get(1, "a"))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_become_rgb_png(tmp_path, kind):
    images, _ = cache(tmp_path, encoded(picture(), kind))
    info = images.get(1, "a")
    assert Image.open(info.path).format == "PNG"
    assert Image.open(info.path).mode == "RGB"
    assert np.abs(pixels(info) - np.asarray(picture()).astype(int)).mean() < 12


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    images, _ = cache(tmp_path, encoded(picture().convert("CMYK"), "JPEG"))
    assert Image.open(images.get(1, "a").path).mode == "RGB"


def bomb(width, height):
    """A PNG header that promises a huge image, without the data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(20_000, 10_000), (11_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_huge_images_are_refused_before_decoding(tmp_path, size, monkeypatch):
    def decode(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    images, _ = cache(tmp_path, bomb(*size))
    with pytest.raises(ImageError, match="megapixels"):
        images.get(1, "a")


def test_limit_of_pixels_is_a_setting(tmp_path):
    data = encoded(picture(40, 20), "PNG")
    assert cache(tmp_path, data, max_pixels=800)[0].get(1, "a").width == 40
    with pytest.raises(ImageError, match="40 x 20"):
        cache(tmp_path / "b", data, max_pixels=799)[0].get(1, "a")


def test_a_strip_of_which_no_detector_would_see_a_pixel_is_refused(tmp_path):
    assert cache(tmp_path, encoded(picture(400, 4), "PNG"))[0].get(1, "a").width == 400
    with pytest.raises(ImageError, match=r"task 1: expected sides of at most 100 : 1, got 404 x 4.*crop it"):
        cache(tmp_path / "b", encoded(picture(404, 4), "PNG"))[0].get(1, "a")


def test_the_operators_limit_goes_before_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert cache(tmp_path, encoded(picture(40, 20), "PNG"), max_pixels=800)[0].get(1, "a").width == 40


def test_too_many_bytes_stop_the_transfer(tmp_path):
    images, _ = cache(tmp_path, b"x" * 5000, max_bytes=2500)
    with pytest.raises(ImageError, match="at most 2500 bytes"):
        images.get(1, "a")


PNG, JPEG = encoded(picture(200, 200), "PNG"), encoded(picture(200, 200), "JPEG")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "empty file"),
        (b"<html>not an image", "another kind of file"),
        (b"\n<!DOCTYPE html>\n<html><title>Sign in</title>", "got another kind of file, a web page: .* the file's own"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "another kind of file"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "another kind of file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "another kind of file"),
        (PNG[: len(PNG) // 2], "damaged"),
        (JPEG[: len(JPEG) // 2], "damaged"),
        (bomb(200, 200), "damaged"),
        (PNG[:60] + b"\0" * 40 + PNG[100:], "damaged"),
    ],
)
def test_files_that_are_no_whole_image(tmp_path, data, text):
    images, _ = cache(tmp_path, data)
    with pytest.raises(ImageError, match=text) as caught:
        images.get(12, "a")
    assert "task 12" in str(caught.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_pixels_that_are_floating_point_numbers_are_refused_instead_of_read_as_black(tmp_path):
    numbers = Image.fromarray(np.linspace(0.0, 1.0, 800, dtype=np.float32).reshape(20, 40))
    with pytest.raises(ImageError, match="task 3: expected pixels of 8 or 16 bits, got floating-point numbers"):
        cache(tmp_path, encoded(numbers, "TIFF"))[0].get(3, "a")


def test_avif_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ImageError, match=r"task 3: expected JPEG, .* got another kind of file; convert it to PNG or"):
        cache(tmp_path, b"\0\0\0 ftypavif\0\0\0\0avifmif1miaf" + b"\0" * 400)[0].get(3, "a")


def test_broken_exif_does_not_cost_the_image(tmp_path):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 30
    images, _ = cache(tmp_path, encoded(picture(), "JPEG", exif=exif))
    assert images.get(1, "a").width == 40


def test_gone_image_names_the_task(tmp_path):
    with pytest.raises(ImageError, match="task 4: gone"):
        ImageCache(tmp_path, Web()).get(4, "a")
    for url in ("", "  ", None):
        with pytest.raises(ImageError, match="task 4: expected the address"):
            ImageCache(tmp_path, Web()).get(4, url)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "note", "note-type"])
def test_damage_in_the_cache_is_noticed_and_mended(tmp_path, damage):
    data = encoded(picture(), "PNG")
    images, web = cache(tmp_path, data)
    info = images.get(1, "a")
    note = info.path.with_suffix(".json")
    if damage == "flip":
        info.path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    elif damage == "cut":
        info.path.write_bytes(data[:-10])
    elif damage == "gone":
        info.path.unlink()
    else:
        note.write_text("{" if damage == "note" else '{"suffix": "/../../etc/passwd"}')
    assert images.get(1, "a") == info
    assert info.path.read_bytes() == data
    assert len(web.fetched) == 2


def test_entries_differ_by_task_address_and_label_studio(tmp_path):
    web = Web(a=encoded(picture(), "PNG"), b=encoded(picture(8, 8), "PNG"))
    first, second = ImageCache(tmp_path, web), ImageCache(tmp_path, web, namespace="http://other")
    paths = {first.get(1, "a").path, first.get(1, "b").path, first.get(2, "a").path, second.get(1, "a").path}
    assert len(paths) == 4
    assert len(web.fetched) == 4


def test_names_never_come_from_the_address(tmp_path):
    url = "/data/upload/../../../evil\0.sh"
    web = Web(**{url: encoded(picture(), "PNG")})
    path = ImageCache(tmp_path / "c", web).get(1, url).path
    assert path.resolve().is_relative_to((tmp_path / "c").resolve())
    assert path.stem.isalnum()


def test_many_threads_at_once(tmp_path):
    images, _ = cache(tmp_path, encoded(picture(), "PNG"))
    found, threads = [], []
    for _ in range(8):
        threads.append(threading.Thread(target=lambda: found.append(images.get(1, "a"))))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert sorted(p.suffix for p in tmp_path.rglob("*") if p.is_file()) == [".json", ".png"]
