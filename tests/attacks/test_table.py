"""The table in docs/security.md names tests that there are, and every attack test is in it."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.attacks
HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "docs" / "security.md").read_text()
NAMED = set(re.findall(r"`([\w/.]+\.py::\w+)`", TEXT))


def names_in(path):
    return {node.name for node in ast.parse(path.read_text()).body if getattr(node, "name", "").startswith("test_")}


def test_every_test_of_the_table_exists():
    assert len(NAMED) > 30
    for name in NAMED:
        file, test = name.split("::")
        assert test in names_in(HERE / file), name


def test_every_attack_is_in_the_table():
    controls = {"test_the_attack_works_where_nobody_guards", "test_every_route_is_described"}
    for path in HERE.glob("test_*.py"):
        if path.name != "test_table.py":
            missing = {f"{path.name}::{test}" for test in names_in(path) - controls} - NAMED
            assert not missing
