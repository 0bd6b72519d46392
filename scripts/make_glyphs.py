#!/usr/bin/env python3
"""Re-create the sprite sheet of the demo data from the Noto Color Emoji font.

    apt-get install fonts-noto-color-emoji      # Debian 12: 2.042-0+deb12u1
    python scripts/make_glyphs.py [--font NotoColorEmoji.ttf] [--out ppal_backend/synthetic/assets]

Writes ``glyphs.webp`` (lossless, RGBA, 96 px cells) and ``glyphs.json`` (name -> code point and rectangle). The font's
colour bitmaps exist at one size only (109). The licence of the font, SIL OFL 1.1, lies beside the sheet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ppal_backend.synthetic.glyphs import family_names, glyph_family

CELL = 96
COLUMNS = 11
BITMAP_SIZE = 109

# name:code point, in the order of the sheet
CODE_POINTS = """
dog:1F436 wolf:1F43A apple:1F34E tomato:1F345 car:1F697 taxi:1F695 soccer_ball:26BD volleyball:1F3D0 cat:1F431
tiger:1F42F bus:1F68C trolleybus:1F68E tangerine:1F34A peach:1F351 sunflower:1F33B blossom:1F33C football:1F3C8
rugby_ball:1F3C9 watch:231A stopwatch:23F1
fox:1F98A pumpkin:1F383 teddy_bear:1F9F8 duck:1F986 ladybug:1F41E ant:1F41C fly:1FAB0 ghost:1F47B ice:1F9CA
herb:1F33F fallen_leaf:1F342 raccoon:1F99D owl:1F989 fire_engine:1F692 parrot:1F99C crystal_ball:1F52E
bear:1F43B panda:1F43C koala:1F428 frog:1F438 pig:1F437 cow_face:1F42E horse_face:1F434 chicken:1F414 fish:1F41F
whale:1F433 octopus:1F419 snail:1F40C butterfly:1F98B bee:1F41D turtle:1F422 banana:1F34C grapes:1F347 cherries:1F352
strawberry:1F353 pineapple:1F34D watermelon:1F349 eggplant:1F346 corn:1F33D carrot:1F955 bread:1F35E cheese:1F9C0
hamburger:1F354 pizza:1F355 doughnut:1F369 cake:1F382 ice_cream:1F366 coffee:2615 beer:1F37A guitar:1F3B8
trumpet:1F3BA drum:1F941 alarm_clock:23F0 phone:1F4F1 camera:1F4F7 laptop:1F4BB bulb:1F4A1 key:1F511 lock:1F512
hammer:1F528 scissors:2702 umbrella:2602 balloon:1F388 gift:1F381 rocket:1F680 airplane:2708 helicopter:1F681
sailboat:26F5 bicycle:1F6B2 locomotive:1F682 tent:26FA house:1F3E0 tree:1F332 cactus:1F335 mushroom:1F344
basketball:1F3C0
leaf_fluttering:1F343 seedling:1F331 shamrock:2618 clover:1F340 sheaf:1F33E rock:1FAA8 wood:1FAB5 feather:1FAB6
cloud:2601 star:2B50 droplet:1F4A7 fire:1F525 snowflake:2744 puzzle_piece:1F9E9 sponge:1F9FD cookie:1F36A
moon:1F319 broccoli:1F966
"""


def code_points() -> dict[str, str]:
    """Sprite name -> code point (hexadecimal), for every glyph of the sheet."""
    return dict(item.split(":") for item in CODE_POINTS.split())


def render(font: ImageFont.FreeTypeFont, code_point: str) -> Image.Image:
    """One glyph, cropped to its visible pixels, its longer side scaled to ``CELL`` px."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), chr(int(code_point, 16)), font=font, embedded_color=True)
    box = canvas.getchannel("A").point(lambda alpha: 255 if alpha > 12 else 0).getbbox()
    if box is None:
        raise SystemExit(f"expected the font to draw U+{code_point}, got an empty bitmap; use Noto Color Emoji 2.042")
    glyph = canvas.crop(box)
    factor = CELL / max(glyph.size)
    size = (max(1, round(glyph.width * factor)), max(1, round(glyph.height * factor)))
    return glyph.resize(size, Image.Resampling.LANCZOS)


def build(font_path: Path, out: Path) -> None:
    """Write the sheet and its index to ``out``."""
    points = code_points()
    needed = {name for family in family_names() for name in _names(family)}
    if needed != set(points):
        raise SystemExit(f"families and code points differ: {sorted(needed ^ set(points))}; make them equal")
    font = ImageFont.truetype(str(font_path), BITMAP_SIZE)
    sheet = Image.new("RGBA", (COLUMNS * CELL, math.ceil(len(points) / COLUMNS) * CELL))
    glyphs = {}
    for position, (name, code_point) in enumerate(points.items()):
        glyph = render(font, code_point)
        x, y = (position % COLUMNS) * CELL, (position // COLUMNS) * CELL
        sheet.paste(glyph, (x, y))
        glyphs[name] = {"code_point": code_point, "x": x, "y": y, "width": glyph.width, "height": glyph.height}
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / "glyphs.webp", lossless=True, quality=100, method=6, exact=False)
    index = {
        "source": "Noto Color Emoji",
        "source_version": "2.042 (Debian package fonts-noto-color-emoji 2.042-0+deb12u1)",
        "source_sha256": hashlib.sha256(font_path.read_bytes()).hexdigest(),
        "copyright": "Copyright 2022 Google Inc.",
        "licence": "SIL Open Font License 1.1, see OFL.txt",
        "cell_px": CELL,
        "sheet_sha256": hashlib.sha256((out / "glyphs.webp").read_bytes()).hexdigest(),
        "glyphs": glyphs,
    }
    (out / "glyphs.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _names(family: str) -> tuple[str, ...]:
    chosen = glyph_family(family)
    return chosen.labels + chosen.clutter


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description="Re-create the sprite sheet of the demo data.")
    parser.add_argument("--font", type=Path, default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
    parser.add_argument("--out", type=Path, default=root / "ppal_backend" / "demo" / "assets")
    arguments = parser.parse_args()
    if not arguments.font.is_file():
        raise SystemExit(f"expected the font at {arguments.font}; install fonts-noto-color-emoji or pass --font")
    build(arguments.font, arguments.out)


if __name__ == "__main__":
    main()
