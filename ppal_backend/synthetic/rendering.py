"""Layout to pixels: composites a scene and measures the visible box of every object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from ppal_backend.synthetic.glyphs import GlyphSheet
from ppal_backend.synthetic.layout import Item, Layout
from ppal_backend.synthetic.photographs import Photographs

MIN_VISIBLE = 0.4
"""An object of which less than this share is visible is left out of the picture and of the ground truth."""
_SOLID = 0.5


@dataclass(frozen=True)
class Rendered:
    """A picture (uint8 RGB [height, width, 3]) and its objects: label and tight visible box (x, y, w, h) in px."""

    pixels: np.ndarray
    objects: tuple[tuple[str, tuple[int, int, int, int]], ...]


@dataclass(frozen=True)
class _Stamp:
    """An item's pixels inside the image: slice of the canvas, RGB, alpha in 0..1, and its full solid area in px."""

    item: Item
    rows: slice
    columns: slice
    rgb: np.ndarray
    alpha: np.ndarray
    area: int


def render(
    layout: Layout,
    width: int,
    height: int,
    sheet: GlyphSheet,
    photographs: Photographs,
    rng: np.random.Generator,
) -> Rendered:
    """Draw a layout.

    Args:
        layout: What to draw.
        width: Image width in px.
        height: Image height in px.
        sheet: The sprites.
        photographs: The backgrounds.
        rng: Generator for the sensor noise.

    Returns:
        The picture and the visible objects, from back to front; none for a layout without labelled items.
    """
    canvas = photographs.render(layout.backdrop, width, height)
    stamps = [stamp for item in layout.items if (stamp := _stamp(item, width, height, sheet)) is not None]
    stamps, owner = _drop_hidden(stamps, width, height)
    for stamp in stamps:
        _paint(canvas, stamp)
    objects = tuple(
        (stamp.item.label, _box(owner == index)) for index, stamp in enumerate(stamps) if stamp.item.label is not None
    )
    canvas += rng.normal(0.0, layout.noise, size=canvas.shape).astype(np.float32)
    return Rendered(np.clip(canvas, 0.0, 255.0).astype(np.uint8), objects)


def _stamp(item: Item, width: int, height: int, sheet: GlyphSheet) -> _Stamp | None:
    """Scale, mirror and turn an item's sprite; None when nothing of it lies inside the image."""
    short = min(width, height)
    sprite = _shape_sprite(item.glyph) if item.glyph.startswith("@") else sheet.sprite(item.glyph)
    factor = item.size * short / max(sprite.size)
    size = (max(2, round(sprite.width * factor)), max(2, round(sprite.height * factor)))
    sprite = sprite.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    if item.mirrored:
        sprite = ImageOps.mirror(sprite)
    sprite = sprite.rotate(item.angle_deg, Image.Resampling.BICUBIC, expand=True)
    left, top = round(item.x * short - sprite.width / 2), round(item.y * short - sprite.height / 2)
    right, bottom = min(width, left + sprite.width), min(height, top + sprite.height)
    pixels = np.asarray(sprite, dtype=np.float32)
    area = int((pixels[..., 3] > 255.0 * _SOLID).sum())
    pixels = pixels[max(0, -top) : bottom - top, max(0, -left) : right - left]
    if area == 0 or pixels.size == 0 or right <= 0 or bottom <= 0:
        return None
    rgb = pixels[..., :3] * np.asarray(item.gains, dtype=np.float32)
    rows, columns = slice(max(0, top), bottom), slice(max(0, left), right)
    return _Stamp(item, rows, columns, rgb, pixels[..., 3] / 255.0, area)


def _shape_sprite(name: str) -> Image.Image:
    """A white shape, to be coloured by the item's gains."""
    sprite = Image.new("RGBA", (64, 64))
    draw = ImageDraw.Draw(sprite)
    if name == "@ellipse":
        draw.ellipse((1, 8, 62, 55), fill="white")
    elif name == "@bar":
        draw.rounded_rectangle((0, 24, 63, 40), radius=5, fill="white")
    else:
        draw.polygon(((32, 2), (62, 60), (2, 60)), fill="white")
    return sprite


def _owners(stamps: Sequence[_Stamp], width: int, height: int) -> np.ndarray:
    """Index of the front-most stamp at every pixel, -1 for none; [height, width]."""
    owner = np.full((height, width), -1, dtype=np.int16)
    for index, stamp in enumerate(stamps):
        owner[stamp.rows, stamp.columns][stamp.alpha > _SOLID] = index
    return owner


def _drop_hidden(stamps: list[_Stamp], width: int, height: int) -> tuple[list[_Stamp], np.ndarray]:
    """Leave out, worst first, objects seen to less than ``MIN_VISIBLE`` (hidden by others or by the image's border)."""
    while True:
        owner = _owners(stamps, width, height)
        counts = np.bincount(owner[owner >= 0], minlength=len(stamps))
        shares = [
            counts[index] / stamp.area if stamp.item.label is not None else 1.0 for index, stamp in enumerate(stamps)
        ]
        if not shares or min(shares) >= MIN_VISIBLE:
            return stamps, owner
        stamps = [stamp for index, stamp in enumerate(stamps) if index != int(np.argmin(shares))]


def _paint(canvas: np.ndarray, stamp: _Stamp) -> None:
    """Composite one stamp, with a soft shadow below it when it is opaque."""
    target = canvas[stamp.rows, stamp.columns]
    alpha = stamp.alpha * np.float32(stamp.item.opacity)
    rgb = stamp.rgb
    if stamp.item.camouflage > 0:
        local = target.reshape(-1, 3).mean(axis=0)
        rgb = rgb + np.float32(stamp.item.camouflage) * (local - rgb)
    if stamp.item.opacity > 0.95 and min(alpha.shape) > 8:
        mask = Image.fromarray((alpha * 255.0).astype(np.uint8))
        shadow = np.asarray(mask.filter(ImageFilter.GaussianBlur(2.0)), dtype=np.float32) / 255.0
        drop = max(1, alpha.shape[0] // 16)
        target[drop:] *= 1.0 - 0.35 * shadow[:-drop, :, None]
    target += alpha[..., None] * (rgb - target)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1
