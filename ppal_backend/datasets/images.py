"""A folder of verified images: fetched once, decoded once in full, stored upright."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ppal_backend.errors import ImageError, ImageInterrupted
from ppal_backend.files import sha256_of

logger = logging.getLogger(__name__)

Fetch = Callable[[int, str], AbstractContextManager[Iterable[bytes]]]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MOST_ELONGATED = 100
"""Longer than so many times its width, an image has less than a pixel at the input size of a small detector."""
_ORIENTATION, _SHORT = 0x0112, 3
_TURNED_BY_BROWSERS = ("JPEG", "MPO", "PNG")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_AS_IS = {"JPEG": ".jpg", "PNG": ".png"}
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    EOFError,
    AttributeError,
    struct.error,
    zlib.error,
)


def open_image(path: Path, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Read the header of an image, however large it is: Pillow's own limit would come before the operator's.

    Raises:
        OSError, SyntaxError, ValueError: It cannot be read.
    """
    Image.MAX_IMAGE_PIXELS = None
    return Image.open(path, formats=formats)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, by which browsers turn an image.

    They read it from a JPEG's EXIF data and from a PNG's eXIf chunk. Pillow's ``getexif`` reads XMP, a PNG's text and
    other formats too.

    Args:
        image: Opened and not decoded yet: decoding reads the chunks behind a PNG's pixels, which browsers do not.
    """
    return exif_orientation(image) if image.format in _TURNED_BY_BROWSERS else 1


def exif_orientation(image: Image.Image) -> int:
    """The orientation in the EXIF data of an image of any format: a SHORT in its first directory, or 1."""
    exif = image.info.get("exif")
    data = exif.removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else b""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (entries,) = struct.unpack_from(f"{order}H", data, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(f"{order}HHIH", data, place)
            if (tag, kind, count) == (_ORIENTATION, _SHORT, 1):
                return value if value in _TURNS else 1
    except struct.error:  # it ends too early
        pass
    return 1


@dataclass(frozen=True)
class ImageInfo:
    """A cached image: ``width`` and ``height`` are pixels as a browser displays it, and as stored in ``path``.

    ``checksum`` is the SHA-256 of the file, "" where it is not known."""

    task_id: int
    path: Path
    width: int
    height: int
    checksum: str = ""


class ImageCache:
    """Images by task and address, under names of our own making.

    A file is JPEG or PNG as fetched when that is RGB or grey and upright to every program, else an RGB PNG of what a
    browser shows (turned as :func:`orientation_of` says, transparency on white, first frame). A sidecar with size and
    checksum is written last: a file without it, or that differs from it, is fetched again. The checksum is computed
    anew only of a file that was written to since: a round over a large project would else read all of its images.

    Args:
        root: Folder of the cache; made when needed.
        fetch: ``fetch(task_id, url)`` opens the bytes; raises :class:`ImageError` for an address it refuses.
        max_pixels: Larger images are refused before decoding. Those above a quarter of it are decoded one at a time,
            so that several threads need no more memory than one image of the largest size and a few small ones.
        max_bytes: Longer files are refused while they arrive.
        namespace: Kept apart from others in the same folder (Label Studio's address: the same upload path means
            another image elsewhere).
    """

    def __init__(
        self,
        root: Path,
        fetch: Fetch,
        max_pixels: int = 100_000_000,
        max_bytes: int = 200 * 1024 * 1024,
        namespace: str = "",
    ) -> None:
        self._root = root
        self._fetch = fetch
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._namespace = namespace
        self._decoding_large = threading.Lock()

    def get(self, task_id: int, url: str) -> ImageInfo:
        """Return the image of a task, fetched if it is not there or damaged.

        Args:
            task_id: Label Studio task.
            url: The image's address as in the task's data.

        Raises:
            ImageError: Gone, refused, truncated, no image or too large; the text names the task and the reason.
            LabelStudioError: From ``fetch``, when Label Studio itself is unavailable.
        """
        if not isinstance(url, str) or not url.strip():
            raise ImageError(
                f"task {task_id}: expected the address of an image, got {url!r:.80}; correct the task's data"
            )
        stem = self._stem(task_id, url)
        cached = self._cached(task_id, stem)
        return cached if cached is not None else self._store(task_id, url, stem)

    def _stem(self, task_id: int, url: str) -> Path:
        key = hashlib.sha256(f"{self._namespace}\n{task_id}\n{url}".encode("utf-8", "surrogatepass")).hexdigest()
        return self._root / key[:2] / key[2:34]

    def _cached(self, task_id: int, stem: Path) -> ImageInfo | None:
        try:
            note = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
            path = stem.with_suffix(_suffix(note["suffix"]))
            status = path.stat()
            untouched = status.st_mtime_ns == note.get("mtime_ns")
            if status.st_size != note["bytes"] or not (untouched or sha256_of(path) == note["sha256"]):
                logger.warning("task %d: the cached image is damaged, fetching it again", task_id)
                return None
            os.utime(stem.with_suffix(".json"))  # so that prune_images knows what was used last
            return ImageInfo(task_id, path, int(note["width"]), int(note["height"]), str(note["sha256"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            logger.warning("task %d: the note beside the cached image is damaged, fetching again", task_id)
            return None

    def _store(self, task_id: int, url: str, stem: Path) -> ImageInfo:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(stem) as part, _temporary(stem) as converted:
            self._download(task_id, url, part)
            suffix, width, height = self._verify(task_id, part, converted)
            source = part if suffix is not None else converted
            path = stem.with_suffix(suffix or ".png")
            status, checksum = source.stat(), sha256_of(source)
            note = {"suffix": path.suffix, "bytes": status.st_size, "sha256": checksum}
            note |= {"mtime_ns": status.st_mtime_ns, "width": width, "height": height}
            source.replace(path)
        with _temporary(stem) as part:
            part.write_text(json.dumps(note), encoding="utf-8")
            part.replace(stem.with_suffix(".json"))
        return ImageInfo(task_id, path, width, height, checksum)

    def _download(self, task_id: int, url: str, part: Path) -> None:
        try:
            try:
                size = self._fetch_once(task_id, url, part)
            except ImageInterrupted:
                size = self._fetch_once(task_id, url, part)
        except ImageError as error:
            raise ImageError(f"task {task_id}: {error}") from None
        if size == 0:
            raise ImageError(f"task {task_id}: expected an image, got an empty file; upload it again")

    def _fetch_once(self, task_id: int, url: str, part: Path) -> int:
        """Write the image to ``part``; its bytes."""
        size = 0
        with self._fetch(task_id, url) as chunks, part.open("wb") as file:
            for chunk in chunks:
                size += len(chunk)
                if size > self._max_bytes:
                    raise ImageError(f"expected at most {self._max_bytes} bytes, got more; use a smaller file")
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return size

    def _verify(self, task_id: int, part: Path, converted: Path) -> tuple[str | None, int, int]:
        """Decode ``part`` in full; return its suffix when it can stay as it is, else None and write ``converted``."""
        try:
            with open_image(part, FORMATS) as image:
                width, height = image.size
                orientation = orientation_of(image)
                if width * height > self._max_pixels:
                    raise ImageError(
                        f"task {task_id}: expected at most {self._max_pixels / 1e6:g} megapixels, got "
                        f"{width * height / 1e6:.0f} ({width} x {height}); use a smaller image or set "
                        "PPAL_MAX_IMAGE_MEGAPIXELS"
                    )
                if max(width, height) > MOST_ELONGATED * min(width, height):
                    raise ImageError(
                        f"task {task_id}: expected sides of at most {MOST_ELONGATED} : 1, got {width} x {height}: at a "
                        "detector's input size nothing would be left of it; crop it"
                    )
                if image.mode == "F":  # decoded as it is, most of it would be black
                    raise ImageError(
                        f"task {task_id}: expected pixels of 8 or 16 bits, got floating-point numbers; save it as PNG"
                    )
                with self._decoding_large if 4 * width * height > self._max_pixels else nullcontext():
                    image.load()
                    return self._finish(image, orientation, converted)
        except ImageError:
            raise
        except UnidentifiedImageError:
            advice = "; convert it to PNG or JPEG"
            if _is_web_page(part):
                advice = ", a web page: a login, or one that shows the image; use the file's own address"
            raise ImageError(
                f"task {task_id}: expected {', '.join(FORMATS)}, got another kind of file{advice}"
            ) from None
        except _DECODE_ERRORS as error:
            raise ImageError(
                f"task {task_id}: expected a whole image, got a damaged one ({error}); upload it again"
            ) from None

    @staticmethod
    def _finish(image: Image.Image, orientation: int, converted: Path) -> tuple[str | None, int, int]:
        plain = image.mode in ("RGB", "L") and "transparency" not in image.info
        suffix = _AS_IS.get("JPEG" if image.format == "MPO" else image.format or "")
        if plain and orientation == 1 and _is_turned_by_none(image) and suffix is not None:
            return suffix, *image.size
        upright = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
        shown = _as_rgb(upright)
        with converted.open("wb") as file:
            shown.save(file, format="PNG", compress_level=1)
            file.flush()
            os.fsync(file.fileno())
        return None, *shown.size


@dataclass(frozen=True)
class Evicted:
    """What was taken out of a folder of images: how many, their bytes, and the bytes that are left."""

    images: int
    bytes: int
    bytes_left: int


def prune_images(
    root: Path, limit_bytes: int, keep: Collection[Path], used_before: float, dry_run: bool = False
) -> Evicted:
    """Take images out of a cache until it holds at most ``limit_bytes``, those first that were not used for longest.

    Args:
        root: Folder of an :class:`ImageCache`.
        limit_bytes: Most bytes to keep, as far as what may go allows.
        keep: Image files that stay whatever the limit.
        used_before: Only images that were last used before this time (``time.time()``) may go: others may be part of a
            data set that is being put together.
        dry_run: Remove nothing.
    """
    found = []
    for note in root.glob("*/*.json"):
        image = next((p for p in (note.with_suffix(s) for s in _AS_IS.values()) if p.is_file()), None)
        size = note.stat().st_size + (image.stat().st_size if image is not None else 0)
        found.append((note.stat().st_mtime, size, note, image))
    left = sum(size for _, size, _, _ in found)
    evicted = freed = 0
    for used, size, note, image in sorted(found, key=lambda item: item[0]):
        if left - freed <= limit_bytes:
            break
        if used >= used_before or (image is not None and image in keep):
            continue
        if not dry_run:
            note.unlink(missing_ok=True)  # first: an image without its note is fetched again
            if image is not None:
                image.unlink(missing_ok=True)
        evicted, freed = evicted + 1, freed + size
    for part in root.glob("*/.*.part"):  # of a process that was killed while it fetched
        if part.stat().st_mtime < used_before and not dry_run:
            part.unlink(missing_ok=True)
    return Evicted(evicted, freed, left - freed)


def _is_turned_by_none(image: Image.Image) -> bool:
    """Whether no program turns a file: some, such as a detector's reader, look where browsers do not."""
    try:
        return image.getexif().get(_ORIENTATION, 1) in (0, 1, None)
    except _DECODE_ERRORS:
        return False


def _as_rgb(image: Image.Image) -> Image.Image:
    """What a browser shows, without EXIF: 16-bit grey by its upper byte, transparency on white."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda v: v / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(canvas, rgba)
    rgb = image.convert("RGB")
    rgb.info = {}
    rgb.getexif().clear()
    return rgb


def _is_web_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html"))


def _suffix(value: object) -> str:
    if value not in (".jpg", ".png"):
        raise ValueError("unknown suffix")
    return str(value)


@contextmanager
def _temporary(stem: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(dir=stem.parent, prefix=f".{stem.name}.", suffix=".part")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
