"""Small copies of cached images, for looking at many in passing."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from ppal_backend.errors import StateError

LONGEST_PX = 320
_QUALITY = 80


def small_jpeg(path: Path) -> bytes:
    """A JPEG of an image that is no longer than ``LONGEST_PX`` on either side.

    Args:
        path: An image of the cache: RGB or grey, upright.

    Raises:
        StateError: the file cannot be read.
    """
    from PIL import Image  # 40 ms that no page but the map needs

    try:
        with Image.open(path) as image:
            image.draft("RGB", (LONGEST_PX, LONGEST_PX))
            image.thumbnail((LONGEST_PX, LONGEST_PX))
            file = BytesIO()
            image.convert("RGB").save(file, "JPEG", quality=_QUALITY)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise StateError(f"expected a readable image in {path.name}, got {type(error).__name__}; run a round") from None
    return file.getvalue()
