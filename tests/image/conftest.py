"""What the tests of the image share: a checkout, and the image that buildah builds from it."""

import shutil
import subprocess
import sys
import time

import pytest

from ppal_backend.settings import load_settings
from tests.image.buildah import ROOT, Buildah, what_is_missing

CACHE = load_settings().cache_dir


@pytest.fixture(scope="session")
def told():
    """Prints figures for docs/deploy/README.md and docs/development.md; seen with pytest -s."""
    return lambda text: sys.stdout.write(f"\n{text}\n")


@pytest.fixture(scope="session")
def context(tmp_path_factory):
    """What somebody who cloned the repository has."""
    folder = tmp_path_factory.mktemp("context")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def buildah(context, told):
    if reason := what_is_missing():
        pytest.skip(reason)
    if not list((CACHE / "wheels").glob("*/onedl_mmcv-*.whl")):
        pytest.skip("expected mmcv's wheel in PPAL_CACHE, got none: it would be compiled for a quarter of an hour")
    buildah = Buildah(CACHE / "image-test", CACHE / "wheels")
    buildah.clear()
    started = time.monotonic()
    buildah.base()
    told(f"stand-in of the base image: {time.monotonic() - started:.0f} s")
    said, seconds = buildah.build(context)
    assert "compiling" not in said, "the wheel that lies ready is taken"
    told(f"built in {seconds:.0f} s; layers on the base, MB: {[round(mb, 1) for mb in buildah.layers()[1:]]}")
    yield buildah
    buildah.clear()
