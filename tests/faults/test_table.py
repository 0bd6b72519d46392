"""Every row of the fault table in docs/reliability.md tells all it should, and names tests that there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS = 5
NO_FAULT = "(no fault)"
AT_LEAST = (
    *("kill -9 of the round", "kill -9 of the worker", "kill -9 of the service", "down, slow, 500", "token refused"),
    *("half of an import", "delivered twice", "disk full in training", "disk full in publishing"),
    *("checkpoint damaged", "artifact of a round damaged", "SQLite locked", "Redis killed", "the clock set"),
)


def rows():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = text[text.index("| Fault |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def named_tests():
    """``(row, file, test)``; a file left out (``…::name``) is the one named before, a test left out is None."""
    file = ""
    for row in rows():
        for name in re.findall(r"`([^`]*)`", row[-1]):
            if ".py" not in name and "::" not in name:
                continue
            path, _, test = name.partition("::")
            file = file if path == "…" else path
            yield row[0], file, test.rstrip("…") or None


def functions_of(file):
    path = ROOT / file if file.startswith("tests/") else ROOT / "tests" / "faults" / file
    assert path.is_file(), f"there is no {path}"
    return re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:60])
def test_a_row_tells_what_is_lost_what_is_seen_how_long_and_by_which_test(row):
    assert len(row) == COLUMNS and row[-1]
    if NO_FAULT not in row[0]:
        assert all(row), f"an empty cell: {row}"


@pytest.mark.parametrize(("row", "file", "test"), named_tests())
def test_a_test_that_a_row_names_is_there(row, file, test):
    found = functions_of(file)
    assert found if test is None else any(name.startswith(test) for name in found), f"{file} has no {test}…"


def test_every_row_names_a_test():
    assert {row for row, _, _ in named_tests()} == {row[0] for row in rows()}


@pytest.mark.parametrize("words", AT_LEAST)
def test_the_faults_that_must_be_there(words):
    assert any(words in row[0] for row in rows()), f"no row tells of {words!r}"
