"""Checkpoints that run code when they are unpickled."""

import ast
import pickle
from pathlib import Path

import pytest
import torch

from ppal_backend.detector.weights import load_checkpoint, load_tensors
from ppal_backend.errors import CheckpointError

pytestmark = pytest.mark.attacks
PACKAGE = Path(__file__).parents[2] / "ppal_backend"
XML_WRITERS = {"Element", "ElementTree", "SubElement", "indent"}
RESTRICTED = "detector/weights/__init__.py"  # unpickles by a list of what tensors need; tested below
OWN_FILE = "detector/infer/exporting_model.py"  # compares the TorchScript file that it has just written


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def evil(tmp_path):
    """Checkpoints by name, and the file that must not appear."""
    mark = tmp_path / "code-ran"
    files = {
        "in the weights": {"state_dict": {"w": torch.zeros(1), "x": Evil(mark)}},
        "beside the weights": {"state_dict": {"w": torch.zeros(1)}, "meta": Evil(mark)},
        "instead of them": Evil(mark),
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "bare pickle").write_bytes(pickle.dumps(Evil(mark)))
    torch.save({"x": Evil(mark)}, tmp_path / "old format", _use_new_zipfile_serialization=False)
    return [tmp_path / name for name in (*files, "bare pickle", "old format")], mark


def test_the_attack_works_where_nobody_guards(evil):
    files, mark = evil
    torch.load(files[0], weights_only=False)
    assert mark.exists()


def test_initial_weights_and_resumed_training(evil):
    files, mark = evil
    for file in files:
        with pytest.raises(CheckpointError, match="more than plain weights"):
            load_checkpoint(file)
    assert not mark.exists()


def test_a_checkpoint_of_other_software(evil):
    """``ppal rank`` reads these too; only tensors come out."""
    files, mark = evil
    for file in files:
        try:
            content = load_tensors(file)
        except CheckpointError:
            continue
        assert all(type(value).__name__ in ("dict", "Tensor", "_Inert") for value in content.values())
    assert not mark.exists()


def test_nothing_else_unpickles():
    """Every call in the package that could, by its name and arguments."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                risky = name in {"pickle.load", "pickle.loads", "joblib.load", "torch.jit.load", "cloudpickle.loads"}
                unsafe_torch = name == "torch.load" and options.get("weights_only") != "True"
                unsafe_numpy = name in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False"
                unsafe_yaml = name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load")
                if risky or unsafe_torch or unsafe_numpy or unsafe_yaml or name in ("eval", "exec"):
                    found.append(str(path.relative_to(PACKAGE)))
    assert set(found) <= {RESTRICTED, OWN_FILE}
    assert found.count(OWN_FILE) == 1


def test_xml_is_parsed_by_the_guarded_parser_only():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("xml.", "lxml")):
                assert {alias.name for alias in node.names} <= {"ParseError", "quoteattr", *XML_WRITERS}, path
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith(("xml", "lxml")) for alias in node.names), path
