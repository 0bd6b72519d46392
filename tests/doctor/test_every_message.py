"""Every message of ``ppal doctor`` and of the connect dialog is named by a test; a new one without fails here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MAKERS = {"failed": 1, "warning": 1, "from_problem": 1, "SettingsError": 0, "LabelStudioError": 0,
          "LabelConfigError": 0, "RequestError": 0, "UnknownDetector": 0}  # fmt: skip
"""What makes a message, and which argument holds what was seen."""
SHORTEST = 6
DOCTOR = [*sorted((ROOT / "ppal_backend" / "doctor").glob("*.py")), ROOT / "ppal_backend/label_studio/connection.py"]
DIALOG = [ROOT / "ppal_backend" / name for name in (
    "service/backend.py", "service/payloads.py", "label_studio/schema.py",
)]  # fmt: skip


def pieces(node):
    """The fixed parts of a text."""
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def messages(path):
    """Fixed parts of every message that a file makes; those that only pass another one's text on have none."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = getattr(getattr(node, "func", None), "id", "")
        if isinstance(node, ast.Call) and name in MAKERS and len(node.args) > MAKERS[name]:
            found = [piece for piece in pieces(node.args[MAKERS[name]]) if len(piece.strip()) >= SHORTEST]
            if found:
                yield pytest.param(found, id=f"{path.stem}-{node.lineno}")


def words_of_tests(*folders):
    """Texts that tests compare with, without their docstrings."""
    for folder in folders:
        for path in sorted((ROOT / "tests" / folder).glob("test_*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            told = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
                    yield node.value.replace("\\", "")


def is_named(found, words):
    return any(word in piece or piece.strip() in word for piece in found for word in words if len(word) >= SHORTEST)


DOCTORS_TESTS = frozenset(words_of_tests("doctor"))
DIALOGS_TESTS = frozenset(words_of_tests("service", "label_studio"))


@pytest.mark.parametrize("found", [m for path in DOCTOR for m in messages(path)])
def test_of_the_doctor(found):
    assert is_named(found, DOCTORS_TESTS), f"no test provokes {found}"


@pytest.mark.parametrize("found", [m for path in DIALOG for m in messages(path)])
def test_of_the_connect_dialog(found):
    assert is_named(found, DIALOGS_TESTS), f"no test provokes {found}"
