"""Shared by all tests: a real Label Studio for those that ask for it, and one CPU thread for the others."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory):
    """A Label Studio of its own, started once; see ``ppal_backend.rig.label_studio_server``."""
    from ppal_backend.rig.label_studio_server import LabelStudioServer
    from ppal_backend.settings import load_settings

    binary = ROOT / ".venv-label-studio" / "bin" / "label-studio"
    template = load_settings().cache_dir / "label-studio"
    with LabelStudioServer(binary, tmp_path_factory.mktemp("label-studio"), template_cache=template) as server:
        yield server
