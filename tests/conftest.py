"""Shared by all tests: settings, a store, the command line, a data folder with rounds, and a real Label Studio."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Generated scenes and no network: tests of the default, which asks addresses, take this away.
os.environ.setdefault("PPAL_DETECTOR", "retinanet_tiny")

ROOT = Path(__file__).parent.parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test printed travels between processes as UTF-8; file names that are none hold halves of surrogates."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory):
    """A Label Studio of its own, started once; see ``ppal_backend.rig.label_studio_server``."""
    from ppal_backend.rig.label_studio_server import LabelStudioServer
    from ppal_backend.settings import load_settings

    binary = ROOT / ".venv-label-studio" / "bin" / "label-studio"
    template = load_settings().cache_dir / "label-studio"
    with LabelStudioServer(binary, tmp_path_factory.mktemp("label-studio"), template_cache=template) as server:
        yield server


@pytest.fixture
def settings(tmp_path):
    """Of a data folder of its own; rooms that need others have a fixture of this name."""
    from ppal_backend.settings import load_settings

    return load_settings(MODEL_DIR=tmp_path / "data")


@pytest.fixture
def store(settings):
    """The state of ``settings``, without a project."""
    from ppal_backend.store import open_store

    store = open_store(settings)
    yield store
    store.close()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run("status", 7)``: the command line, in an empty folder, over the state of ``settings``. Its cache is its own,
    where running backends leave notes: commands tell of those of other tests."""
    from typer.testing import CliRunner

    from ppal_backend.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PPAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def make_place(tmp_path):
    """``make_place(**settings)``: a data folder with one project; see ``tests.place.Place``."""
    from tests.place import Place

    places = []

    def make(kind=Place, **settings):
        places.append(kind(tmp_path / "data", **settings))
        return places[-1]

    yield make
    for place in places:
        place.store.close()


@pytest.fixture
def place(make_place):
    return make_place()
