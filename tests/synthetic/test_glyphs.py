"""Families share one sheet and no class; the sheet holds a tight sprite for every name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ppal_backend.synthetic
from ppal_backend.errors import DatasetError, SettingsError
from ppal_backend.synthetic.glyphs import ClassSpec, GlyphFamily, GlyphSheet, family_names, glyph_family

ASSETS = Path(ppal_backend.synthetic.__file__).parent / "assets"


@pytest.fixture(scope="module")
def sheet():
    return GlyphSheet.load()


def test_no_class_is_in_two_families_and_none_is_clutter():
    labels = [label for name in family_names() for label in glyph_family(name).labels]
    clutter = {label for name in family_names() for label in glyph_family(name).clutter}
    assert len(labels) == len(set(labels))
    assert not clutter & set(labels)


def test_sizes_of_the_families():
    sizes = {name: len(glyph_family(name).labels) for name in family_names()}
    assert sizes == {"demo": 20, "second": 16, "pretrain": 60}


def test_every_rare_demo_class_looks_like_a_common_one():
    family = glyph_family("demo")
    rare = {spec.label for spec in family.rare}
    assert len(rare) == 10
    for spec in family.rare:
        assert spec.looks_like not in rare
        assert family.spec(spec.looks_like).looks_like == spec.label


def test_the_second_family_has_hard_classes_that_are_common_and_rare_ones_that_are_easy():
    family = glyph_family("second")

    def hard(spec):
        return spec.scale[1] < 1 or spec.opacity[1] < 1 or spec.camouflage[1] > 0 or spec.occluded > 0

    rare = {spec.label for spec in family.rare}
    assert sum(hard(spec) and spec.label not in rare for spec in family.classes) >= 6
    assert sum(not hard(spec) for spec in family.rare) >= 3


@pytest.mark.parametrize("name", family_names())
def test_every_name_has_a_sprite_that_fills_its_cell(sheet, name):
    family = glyph_family(name)
    for label in family.labels + family.clutter:
        sprite = sheet.sprite(label)
        alpha = np.asarray(sprite)[..., 3]
        assert sprite.mode == "RGBA" and max(sprite.size) == 96
        for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]):
            assert edge.max() > 0, f"{label} has an empty border"


def test_no_two_sprites_are_equal(sheet):
    assert len({sheet.sprite(name).tobytes() for name in sheet.names}) == len(sheet.names)


def test_an_unknown_sprite_is_named(sheet):
    with pytest.raises(DatasetError, match="unicorn"):
        sheet.sprite("unicorn")


def test_a_damaged_sheet_is_refused(tmp_path):
    shutil.copytree(ASSETS, tmp_path / "assets")
    content = bytearray((tmp_path / "assets" / "glyphs.webp").read_bytes())
    content[5000] ^= 1
    (tmp_path / "assets" / "glyphs.webp").write_bytes(content)
    with pytest.raises(DatasetError, match="reinstall"):
        GlyphSheet.load(tmp_path / "assets")


def test_the_licence_lies_beside_the_sheet():
    index = json.loads((ASSETS / "glyphs.json").read_text())
    licence = (ASSETS / "OFL.txt").read_text()
    assert index["copyright"] in licence and "SIL OPEN FONT LICENSE Version 1.1" in licence


def test_an_unknown_family_lists_those_there_are():
    with pytest.raises(SettingsError, match="demo, second, pretrain"):
        glyph_family("third")


@pytest.mark.parametrize(
    ("classes", "clutter", "shares"),
    [
        ((ClassSpec("a"), ClassSpec("a")), (), {"easy": 1.0}),
        ((ClassSpec("a"),), ("a",), {"easy": 1.0}),
        ((ClassSpec("a"),), (), {"easy": 0.5}),
        ((ClassSpec("a"),), (), {"odd": 1.0}),
    ],
)
def test_a_family_that_contradicts_itself_is_refused(classes, clutter, shares):
    with pytest.raises(SettingsError):
        GlyphFamily("x", classes, clutter, shares)
